"""Builds csrc/ with ninja where there is a C++ compiler; a pure-Python install on the reference where there is none.

LAYERDROP_FAST_BUILD=none skips the build.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

# The oldest torch whose stable ABI the extension needs: built once, it loads with this torch and every later one.
TORCH_TARGET = (2, 11)


def find_compiler() -> str | None:
    """The C++ compiler that the build will call: CXX where it is set, else the first there is, or None."""
    if wanted := os.environ.get("CXX"):
        if shutil.which(wanted.split()[0]) is None:
            raise SystemExit(f"layerdrop_fast: CXX is {wanted!r}, which is not found")
        return wanted
    command = sysconfig.get_config_var("CXX") or "c++"
    return next((name for name in (command.split()[0], "c++", "g++") if shutil.which(name)), None)


def extensions(compiler: str) -> dict[str, Any]:
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit("layerdrop_fast builds against the installed torch: install torch >= 2.11 first") from None
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < TORCH_TARGET:
        raise SystemExit(f"layerdrop_fast needs torch >= 2.11 to build, found {torch.__version__}")
    target = TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48
    # Headers that are not ours come in as system headers: their warnings are not ours either.
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    extension = Extension(
        "layerdrop_fast._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        extra_compile_args=[
            *system,
            "-O3",
            "-fvisibility=hidden",
            # a * b + c is rounded twice on every processor, so that all of them compute the same bits.
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            f"-DTORCH_TARGET_VERSION={target:#018x}ULL",
            f'-DLAYERDROP_COMPILER="{Path(compiler.split()[-1]).name}"',
            f'-DLAYERDROP_TORCH_VERSION="{torch.__version__}"',
        ],
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu"],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


compiler = find_compiler()
headers = Path(sysconfig.get_path("include"), "Python.h").exists()
if os.environ.get("LAYERDROP_FAST_BUILD") == "none":
    print("layerdrop_fast: LAYERDROP_FAST_BUILD=none, installing without the C++ extension")
    setup()
elif compiler is None or not headers:
    missing = "Python.h" if compiler else "C++ compiler"
    print(f"layerdrop_fast: no {missing} found, installing without the C++ extension")
    setup()
else:
    os.environ["CXX"] = compiler
    setup(**extensions(compiler))
