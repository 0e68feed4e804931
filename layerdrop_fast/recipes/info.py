"""What is installed, and what the package can use of it."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec

import torch

from layerdrop_fast import __version__, _extension
from layerdrop_fast._library import NAMESPACE, op_names


def describe() -> str:
    """Versions and backends, one a line, with the reason where one is missing."""
    rows = [
        ("layerdrop_fast", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in ("triton", "numpy")),
        ("C++ extension", _extension_state()),
        ("CUDA kernels", _extension.cuda_missing or "loaded"),
        ("Triton kernels", _extension.triton_missing or "loaded"),
        ("GPU", _gpu()),
        ("ops on CPU", _ops("CPU")),
        ("ops on CUDA", _ops("CUDA")),
        ("demo's packages", _demo()),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension_state() -> str:
    if _extension.missing is not None:
        return f"missing ({_extension.missing}); plans are drawn in Python"
    built = _extension.planner
    return f"built by {built.compiler} with torch {built.built_with_torch}, uses {built.instruction_sets()[0]}"


def _ops(key: str) -> str:
    """Who computes each op for tensors with this dispatch key."""
    kernels = [op for op in op_names() if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)]
    rest = len(op_names()) - len(kernels)
    if not rest:
        return f"own kernels for all {len(kernels)}"
    own = f"own kernels for {', '.join(kernels)}; " if kernels else "no kernels of their own yet; "
    return f"{own}plain PyTorch for {'the other ' if kernels else 'all '}{rest}"


def _gpu() -> str:
    if torch.version.cuda is None:
        return f"none (torch {torch.__version__} is built without CUDA)"
    if not torch.cuda.is_available():
        return f"none (torch {torch.__version__} is built with CUDA, but finds no GPU or driver)"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, {names}"


def _demo() -> str:
    missing = [name for name in ("matplotlib", "rich", "safetensors") if find_spec(name) is None]
    return f"missing ({', '.join(missing)}: pip install 'layerdrop_fast[demo]')" if missing else "installed"
