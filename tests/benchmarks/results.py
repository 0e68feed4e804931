"""Results as pytest-benchmark stores them, made by hand."""

import copy
import json
from pathlib import Path

from benchmarks.test_step import RATES
from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY

ROOT = Path(__file__).parents[2]
MIB = 2**20
COMMIT, OTHER = "0" * 39 + "a", "0" * 39 + "b"
ABOUT = {"machine": "a processor, 2 cores", "gpu": "none", "driver": "none", "python": "3.11.7", "torch": "2.13.0"}
ABOUT |= {"numpy": "2.4.6", "triton": "none", "layerdrop_fast": "0.1.0"}
SPEED = {"masked": 2.0, "dense": 2.0, "discard": 2.0, "ours": 0.8, "recompute": 0.9, "limit": 0.8, "narrow": 0.8}
BYTES = {"masked": 200, "dense": 200, "discard": 200, "ours": 50, "recompute": 40, "limit": 50, "narrow": 50}


def figures(way, setting, turns=5):
    return Figures(
        way=way,
        setting=setting,
        seconds=tuple(SPEED.get(way, 1.0) * (1 + turn / 10) for turn in range(turns)),
        layers_run=(10.0,) * turns,
        saved_bytes=BYTES.get(way, 100) * MIB,
        peak_bytes=BYTES.get(way, 100) * 2 * MIB,
        decision_s=None,
        compilation=None,
    )


def benchmark(suite, name, row, **more):
    fullname = f"benchmarks/test_{suite}.py::test_{suite}[{name}]"
    return {"fullname": fullname, "extra_info": {"threads": 2, "figures": row.record(), **more}}


def step(granularity="batch", p=0.5, **of):
    setting = Setting(p=p, granularity=granularity, **of)
    name = f"{granularity}-{p}-{setting.dtype}"
    return [benchmark("step", f"{name}-{way}", figures(way, setting)) for way in BY_GRANULARITY[granularity]]


def steps():
    return [row for granularity in BY_GRANULARITY for p in RATES for row in step(granularity, p)]


def depth():
    return [
        benchmark("depth", f"{layers}-{way}", figures(way, Setting(layers=layers, p=1 - 10 / layers)))
        for layers in (10, 20, 40, 100, 250, 1000)
        for way in ("masked", "skip", "ours", "limit")
        if way != "masked" or layers <= 100
    ]


def memory():
    ways = ["masked", "skip", "skip, checkpoints", "ours", "recompute", "limit"]
    course = {"seconds": [0.0, 0.1, 0.2], "bytes": [0, 5 * MIB, MIB]}
    ways += [f"max_kept={bound}" for bound in (15, 10, 5, 2, 1)]
    return [benchmark("memory", way, figures(way, Setting()), course=course) for way in ways]


def parts():
    return [
        benchmark("parts", f"{p}-{way}", figures(way, Setting(layers=12, p=p)))
        for p in (0.0, 0.5)
        for way in ("layers", "branches", "heads", "chunks", "heads and chunks")
    ]


def content(benchmarks, date="2026-01-01T00:00:00+00:00", commit=COMMIT):
    return {
        "machine_info": dict(ABOUT),
        "commit_info": {"id": commit, "dirty": False},
        "run": {"command": "python -m pytest benchmarks", "commit": commit, "failed": 0, "exit status": 0},
        "datetime": date,
        "benchmarks": json.loads(json.dumps(benchmarks)),
    }


def stored(folder, **files):
    for name, what in files.items():
        path = folder / "Linux" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(what))
    return folder


def judged(of, **changed):
    """The same results, with other figures of some ways."""
    rows = copy.deepcopy(of)
    for row in rows:
        change = changed.get(row["extra_info"]["figures"]["way"])
        if change:
            row["extra_info"]["figures"].update(change(row["extra_info"]["figures"]))
    return rows
