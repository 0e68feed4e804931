"""What it saves to drop layers, branches, attention heads, feed-forward chunks: rates and targets take turns."""

from functools import lru_cache, partial

import pytest

from benchmarks.replay import CLOCK, replay
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.measure import Figures, measure_together
from layerdrop_fast.recipes.bench.our_ways import PartsWay
from layerdrop_fast.recipes.bench.setting import Setting

THREADS = 2
ROUNDS = 15
RATES = (0.0, 0.25, 0.5, 0.75)
TARGETS = {
    "layers": ("layer",),
    "branches": ("branch",),
    "heads": ("head",),
    "chunks": ("ffn_chunk",),
    "heads and chunks": ("head", "ffn_chunk"),
}
SIZE = {"layers": 12, "nhead": 8}
SMALL = {"layers": 2, "d_model": 16, "dim_feedforward": 64, "nhead": 4, "samples": 2, "length": 4}


@lru_cache(maxsize=1)
def measured(small: bool) -> dict[float, dict[str, Figures]]:
    makers = {name: partial(PartsWay, targets=targets) for name, targets in TARGETS.items()}
    contests = [Contest(Setting(p=p, **(SMALL if small else SIZE)), makers) for p in (RATES[2:3] if small else RATES)]
    found = measure_together(contests, rounds=1, draws=1) if small else measure_together(contests, rounds=ROUNDS)
    return {contest.setting.p: figures for contest, figures in zip(contests, found, strict=True)}


def cases():
    for p in RATES:
        for target in TARGETS:
            yield pytest.param(p, target, id=f"{p}-{target}", marks=[] if p == RATES[2] else [pytest.mark.slow])


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("p", "target"), list(cases()))
def test_parts(benchmark, p, target):
    found = measured(benchmark.disabled)[p][target]
    benchmark.group = f"p = {p:g}"
    benchmark.extra_info["figures"] = found.record()
    replay(benchmark, found.seconds)
