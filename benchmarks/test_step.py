"""One training step of 40 layers by every way to drop layers, beside the limit: time, memory, decisions, compiling.

All ways train the same weights and take turns; a setting is measured when its first test runs, and each test hands the
steps of one way to pytest-benchmark. ``extra_info`` has all figures. See ``layerdrop_fast.recipes.bench``.
"""

import dataclasses
from functools import lru_cache

import pytest

from benchmarks.replay import CLOCK, replay
from layerdrop_fast.recipes.bench.measure import Figures, makers_of, measure
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY

THREADS = 2
RATES = (0.0, 0.2, 0.5, 0.8)
# Where goals are set, more of the shorter steps, of which a pause takes a larger share.
ROUNDS = {0.0: 5, 0.2: 7, 0.5: 9, 0.8: 15}
ROUNDS_ELSE = 3
TINY = {"layers": 4, "d_model": 16, "dim_feedforward": 64, "nhead": 2, "samples": 5, "length": 4}


def settings():
    for compiled in (False, True):
        for dtype in ("float32", "bfloat16"):
            for granularity in BY_GRANULARITY:
                for p in RATES:
                    if not compiled or dtype == "float32":
                        yield Setting(p=p, granularity=granularity, dtype=dtype, compiled=compiled)


@lru_cache(maxsize=1)
def measured(setting: Setting) -> dict[str, Figures]:
    has_goals = setting.dtype == "float32" and (not setting.compiled or setting.p == 0.5)
    rounds = ROUNDS[setting.p] if has_goals else ROUNDS_ELSE
    return measure(setting, rounds=rounds, compilations=setting.p == 0.5)


def figures(benchmark, setting: Setting, way: str) -> Figures:
    if not benchmark.disabled:
        return measured(setting)[way]
    # A smoke test: this way alone, once.
    makers = {way: makers_of(setting.granularity)[way]}
    return measure(dataclasses.replace(setting, **TINY), makers, rounds=1, draws=1)[way]


def cases():
    for setting in settings():
        name = f"{setting.granularity}-{setting.p}-{setting.dtype}{'-compiled' if setting.compiled else ''}"
        marks = [] if setting.p == 0.5 and not setting.compiled else [pytest.mark.slow]
        for way in BY_GRANULARITY[setting.granularity]:
            yield pytest.param(setting, way, id=f"{name}-{way}", marks=marks)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("setting", "way"), list(cases()))
def test_step(benchmark, setting, way):
    found = figures(benchmark, setting, way)
    benchmark.group = found.setting.title()
    benchmark.extra_info["figures"] = found.record()
    replay(benchmark, found.seconds)
