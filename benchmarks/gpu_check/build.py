"""Builds the extension into the source tree, offline, with the torch that is there."""

import re
import subprocess
import sys
from typing import Any

from benchmarks.gpu_check.check import ROOT, Check, Failed


def run(check: Check) -> dict[str, Any]:
    built = call("setup.py", "build_ext", "--inplace", seconds=check.left())
    print(built)
    # In a process that has not loaded what was there before.
    info = call("-m", "layerdrop_fast.cli", "info", seconds=check.left())
    if not check.dry and not re.search(r"^Triton kernels +loaded$", info, re.MULTILINE):
        raise Failed(f"the Triton kernels are not loaded:\n{info}")
    said = [line for line in built.splitlines() if line.startswith("layerdrop_fast:")]
    return {"info": info.splitlines(), "build": said}


def call(*arguments: str, seconds: float) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(seconds, 1),
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout
