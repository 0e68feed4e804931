"""The CUDA object as it was built, without a GPU: what its kernels take of one, and where it loads."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from layerdrop_fast import _extension

LIBRARY = Path(_extension.__file__).with_name("_C_cuda.so")
built = pytest.mark.skipif(not LIBRARY.exists(), reason=f"CUDA kernels {_extension.cuda_missing}")
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")

KERNELS = {"draw_plan_kernel", "advance_step_kernel", "step_key_kernel"}
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
# 1024 threads of that many fill the registers of a multiprocessor.
MOST_REGISTERS = 64
MOST_SHARED_MEMORY = 48 << 10  # what a kernel gets without asking


def cuobjdump(*arguments):
    triton = find_spec("triton")
    shipped = Path(triton.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump") if triton else None
    program = shipped if shipped and shipped.exists() else shutil.which("cuobjdump")
    if program is None:
        pytest.skip("no cuobjdump found")
    return subprocess.run([program, *arguments, LIBRARY], capture_output=True, text=True, check=True).stdout


def resources(text):
    """(architecture, kernel, {REG: .., STACK: .., ...}) of every kernel in what cuobjdump prints."""
    architecture = kernel = None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            (kernel,) = (name for name in KERNELS if name in match[1])
        elif kernel and "REG:" in line:
            yield architecture, kernel, {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            kernel = None


def beyond_bounds(usage):
    bounds = {"REG": MOST_REGISTERS, "SHARED": MOST_SHARED_MEMORY, "STACK": 0, "LOCAL": 0}
    return {name: usage[name] for name, bound in bounds.items() if usage[name] > bound}


@built
def test_kernels_stay_within_registers_and_shared_memory():
    found = list(resources(cuobjdump("--dump-resource-usage")))
    assert {(a, k) for a, k, _ in found} == {(a, k) for a in ARCHITECTURES for k in KERNELS}
    assert [(*which, beyond_bounds(usage)) for *which, usage in found if beyond_bounds(usage)] == []


@pytest.mark.parametrize(("name", "value"), [("REG", 65), ("STACK", 8), ("LOCAL", 4), ("SHARED", 49153)])
def test_what_is_beyond_a_bound_is_found(name, value):
    usage = {"REG": 40, "STACK": 0, "SHARED": 17536, "LOCAL": 0}
    line = " ".join(f"{key}:{number}" for key, number in (usage | {name: value}).items())
    text = f"arch = sm_90\n Function _ZN14layerdrop_fast16draw_plan_kernelENS_8PlanTaskE:\n  {line} CONSTANT[0]:608\n"
    ((architecture, kernel, found),) = resources(text)
    assert (architecture, kernel) == ("sm_90", "draw_plan_kernel")
    assert beyond_bounds(found) == {name: value}


@built
def test_later_gpus_compile_it_themselves():
    assert re.findall(r"sm_\d+(?=\.ptx)", cuobjdump("--list-ptx")) == ["sm_100"]


# What a CUDA build of torch has and a CPU build lacks.
STUBS = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
void torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) {}
void torch_c10_cuda_free_error_msg(char*) {}
}
"""


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300, check=False
    )


@built
@without_cuda
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler found")
def test_it_needs_three_symbols_beyond_a_cpu_build_and_registers_three_ops(tmp_path):
    (tmp_path / "stubs.cpp").write_text(STUBS)
    subprocess.run(["c++", "-shared", "-fPIC", "stubs.cpp", "-o", "stubs.so"], cwd=tmp_path, check=True)
    result = python(f"""
import ctypes, torch
ctypes.CDLL({str(tmp_path / "stubs.so")!r}, ctypes.RTLD_GLOBAL)
torch.version.cuda = "13.0"
from layerdrop_fast import _extension, _library
print(_extension.cuda_missing)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(op for op in _library.op_names() if has_kernel(f"layerdrop_fast::{{op}}", "CUDA")))
""")
    assert result.returncode == 0, result.stderr
    missing, ops = result.stdout.splitlines()
    assert missing == "None"
    assert {"draw_plan", "draw_plan_", "step_key"} <= set(ops.split())


@built
@without_cuda
def test_what_keeps_it_from_loading_is_remembered():
    """A CPU build of torch that says it had CUDA."""
    result = python("""
import torch
torch.version.cuda = "13.0"
from layerdrop_fast import _extension, draw_plan
print(_extension.cuda_missing)
draw_plan([0.5], seed=1, step=2)
""")
    assert result.returncode == 0, result.stderr
    assert re.match(r"built, but does not load: .*_C_cuda\.so: undefined symbol: \w+\n$", result.stdout)


@built
@without_cuda
def test_it_is_not_loaded_where_torch_has_no_cuda():
    assert _extension.cuda_missing == f"built, but not loaded: torch {torch.__version__} is without CUDA"


@built
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is without CUDA")
def test_it_is_loaded_where_torch_has_cuda():
    assert _extension.cuda_missing is None


def test_what_is_not_built_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    assert _extension._load_cuda_kernels().startswith("not built: no nvcc was found at installation, or")
