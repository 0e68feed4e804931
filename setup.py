"""Builds csrc/ where there is a C++ compiler, and csrc/cuda/ where there is nvcc too.

LAYERDROP_FAST_BUILD=none skips the build, LAYERDROP_FAST_BUILD=cpu the CUDA part.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.modified import newer_group

# The oldest torch whose stable ABI the extension needs: built once, it loads with this torch and every later one.
TORCH_TARGET = (2, 11)
CUDA_MODULE = "layerdrop_fast._C_cuda"


def find_compiler() -> str | None:
    """The C++ compiler that the build will call: CXX where it is set, else the first there is, or None."""
    if wanted := os.environ.get("CXX"):
        if shutil.which(wanted.split()[0]) is None:
            raise SystemExit(f"layerdrop_fast: CXX is {wanted!r}, which is not found")
        return wanted
    command = sysconfig.get_config_var("CXX") or "c++"
    return next((name for name in (command.split()[0], "c++", "g++") if shutil.which(name)), None)


def find_nvcc(torch_cuda: str | None) -> tuple[str, tuple[int, int]]:
    """CUDA's compiler and its version; LookupError says why there will be no CUDA kernels."""
    if os.environ.get("LAYERDROP_FAST_BUILD") == "cpu":
        raise LookupError("LAYERDROP_FAST_BUILD=cpu")
    folders = (os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin")
    if (nvcc := shutil.which("nvcc", path=os.pathsep.join(folders))) is None:
        raise LookupError("no nvcc found in CUDA_HOME, PATH or /usr/local/cuda")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.findall(r"release (\d+)\.(\d+)", printed)[0]
    if torch_cuda and torch_cuda.split(".")[0] != major:
        raise LookupError(f"nvcc is of CUDA {major}.{minor}, torch of {torch_cuda}")
    return nvcc, (int(major), int(minor))


def nvcc_command(torch_cuda: str | None, compiler: str) -> list[str]:
    """nvcc and its flags; empty, and one line says why, where the install is CPU-only."""
    try:
        nvcc, version = find_nvcc(torch_cuda)
    except LookupError as reason:
        print(f"layerdrop_fast: {reason}: a CPU-only install: on a GPU, plain PyTorch draws the plans")
        return []
    architectures = [80, 90, 100] if version >= (12, 8) else [80, 90]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    code += [f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
    # Local memory is slow, and no kernel here needs any: ptxas warns, and where warnings are errors refuses.
    warnings = ["-Xcompiler=-Wall,-Wextra", "-Xptxas=-warn-spills,-warn-lmem-usage"]
    warnings += ["-Werror=all-warnings"] if "-Werror" in os.environ.get("CFLAGS", "") else []
    host = ["-ccbin", compiler.split()[-1], "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [nvcc, *host, "-std=c++17", "-O3", "--fmad=false", *code, "--threads=2", *warnings]


def extensions(compiler: str) -> dict[str, Any]:
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit("layerdrop_fast builds against the installed torch: install torch >= 2.11 first") from None
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < TORCH_TARGET:
        raise SystemExit(f"layerdrop_fast needs torch >= 2.11 to build, found {torch.__version__}")
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:#018x}ULL"
    # Headers that are not ours come in as system headers: their warnings are not ours either.
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    cpp, h, cu, cuh = (sorted(map(str, Path("csrc").rglob(f"*.{suffix}"))) for suffix in ("cpp", "h", "cu", "cuh"))
    # a * b + c is rounded twice on every processor, so that all of them compute the same bits.
    flags = [*system, target, "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += [f'-DLAYERDROP_COMPILER="{Path(compiler.split()[-1]).name}"']
    flags += [f'-DLAYERDROP_TORCH_VERSION="{torch.__version__}"']
    where = {"library_dirs": library_paths(), "libraries": ["torch", "torch_cpu"]}
    found = [Extension("layerdrop_fast._C", cpp, extra_compile_args=flags, depends=h, **where)]

    # The loader looks for symbols in libtorch, which must be named though none is its own: a CUDA build's leads on to
    # libtorch_cuda. A CPU build has no such library, and a shared object links without the symbols.
    link = [*(f"-L{path}" for path in library_paths()), "-Xlinker=--no-as-needed", "-ltorch", "-cudart=static"]
    if nvcc := nvcc_command(torch.version.cuda, compiler):
        found.append(Extension(CUDA_MODULE, [], depends=[*cu, *cuh, *h, "setup.py"]))

    class Build(BuildExtension):
        def get_ext_filename(self, name: str) -> str:
            # Called with and without the package's name. It is no Python module: one serves every version of Python.
            named = str(super().get_ext_filename(name))  # type: ignore[no-untyped-call]
            return f"{name.replace('.', '/')}.so" if CUDA_MODULE.endswith(name) else named

        def build_extension(self, extension: Extension) -> None:
            out = self.get_ext_fullpath(extension.name)
            if extension.name != CUDA_MODULE:
                super().build_extension(extension)
            elif newer_group(extension.depends, out):
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                self.spawn([*nvcc, "-DUSE_CUDA", target, *system, *cu, "-shared", *link, "-o", out])

    return {"ext_modules": found, "cmdclass": {"build_ext": Build.with_options(use_ninja=True)}}  # type: ignore[no-untyped-call]


compiler = find_compiler()
headers = Path(sysconfig.get_path("include"), "Python.h").exists()
if (wanted := os.environ.get("LAYERDROP_FAST_BUILD", "")) not in ("", "cpu", "none"):
    raise SystemExit(f"layerdrop_fast: LAYERDROP_FAST_BUILD is {wanted!r}, expected cpu or none")
if wanted == "none":
    print("layerdrop_fast: LAYERDROP_FAST_BUILD=none, installing without the C++ extension")
    setup()
elif compiler is None or not headers:
    missing = "Python.h" if compiler else "C++ compiler"
    print(f"layerdrop_fast: no {missing} found, installing without the C++ extension")
    setup()
else:
    os.environ["CXX"] = compiler
    setup(**extensions(compiler))
