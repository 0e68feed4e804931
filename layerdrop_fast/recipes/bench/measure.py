"""Measures the steps of a contest: time in turns, memory, decisions, and what compiling costs.

figures = measure(Setting(p=0.5, granularity="sample"), rounds=5)
print(table(figures))
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from layerdrop_fast._checks import check_count
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.bench.allocations import peak_of
from layerdrop_fast.recipes.bench.contest import Contest, Makers
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.way import Way
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY, WAYS

ROUNDS = 5
# One draw takes microseconds: the median needs many.
DRAWS = 200
# Plans beyond the first that a compiled way meets before it is timed: each may compile it once more.
COMPILED_PLANS = 3
# Steps of each other way on a GPU before it is timed, which load kernels and make libraries their workspaces.
WARM_UPS = 2

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Compilation:
    """What torch.compile made of a way, by itself, with nothing cached."""

    seconds: float  # by how much 1 + COMPILED_PLANS steps are longer than as many of the shortest of them
    graphs: int  # after so many plans


@dataclass(frozen=True)
class Figures:
    """What a training step costs by one way."""

    way: str
    setting: Setting
    seconds: tuple[float, ...]  # of each measured step
    layers_run: tuple[float, ...]  # in each; a layer that runs for half of the samples is half a layer
    saved_bytes: int  # held for backward, parameters left out, in the first turn
    peak_bytes: int  # the most that the step of the first turn held beyond what was there before it
    decision_s: float | None  # drawing the decisions of a step alone, median
    compilation: Compilation | None

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.setting.samples * self.setting.length / self.median_s

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def figures_of(record: dict[str, Any]) -> Figures:
    """What ``record()`` was made of."""
    compilation = record["compilation"]
    return Figures(
        **record
        | {
            "setting": Setting(**record["setting"]),
            "seconds": tuple(record["seconds"]),
            "layers_run": tuple(record["layers_run"]),
            "compilation": None if compilation is None else Compilation(**compilation),
        }
    )


def makers_of(granularity: str) -> Makers:
    """Every way that there is at a granularity."""
    return {name: WAYS[name][1] for name in BY_GRANULARITY[granularity]}


def measure(
    setting: Setting,
    makers: Makers | None = None,
    *,
    rounds: int = ROUNDS,
    draws: int = DRAWS,
    compilations: bool = True,
    tell: Tell | None = None,
) -> dict[str, Figures]:
    """Measures one training step by every way.

    The ways take turns, and each turn begins with another (A B C, B C A, ...), so that what the machine does meets all
    of them; each turn has a plan of its own. In a turn a way runs two steps, of which the second is timed. Nothing is
    timed before every way has shown that it computes its rule.

    Args:
        makers: what makes the ways, by name; None: all that there are at the setting's granularity.
        rounds: measured steps of each way.
        draws: measured decisions of each way.
        compilations: where the setting is compiled, also measure each way's compilation, by itself.
        tell: called as (done, total, what comes next); what it raises ends the measuring.

    Returns:
        Figures of every way, by name.

    Raises:
        Disagreement: a way does not compute what its rule says.
    """
    contest = Contest(setting, makers_of(setting.granularity) if makers is None else makers)
    return measure_together([contest], rounds=rounds, draws=draws, compilations=compilations, tell=tell)[0]


def measure_together(
    contests: Sequence[Contest],
    *,
    rounds: int = ROUNDS,
    draws: int = DRAWS,
    compilations: bool = True,
    tell: Tell | None = None,
) -> list[dict[str, Figures]]:
    """As ``measure``, the ways of several contests in turns with each other."""
    check_count(rounds, "rounds", 1)
    check_count(draws, "draws", 1)
    pairs = [_Measured(contest, name) for contest in contests for name in contest.ways]
    compiled = [pair for pair in pairs if pair.setting.compiled]
    tasks: list[tuple[str, Callable[[], object]]] = []
    tasks += [(f"correctness, {pair.name}", pair.check) for pair in pairs]
    tasks += [("optimizer", contest.fill_optimizer) for contest in contests]
    if compilations:
        tasks += [(f"compiling {pair.name}", pair.measure_compilation) for pair in compiled]
    tasks += [("compiling", torch.compiler.reset)] if compiled else []
    for turn in range(rounds, rounds + 1 + COMPILED_PLANS):
        tasks += [(f"compiling {pair.name}", partial(pair.step, turn)) for pair in compiled]
    for turn in range(rounds, rounds + WARM_UPS):
        tasks += [(f"warm-up, {pair.name}", partial(pair.step, turn)) for pair in pairs if pair.warms_up]
    tasks += [(f"memory, {pair.name}", pair.measure_memory) for pair in pairs]
    order = list(pairs)
    for turn in range(rounds):
        order.append(order.pop(0))
        tasks += [(f"step {turn + 1} of {rounds}, {pair.name}", partial(pair.measure_step, turn)) for pair in order]
    tasks += [(f"decisions, {pair.name}", partial(pair.measure_decision, draws)) for pair in pairs]
    with _compiler() if compiled else nullcontext(), _little_garbage():
        for done, (what, task) in enumerate(tasks):
            if tell is not None:
                tell(done, len(tasks), what)
            task()
    if tell is not None:
        tell(len(tasks), len(tasks), "done")
    return [{pair.name: pair.figures() for pair in pairs if pair.contest is contest} for contest in contests]


class _Measured:
    """One way of a contest, and what was measured of it so far."""

    def __init__(self, contest: Contest, name: str) -> None:
        self.contest, self.name, self.setting = contest, name, contest.setting
        self.seconds: list[float] = []
        self.saved_bytes = self.peak_bytes = 0
        self.decision_s: float | None = None
        self.compilation: Compilation | None = None
        # A compiled way runs several steps to compile.
        self.warms_up = self.setting.device != "cpu" and not self.setting.compiled

    def check(self) -> None:
        self.contest.check(self.name)

    def step(self, turn: int) -> float:
        """Seconds of a step with the plan of a turn."""
        self.contest.ways[self.name].follow(self.setting.plan(turn))
        gc.collect()
        return self.contest.seconds(self.name)

    def measure_step(self, turn: int) -> None:
        # In training a step follows its like. The first one of a turn finds memory and caches as another way left them.
        self.step(turn)
        self.seconds.append(self.step(turn))

    def measure_memory(self) -> None:
        """Of turn 0: of a forward, and of a whole step, which warms up what is timed later."""
        contest, way = self.contest, self.contest.ways[self.name]
        for measure_it in (self._saved, self._peak):
            way.follow(self.setting.plan(0))
            contest.zero_grad()
            measure_it(way)
        contest.zero_grad()

    def _saved(self, way: Way) -> None:
        self.saved_bytes = saved_bytes(way, self.contest.x)

    def _peak(self, way: Way) -> None:
        self.peak_bytes = peak_of(partial(self.contest.step, self.name), self.contest.x.device)

    def measure_decision(self, draws: int) -> None:
        way, x, times = self.contest.ways[self.name], self.contest.x.detach(), []
        way.follow(None)
        if way.decide(0, x) is None:
            return
        for turn in range(draws):
            start = time.perf_counter()
            way.decide(turn, x)
            self.contest.synchronise()
            times.append(time.perf_counter() - start)
        self.decision_s = median(times)

    def measure_compilation(self) -> None:
        import torch._inductor.config
        from torch._dynamo.utils import counters

        torch.compiler.reset()
        counters.clear()
        with torch._inductor.config.patch(force_disable_caches=True):
            times = [self.step(turn) for turn in range(1 + COMPILED_PLANS)]
        # What later plans compile counts too.
        self.compilation = Compilation(sum(times) - len(times) * min(times), counters["stats"]["unique_graphs"])

    def figures(self) -> Figures:
        turns = range(len(self.seconds))
        return Figures(
            way=self.name,
            setting=self.setting,
            seconds=tuple(self.seconds),
            layers_run=tuple(self.contest.layers_run(self.name, turn) for turn in turns),
            saved_bytes=self.saved_bytes,
            peak_bytes=self.peak_bytes,
            decision_s=self.decision_s,
            compilation=self.compilation,
        )


@contextmanager
def _little_garbage() -> Iterator[None]:
    """The collections before each step look at new objects alone: those of torch and 40 layers take 0.2 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _compiler() -> Iterator[None]:
    """What is compiled anew for ever is an error, not a slow way; nothing compiled is left."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        try:
            yield
        finally:
            torch.compiler.reset()
