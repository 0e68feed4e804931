"""Runs the stages in order, each in a process of its own with a budget, and prints a table last."""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import report
from benchmarks.gpu_check.check import ROOT, Check, write

# Seconds of each, gates first, 530 together in either command; what one leaves over, the next get.
BUDGETS = {
    "build": 110,
    "tests": 170,
    "whole_step": 50,
    "sanitizer": 45,
    "comparison": 65,
    "rooflines": 90,
}
STEPS_BUDGETS = {
    "build": 110,
    "graphed_step": 60,
    "steps": 290,
    "small_batch": 70,
}
# In the order of their records.
STAGES = tuple(dict.fromkeys((*BUDGETS, "tuning", *STEPS_BUDGETS)))
# Without their verdict nothing is timed: one that is stopped is red.
GATES = ("build", "tests", "whole_step", "graphed_step")
MEASURE = ("comparison", "rooflines", "tuning", "steps", "small_batch")
TUNING_BUDGET = 120
GRACE = 10
DRY_BUDGETS = 4  # times as long, for a small machine with other work
# One workspace for all streams, so that a matrix product in a graph has the bits of one outside.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
DRY_ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
OUTPUT = 20000  # characters of a stage's output that its record keeps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--steps", action="store_true", help="whole training steps beside those of others (gpu-bench)")
    parser.add_argument("--tune", action="store_true", help="also tune some kernels, after the rest")
    parser.add_argument("--out", type=Path, help="folder of the records (default: $OUT, else benchmarks/results/<GPU>)")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="only these stages")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only print the table of the records there")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "SECONDS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.stage:
        name, seconds = given.stage
        return run_here(name, given.out, given.dry, float(seconds))
    if given.report:
        print(report.table(read(given.report)))
        return 0
    if not given.dry and not has_gpu():
        name = name_of(given)
        print(f"{name}: torch finds no GPU here; `make {name} DRY=1` runs the same on a CPU", file=sys.stderr)
        return 2
    folder = given.out or results_folder(given.dry)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name_of(given)}{' (dry)' if given.dry else ''}: records in {folder}", flush=True)
    begin = time.monotonic()
    red = run_all(folder, given.dry, chosen_stages(given))
    table = report.table(read(folder, stages_of(given)))
    print(f"\n{table}\nin {time.monotonic() - begin:.0f} s; records in {folder}", flush=True)
    return 1 if red else 0


def chosen_stages(given: argparse.Namespace) -> dict[str, int]:
    stages = stages_of(given)
    if not (given.tune or given.dry):
        stages.pop("tuning", None)
    scale = DRY_BUDGETS if given.dry else 1
    return {name: scale * seconds for name, seconds in stages.items() if not given.only or name in given.only}


def stages_of(given: argparse.Namespace) -> dict[str, int]:
    """All of the command."""
    return dict(STEPS_BUDGETS) if given.steps else BUDGETS | {"tuning": TUNING_BUDGET}


def name_of(given: argparse.Namespace) -> str:
    return "gpu-bench" if given.steps else "gpu-check"


def run_all(folder: Path, dry: bool, stages: dict[str, int]) -> bool:
    """Whether one was red: nothing runs after it."""
    end = time.monotonic() + sum(stages.values())
    files = records(folder)
    for name in stages:
        files[name].unlink(missing_ok=True)
    later = sum(stages.values())
    for name, budget in stages.items():
        later -= budget
        record = run_apart(files[name], name, dry, max(round(end - later - time.monotonic()), 1))
        print(report.line(record), flush=True)
        if record["state"] == "red":
            print(record["output"], flush=True)
            for other in MEASURE:  # no number of a red run is kept
                if other in stages and files[other].exists():
                    write(files[other], {**json.loads(files[other].read_text()), "result": {}})
            return True
    return False


def run_apart(file: Path, name: str, dry: bool, seconds: float) -> dict[str, Any]:
    """A stage in a process of its own, its record."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", name, str(seconds), "--out", str(file)]
    environment = os.environ | ENVIRONMENT | (DRY_ENVIRONMENT if dry else {})
    begin, state = time.monotonic(), "stopped"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *(["--dry"] if dry else [])],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds + GRACE)
            state = "red" if status else "ok"
        except subprocess.TimeoutExpired:
            state = "red" if name in GATES else "stopped"
        finally:  # with what it started, also after Ctrl-C
            if state != "ok":
                kill_group(process.pid)
            process.wait()
        output.seek(0)
        printed = output.read()
    saved = json.loads(file.read_text()) if file.exists() else {"result": {}}
    if state == "red":
        saved = {"result": {}}
    elif saved["result"].get("absent"):
        state = "absent"
    record = {
        "stage": name,
        "state": state,
        "dry": dry,
        "seconds": round(time.monotonic() - begin, 1),
        "budget": seconds,
        **saved,
        "output": printed[-OUTPUT:],
    }
    write(file, record)
    return record


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def run_here(name: str, file: Path, dry: bool, seconds: float) -> int:
    """A stage in this process; what it raises is its output."""
    until = time.monotonic() + seconds  # importing torch counts
    # Without --out, a path of this machine.
    command = ["python", "-m", "benchmarks.gpu_check", "--stage", name, f"{seconds:g}", *(["--dry"] if dry else [])]
    provenance = importlib.import_module("layerdrop_fast._provenance").provenance(command)
    check = Check(file, dry, until, provenance)
    check.save({})
    check.save(importlib.import_module(f"benchmarks.gpu_check.{name}").run(check))
    return 0


def has_gpu() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())


def results_folder(dry: bool) -> Path:
    if out := os.environ.get("OUT"):
        return Path(out)
    if dry:
        return ROOT / "out" / "gpu-check"
    gpu = importlib.import_module("torch").cuda.get_device_name()
    return ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9]+", "-", gpu)


def records(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{number}_{name}.json" for number, name in enumerate(STAGES, 1)}


def read(folder: Path, stages: Collection[str] = STAGES) -> list[dict[str, Any]]:
    files = (file for name, file in records(folder).items() if name in stages)
    return [json.loads(file.read_text()) for file in files if file.exists()]


if __name__ == "__main__":
    sys.exit(main())
