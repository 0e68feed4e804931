"""compute-sanitizer over every kernel: memory, then races of shared memory."""

import os
import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu_check.check import ROOT, Check, Failed

SCRIPT = (sys.executable, "-m", "benchmarks.gpu_check.every_kernel")
# Their names are printed where something is found in them.
OURS = r"\w+_(fwd|bwd|plan|key|step)_kernel"
TOOLS = ("memcheck", "racecheck")


def run(check: Check) -> dict[str, Any]:
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    program = shutil.which("compute-sanitizer", path=path)
    result: dict[str, Any] = {}
    # Once without, which also compiles the kernels: the tool would slow that down.
    for tool in ("nothing", *TOOLS):
        if tool != "nothing" and (check.dry or program is None):
            return {"absent": "compute-sanitizer watches GPUs" if check.dry else "no compute-sanitizer found"}
        watched = () if tool == "nothing" else (program, "--tool", tool, "--report-api-errors", "no")
        try:
            done = call((*watched, *SCRIPT), check.left())
        except subprocess.TimeoutExpired:
            result[tool] = "stopped: out of time"
            break
        if tool == "nothing" and done.returncode:
            raise Failed(f"every_kernel ended with {done.returncode}:\n{done.stdout}")
        result[tool] = verdict(done.stdout, done.returncode) if watched else "runs"
        check.save(result)
    return result


def call(command: tuple[str, ...], seconds: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=ROOT,
        # Each tensor is an allocation of its own, so that what lies behind it is not another tensor's.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(seconds, 1),
        check=False,
    )


def verdict(printed: str, status: int) -> str:
    """ "none found", or why the tool says nothing; Failed where it found something in a kernel of ours."""
    if "Device not supported" not in printed and (summary := re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", printed)):
        if re.search(OURS, printed):
            raise Failed(printed[-6000:])
        if not re.search(r"[1-9]", summary[0]):
            return "none found"
        return f"nothing in our kernels; elsewhere {summary[0]}: {printed[:2000]}"
    return f"does not run here, status {status}: {printed.strip()[-600:]}"
