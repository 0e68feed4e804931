"""The tests marked cuda, and those of the Triton kernels through the dispatcher on the GPU.

Most of their time goes to compiling kernels, 1762 of them: several processes share them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import ROOT, Check, Failed

PROCESSES = 16
RESERVE = 15  # seconds for the last test of each process
# No option and no plugin that a machine with a GPU need not have.
PYTEST = (
    *("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.share"),
    *("-m", "not slow", "tests/cuda", "tests/triton"),
)
# A dry run takes a few; `make test` runs all of them in the interpreter.
DRY = ("-k", "test_what_is_dropped_out_may_be_anything or test_views_with_gaps or test_kernels_stay_within")


def run(check: Check) -> dict[str, Any]:
    shares = 2 if check.dry else max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    until = time.time() + check.left() - RESERVE
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(index)) for index in range(shares)]
        processes = [start(index, shares, until, files[index], check.dry) for index in range(shares)]
        # Read in turn: what the others print waits in their files.
        status = [process.wait() for process in processes]
        printed = [file.with_suffix(".txt").read_text() for file in files]
        ended = [Counter(json.loads(file.read_text()) if file.exists() else {}) for file in files]
    total = sum(ended, Counter())
    total["left"] = total["collected"] - sum(total[how] for how in ("passed", "failed", "skipped"))
    result = {"processes": shares, **total, "last lines": [text.strip().splitlines()[-1:] for text in printed]}
    for code, text, counts in zip(status, printed, ended, strict=True):
        # 2 is also the status of a process that has been stopped in time, 5 of one without tests.
        in_time = code == 2 and "out of time" in text
        if counts["failed"] or not (code in (0, 5) or in_time):
            print(text[-6000:])
    if total["failed"] or any(code not in (0, 2, 5) for code in status) or not total["passed"]:
        raise Failed(f"{total['failed']} of {total['collected']} tests failed; processes ended with {status}")
    if any(code == 2 and "out of time" not in text for code, text in zip(status, printed, strict=True)):
        raise Failed(f"tests could not be collected; processes ended with {status}")
    return result


def start(index: int, shares: int, until: float, file: Path, dry: bool) -> "subprocess.Popen[str]":
    share = json.dumps([index, shares, until, str(file)])
    with file.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *PYTEST, *(DRY if dry else ())],
            cwd=ROOT,
            env={**os.environ, "GPU_CHECK_SHARE": share, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
