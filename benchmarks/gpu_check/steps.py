"""Whole training steps of 40 layers by every way to drop layers, beside the limit, in turns.

What counts most comes first: what time does not reach is named. A way of another library that fails is left out.
"""

import dataclasses
import itertools
import time
from typing import Any

from benchmarks.gpu_check.check import Check
from layerdrop_fast.recipes.bench.measure import Figures, makers_of, measure
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY

WIDTHS = {"d_model": 1024, "dim_feedforward": 4096, "nhead": 8}
SIZE = Setting(layers=40, **WIDTHS, samples=32, length=512, dtype="bfloat16", device="cuda")
TINY = Setting(layers=4, d_model=16, dim_feedforward=64, nhead=2, samples=4, length=4, dtype="bfloat16")
RATES = (0.5, 0.2, 0.8, 0.0)
ROUNDS = 7
RESERVE = 5  # seconds for what is under way when a contest is to stop
OURS = ("stack", "ours", "recompute", "limit", "narrow")


class OutOfTime(Exception):
    """The budget ends."""


def settings(dry: bool) -> list[Setting]:
    if dry:
        return [dataclasses.replace(TINY, granularity=granularity) for granularity in BY_GRANULARITY]
    every = [
        dataclasses.replace(SIZE, p=p, granularity=granularity, compiled=compiled)
        for p, compiled, granularity in itertools.product(RATES, (False, True), BY_GRANULARITY)
    ]
    # Compiling takes minutes: beyond the first rate it comes last.
    return sorted(every, key=lambda setting: setting.compiled and setting.p != RATES[0])


def run(check: Check) -> dict[str, Any]:
    contests: list[dict[str, Any]] = []
    failed: list[str] = []
    waiting = settings(check.dry)
    taken: dict[bool, float] = {}  # seconds of the last contest, eager and compiled

    def result() -> dict[str, Any]:
        return {"contests": contests, "left out": [*failed, *(f"{each.title()}: out of time" for each in waiting)]}

    for setting in list(waiting):
        check.save(result())
        begin = time.monotonic()
        if check.left() - RESERVE < taken.get(setting.compiled, max(taken.values(), default=0.0)):
            continue
        try:
            figures = contest(check, setting, failed)
        except OutOfTime:
            continue
        finally:
            taken[setting.compiled] = time.monotonic() - begin
        contests.append({"figures": [each.record() for each in figures.values()]})
        waiting.remove(setting)
    return result()


def contest(check: Check, setting: Setting, failed: list[str]) -> dict[str, Figures]:
    """Of all ways but those of others that fail."""
    makers, doing = dict(makers_of(setting.granularity)), ""

    def tell(done: int, total: int, what: str) -> None:
        nonlocal doing
        doing = what
        if done < total and check.left() < RESERVE:
            raise OutOfTime

    while True:
        try:
            # Each way's compilation by itself would take longer than all else.
            rounds, draws = (1, 1) if check.dry else (ROUNDS, 100)
            return measure(setting, makers, rounds=rounds, draws=draws, compilations=False, tell=tell)
        except OutOfTime:
            raise
        except Exception as error:
            way = doing.split()[-1]
            if way not in makers or way in OURS:
                raise
            failed.append(f"{setting.title()}, {way}: {type(error).__name__}: {error}"[:500])
            del makers[way]
