"""The rules of a plan and the CUDA kernel's own code, compiled for the host.

tests/csrc/draw_plan.cpp has the checks. The kernel's block is made of threads of the processor; what only a GPU can
show is in tests/cuda.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from layerdrop_fast import _extension

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, (getattr(_extension.planner, "compiler", "c++"), "c++", "g++"))), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler found")


def build_and_run(folder, flags, sources, *arguments):
    program = folder / "program"
    command = [COMPILER, "-std=c++17", "-O1", "-g", *flags, "-pthread", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, timeout=300, check=False)
    if built.returncode:
        return built
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("flags", "requests"),
    [
        (["-Wall", "-Wextra", "-Werror"], 400),
        (["-fsanitize=thread"], 60),
        (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], 60),
    ],
    ids=["plain", "thread", "address,undefined"],
)
def test_on_the_host(tmp_path, flags, requests):
    if "-fsanitize" in flags[0]:
        empty = tmp_path / "empty.cpp"
        empty.write_text("int main() {}\n")
        if build_and_run(tmp_path, flags, [empty]).returncode:
            pytest.skip(f"{COMPILER} or this system lacks {flags[0]}")
    result = build_and_run(
        tmp_path, flags, [Path(__file__).with_name("draw_plan.cpp"), ROOT / "csrc/planner.cpp"], str(requests)
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout == "0 failures\n"
