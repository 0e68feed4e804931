"""Installing and importing, with and without the compiled extension."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import layerdrop_fast
from layerdrop_fast import _extension

ROOT = Path(__file__).parents[1]

WITHOUT_EXTENSION = """
import sys
sys.modules["layerdrop_fast._C"] = None  # as if it had not been built
import torch, layerdrop_fast
"""


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )


def test_everything_in_all_exists():
    assert layerdrop_fast.__all__ == sorted(layerdrop_fast.__all__)
    for name in layerdrop_fast.__all__:
        assert getattr(layerdrop_fast, name) is not None


def test_import_needs_torch_and_numpy_only():
    """Optional extras stay unimported, and so does what only a GPU needs."""
    code = """
import sys, layerdrop_fast
extras = {"rich", "matplotlib", "safetensors", "triton", "pytest"} & set(sys.modules)
sys.exit(f"imported {extras}" if extras else 0)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_without_the_extension_everything_gives_the_same():
    code = """
from layerdrop_fast import _extension, draw_plan, ops
plan = draw_plan([0.3] * 9, 5, seed=1, step=2, sampling="systematic")
counters = torch.tensor([1, 2, 0])
key = ops.step_key(counters)
x = torch.arange(48.0).view(4, 3, 4)
out = ops.scatter_residual(x, x[:2], torch.tensor([1, 3], dtype=torch.int32), dropout_p=0.5, key=key,
                           site=torch.tensor(300, dtype=torch.int32))
print(plan.keep.tolist(), plan.layers, plan.rows(2).tolist(), plan.slot.tolist(), key.tolist(), out.tolist())
print(_extension.missing)
"""
    without, with_extension = python(WITHOUT_EXTENSION + code), python("import torch, layerdrop_fast" + code)
    assert without.returncode == 0, without.stderr
    *same, reason = without.stdout.splitlines()
    assert same == with_extension.stdout.splitlines()[:-1]
    assert reason.startswith(
        "not built: no C++ compiler or no Python.h was found at installation, or LAYERDROP_FAST_BUILD"
    )


def build_wheel(folder, **environment):
    """A wheel of a clean copy of the sources, and what the build printed."""
    source = folder / "source"
    for name in ("csrc", "layerdrop_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    result = subprocess.run(
        [*command, str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean | environment,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LAYERDROP_FAST_BUILD": "none"}, "LAYERDROP_FAST_BUILD=none, installing without the C++ extension"),
        ({"PATH": str(Path(sys.executable).parent)}, "no C++ compiler found, installing without the C++ extension"),
    ],
)
def test_a_pure_python_install(tmp_path, environment, said):
    wheel, output = build_wheel(tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said in output
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {"layerdrop_fast/py.typed", "layerdrop_fast/reference/philox.py", "layerdrop_fast/nn/stack.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


@pytest.mark.slow
def test_a_compiled_install(tmp_path):
    wheel, _ = build_wheel(tmp_path, CFLAGS="-Werror")
    names = zipfile.ZipFile(wheel).namelist()
    assert "layerdrop_fast/_C" + sysconfig.get_config_var("EXT_SUFFIX") in names
    assert ("layerdrop_fast/_C_cuda.so" in names) == any(map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc")))


def run_setup(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=300,
    )


def test_the_source_distribution_has_all_that_the_build_reads(tmp_path):
    base = tmp_path / "metadata"
    base.mkdir()
    result = run_setup("egg_info", "-e", str(base), "sdist", "-d", str(tmp_path), LAYERDROP_FAST_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 20
    assert sources | {"setup.py", "pyproject.toml", "layerdrop_fast/py.typed", "LICENSE", "README.md"} <= names


def test_a_compiler_that_is_not_there_is_an_error():
    result = run_setup("--version", CXX="no-such-compiler -v")
    assert result.returncode != 0
    assert "CXX is 'no-such-compiler -v', which is not found" in result.stderr


def test_an_unknown_build_is_an_error():
    result = run_setup("--version", LAYERDROP_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert "LAYERDROP_FAST_BUILD is 'gpu', expected cpu or none" in result.stderr


# The flags that setup.py chooses for a torch of the CUDA version sys.argv[1], where no nvcc is found but $CUDA_HOME's.
NVCC_COMMAND = """
import os, runpy, shutil, sys
which, torch_cuda = shutil.which, sys.argv[1]
shutil.which = lambda name, path=None: which(name, path=path and path.split(os.pathsep)[0])
sys.argv = ["setup.py", "--version"]
print(*runpy.run_path("setup.py", run_name="__main__")["nvcc_command"](torch_cuda, "g++"))
"""
CPU_ONLY = "a CPU-only install: on a GPU, plain PyTorch draws the plans"


@pytest.mark.skipif(_extension.missing is not None, reason="no C++ extension is built here")
@pytest.mark.parametrize(
    ("release", "torch_cuda", "build", "reason", "architectures"),
    [
        ("13.1", "13.0", "", None, ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("12.8", "12.6", "", None, ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("12.6", "12.8", "", None, ["sm_80", "sm_90", "compute_90"]),
        ("12.8", "13.0", "", "nvcc is of CUDA 12.8, torch of 13.0", []),
        ("13.0", "13.0", "cpu", "LAYERDROP_FAST_BUILD=cpu", []),
        (None, "13.0", "", "no nvcc found in CUDA_HOME, PATH or /usr/local/cuda", []),
    ],
)
def test_nvcc_compiles_what_it_can_or_the_install_says_that_it_is_cpu_only(
    tmp_path, release, torch_cuda, build, reason, architectures
):
    if release:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
        nvcc.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", NVCC_COMMAND, torch_cuda],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_HOME": str(tmp_path), "LAYERDROP_FAST_BUILD": build},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    *said, command = result.stdout.split("\n")[:-1]
    assert re.findall(r",code=(\w+)", command) == architectures
    assert [line for line in said if line.endswith(CPU_ONLY)][-1:] == (
        [f"layerdrop_fast: {reason}: {CPU_ONLY}"] if reason else []
    )


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
