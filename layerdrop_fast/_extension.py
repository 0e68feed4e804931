"""Loads the compiled extension and the GPU kernels where there are any, and remembers why not where there are none.

``planner`` draws the decisions on the host: the C++ module, or its twin in Python.
"""

import ctypes
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

planner: ModuleType
missing: str | None = None  # why there is no compiled extension; None where there is one

try:
    # Loading it also registers the C++ kernels of the ops.
    planner = import_module("layerdrop_fast._C")
except ModuleNotFoundError:
    missing = (
        "not built: no C++ compiler or no Python.h was found at installation, or LAYERDROP_FAST_BUILD=none was set"
    )
except ImportError as error:  # built for another Python, or for a newer torch
    missing = f"built, but does not load: {error}"


def _load_cuda_kernels() -> str | None:
    library = Path(__file__).with_name("_C_cuda.so")
    if not library.exists():
        return "not built: no nvcc was found at installation, or LAYERDROP_FAST_BUILD was set"
    if torch.version.cuda is None:  # its symbols would be missing
        return f"built, but not loaded: torch {torch.__version__} is without CUDA"
    try:
        ctypes.CDLL(str(library))  # torch.ops.load_library would not say why not
    except OSError as error:
        return f"built, but does not load: {error}"
    return None


def _load_triton_kernels() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"not loaded: torch {torch.__version__} is without CUDA and ROCm"
    if find_spec("triton") is None:
        return "not installed"
    # AMD's GPUs have this key too.
    import_module("layerdrop_fast.triton").register("CUDA")
    return None


cuda_missing = _load_cuda_kernels()  # why there are no CUDA kernels; None where there are
triton_missing = _load_triton_kernels()  # why there are no Triton kernels; None where there are

if missing is not None:
    planner = import_module("layerdrop_fast.reference.planner")
