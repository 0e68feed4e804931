"""The tests marked cuda, and those of the Triton kernels through the dispatcher on the GPU.

Most of their time goes to compiling kernels, well over a thousand: several processes share them.
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
RESERVE = 20  # seconds for the last test of each process
NO_TESTS = 5  # exit status
# No option and no plugin that a machine with a GPU need not have.
PYTEST = (
    *("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.share"),
    # Fuzzing draws widths, and each is compiled anew: one such test takes minutes.
    *("-m", "not slow", "--ignore=tests/triton/test_fuzz.py", "tests/cuda", "tests/triton"),
)
# A dry run takes a few; `make test` runs all of them in the interpreter.
DRY = ("-k", "test_what_is_dropped_out_may_be_anything or test_views_with_gaps or test_kernels_stay_within")


def run(check: Check) -> dict[str, Any]:
    shares = 2 if check.dry else max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    until = time.time() + check.left() - RESERVE
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(index)) for index in range(shares)]
        processes = [start(index, shares, until, files[index], check.dry) for index in range(shares)]
        status = [wait(process, until + RESERVE - 5) for process in processes]
        printed = [file.with_suffix(".txt").read_text() for file in files]
        ended = [Counter(json.loads(file.read_text()) if file.exists() else {}) for file in files]
    total = sum(ended, Counter())
    total["left"] = total["collected"] - sum(total[how] for how in ("passed", "failed", "skipped"))
    in_time = [code in (0, NO_TESTS, None) or "out of time" in text for code, text in zip(status, printed, strict=True)]
    if total["failed"] or not all(in_time) or not total["passed"]:
        for text, counts, ok in zip(printed, ended, in_time, strict=True):
            if counts["failed"] or not ok:
                print(text[-6000:])
        raise Failed(f"{total['failed']} of {total['collected']} tests failed; processes ended with {status}")
    return {"processes": shares, **total, "last lines": [text.strip().splitlines()[-1:] for text in printed]}


def wait(process: "subprocess.Popen[str]", until: float) -> int | None:
    """The exit status; None where a test went on for too long: its process is killed, and the test is left."""
    try:
        return process.wait(max(until - time.time(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


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
