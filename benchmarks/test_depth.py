"""Ten kept layers of stacks of 10 to 1,000: what the dropped ones cost. All depths take turns."""

from functools import lru_cache

import pytest

from benchmarks.replay import CLOCK, replay
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.measure import Figures, measure_together
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import WAYS

THREADS = 2
ROUNDS = 11
KEPT = 10
DEPTHS = (10, 20, 40, 100, 250, 1000)
WAYS_TO_DEPTH = {"masked": 100, "skip": 1000, "ours": 1000, "limit": 1000}  # masks hold every layer's activations
SMALL = {"d_model": 16, "dim_feedforward": 64, "nhead": 2, "samples": 2, "length": 4}


@lru_cache(maxsize=1)
def measured(small: bool) -> dict[int, dict[str, Figures]]:
    contests = []
    for depth in DEPTHS[:2] if small else DEPTHS:
        makers = {way: WAYS[way][1] for way, deepest in WAYS_TO_DEPTH.items() if depth <= deepest}
        contests.append(Contest(Setting(layers=depth, p=1 - KEPT / depth, **(SMALL if small else {})), makers))
    found = measure_together(contests, rounds=1, draws=1) if small else measure_together(contests, rounds=ROUNDS)
    return {contest.setting.layers: figures for contest, figures in zip(contests, found, strict=True)}


def cases():
    for depth in DEPTHS:
        for way, deepest in WAYS_TO_DEPTH.items():
            if depth <= deepest:
                yield pytest.param(depth, way, id=f"{depth}-{way}", marks=[pytest.mark.slow] if depth > 20 else [])


@pytest.mark.benchmark(group=f"{KEPT} kept layers", timer=CLOCK)
@pytest.mark.parametrize(("depth", "way"), list(cases()))
def test_depth(benchmark, depth, way):
    found = measured(benchmark.disabled)[depth][way]
    assert set(found.layers_run) == {depth if way == "masked" else KEPT}
    benchmark.extra_info["figures"] = found.record()
    replay(benchmark, found.seconds)
