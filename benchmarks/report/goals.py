"""What the project wants to reach, as data, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.report.read import Results
from benchmarks.test_depth import DEPTHS
from benchmarks.test_step import RATES
from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.table import paired

TURNS = 5  # fewer do not decide about a time

Pair = tuple[str, Figures | None, Figures | None]

# Ratios, of each turn where it is time.
MEASURES: dict[str, Callable[[Figures, Figures], list[float]]] = {
    "saved bytes": lambda one, other: [one.saved_bytes / other.saved_bytes],
    "peak bytes": lambda one, other: [one.peak_bytes / other.peak_bytes],
    "step time": paired,
    "throughput": lambda one, other: paired(other, one),
    "time a kept layer": lambda one, other: [
        ratio * kept / run
        for ratio, run, kept in zip(paired(one, other), one.layers_run, other.layers_run, strict=True)
    ],
}
TIMES = ("step time", "throughput", "time a kept layer")


@dataclass(frozen=True)
class Goal:
    """How a way is to stand beside another in the same turns; without bounds it is only told."""

    measure: str
    way: str
    other: str
    at_most: float | None = None
    at_least: float | None = None
    granularities: tuple[str, ...] = ("batch", "sample")
    rates: tuple[float, ...] = RATES
    dtype: str = "float32"
    compiled: bool = False

    def title(self) -> str:
        return f"{self.measure}: {self.way} / {self.other}"

    def bounds(self) -> str:
        if self.at_most is not None and self.at_least is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f"≤ {self.at_most:g}" if self.at_most else f"≥ {self.at_least:g}" if self.at_least else "none"

    def pairs(self, results: Results) -> Iterator[Pair]:
        """Where, the way and the other; None: not measured."""
        for granularity in self.granularities:
            for p in self.rates:
                contest = results.step(granularity, p, self.dtype, self.compiled)
                ways = contest.by_way() if contest else {}
                kind = f"{', ' + self.dtype if self.dtype != 'float32' else ''}{', compiled' if self.compiled else ''}"
                yield f"{granularity}, p = {p:g}{kind}", ways.get(self.way), ways.get(self.other)


@dataclass(frozen=True)
class DepthGoal(Goal):
    """The same between stacks of other depths and one, the same number of layers kept."""

    base: int = 40

    def title(self) -> str:
        return f"{self.measure}: {self.way} / {self.other} of {self.base}"

    def pairs(self, results: Results) -> Iterator[Pair]:
        contest = results.only("depth")
        depths = contest.by_layers() if contest else {}
        for depth in DEPTHS:
            if depth > self.base:
                here, base = (depths.get(layers, {}) for layers in (depth, self.base))
                yield f"{depth:,} layers", here.get(self.way), base.get(self.other)


DROPPING = tuple(p for p in RATES if p)
CPU = (
    Goal("saved bytes", "ours", "skip", at_most=0.57, granularities=("batch",)),
    Goal("saved bytes", "ours", "masked", at_most=0.285, rates=(0.5,)),
    Goal("saved bytes", "recompute", "skip", at_most=0.42, granularities=("batch",), rates=(0.5,)),
    Goal("saved bytes", "ours", "limit", at_most=1.02),
    Goal("saved bytes", "ours", "narrow", granularities=("sample",)),
    Goal("step time", "ours", "skip", at_most=0.90, granularities=("batch",), rates=DROPPING),
    Goal("step time", "ours", "skip", granularities=("batch",), rates=(0.0,)),
    Goal("step time", "ours", "masked", at_most=0.47, rates=(0.5,)),
    Goal("step time", "ours", "limit", at_most=1.03),
    Goal("step time", "ours", "narrow", granularities=("sample",)),
    DepthGoal("time a kept layer", "ours", "ours", at_least=0.95, at_most=1.05),
)
GPU = (
    Goal("throughput", "ours", "skip", at_least=1.5, granularities=("batch",), rates=(0.5,), dtype="bfloat16"),
    Goal(
        "throughput",
        "ours",
        "skip",
        at_least=1.15,
        granularities=("batch",),
        rates=(0.5,),
        dtype="bfloat16",
        compiled=True,
    ),
    Goal("throughput", "ours", "subset", at_least=1.3, granularities=("sample",), rates=(0.5,), dtype="bfloat16"),
    Goal("throughput", "ours", "masked", at_least=2.6, rates=(0.5,), dtype="bfloat16"),
    Goal("peak bytes", "ours", "skip", at_most=0.62, granularities=("batch",), rates=(0.5,), dtype="bfloat16"),
    Goal("peak bytes", "ours", "limit", at_most=1.02, rates=(0.5,), dtype="bfloat16"),
)
GOALS = {"cpu": CPU, "cuda": GPU}


@dataclass(frozen=True)
class Verdict:
    """What was measured of a goal in one place."""

    goal: Goal
    where: str
    ratios: tuple[float, ...]  # empty: not measured

    @property
    def judged(self) -> bool:
        return bool(self.ratios) and (self.goal.measure not in TIMES or len(self.ratios) >= TURNS)

    @property
    def beyond(self) -> float:
        """By which share of the bound the median is on its wrong side; negative: on the right one."""
        found, goal = median(self.ratios), self.goal
        above = [found / goal.at_most - 1] if goal.at_most else []
        below = [1 - found / goal.at_least] if goal.at_least else []
        return max(above + below)

    @property
    def bounded(self) -> bool:
        return bool(self.goal.at_most or self.goal.at_least)

    @property
    def hit(self) -> bool | None:
        """None: nothing to judge."""
        return self.beyond <= 0 if self.bounded and self.judged else None

    def figure(self) -> str:
        """The median, and the quartiles of what was measured in turns."""
        if not self.ratios:
            return "-"
        if self.goal.measure not in TIMES:
            return f"{self.ratios[0]:.3f}"
        if len(self.ratios) == 1:
            return f"{self.ratios[0]:.3f} (one turn)"
        low, middle, high = quantiles(self.ratios, n=4, method="inclusive")
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    def said(self) -> str:
        if not self.ratios:
            return "not measured"
        if not self.bounded:
            return "no goal"
        if not self.judged:
            return f"open: {len(self.ratios)} turns of {TURNS}"
        return f"**missed** by {self.beyond:.1%}" if self.beyond > 0 else f"hit, {-self.beyond:.1%} to spare"


def verdicts(results: Results) -> list[Verdict]:
    """Of every goal of the device, in every place where it holds."""
    return [
        Verdict(goal, where, _ratios(goal, one, other))
        for goal in GOALS[results.device]
        for where, one, other in goal.pairs(results)
    ]


def _ratios(goal: Goal, one: Figures | None, other: Figures | None) -> tuple[float, ...]:
    if one is None or other is None:
        return ()
    try:
        return tuple(MEASURES[goal.measure](one, other))
    except ZeroDivisionError:  # the other held or ran nothing
        return ()
