"""How likely a layer is to be dropped: a depth profile times a multiplier over time.

    p_l(t) = depth_l * time(t)

A depth profile says how the drop rate is spread over the layers, a time multiplier in [0, 1] how it changes from step
to step. Layers l and steps t count from 0. Every profile and multiplier is one small frozen class, so that it compares,
prints and pickles as what it says: ``DropSchedule(24, linear(0.5), decreasing(100_000))``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from layerdrop_fast._checks import check_count, check_rate

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Depth(ABC):
    """A depth profile: called with the number of layers, returns their drop rates, float64 [L]."""

    @abstractmethod
    def __call__(self, num_layers: int) -> FloatArray: ...


class Time(ABC):
    """A time multiplier: called with the step, returns a number in [0, 1] that multiplies every drop rate."""

    @abstractmethod
    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class uniform(Depth):
    """The same drop rate for every layer, ``p_l = p`` (LayerDrop; Fan, Grave, Joulin 2019, section 3.2)."""

    p: float

    def __post_init__(self) -> None:
        check_rate(self.p, "uniform drop rate p")

    def __call__(self, num_layers: int) -> FloatArray:
        return np.full(num_layers, self.p, dtype=np.float64)


@dataclass(frozen=True)
class linear(Depth):
    """Deeper layers drop more, ``p_l = l / (L - 1) * p_max``; one layer alone has ``p_max``.

    The mean rate is p_max / 2. Stochastic depth's linear decay (Huang et al. 2016, section 3) and the "ILD" profile of
    "Don't Drop Dropout" (arXiv 2609.05275) differ only in where they start to count; this is the latter.
    """

    p_max: float

    def __post_init__(self) -> None:
        check_rate(self.p_max, "linear drop rate p_max")

    def __call__(self, num_layers: int) -> FloatArray:
        if num_layers == 1:
            return np.array([self.p_max], dtype=np.float64)
        return np.arange(num_layers, dtype=np.float64) / (num_layers - 1) * self.p_max


@dataclass(frozen=True)
class alternating(Depth):
    """Every second layer drops, ``p_l = p_max`` for odd l, else 0 ("ALD", arXiv 2609.05275)."""

    p_max: float

    def __post_init__(self) -> None:
        check_rate(self.p_max, "alternating drop rate p_max")

    def __call__(self, num_layers: int) -> FloatArray:
        rates = np.zeros(num_layers, dtype=np.float64)
        rates[1::2] = self.p_max
        return rates


@dataclass(frozen=True)
class per_layer(Depth):
    """A drop rate of its own for each layer, ``p_l = rates[l]``."""

    rates: tuple[float, ...]

    def __init__(self, rates: Sequence[float]) -> None:
        named = (check_rate(rate, f"drop rate of layer {layer}") for layer, rate in enumerate(rates))
        object.__setattr__(self, "rates", tuple(named))

    def __call__(self, num_layers: int) -> FloatArray:
        if len(self.rates) != num_layers:
            raise ValueError(f"per_layer got {len(self.rates)} drop rates, expected {num_layers}, one a layer")
        return np.array(self.rates, dtype=np.float64)


@dataclass(frozen=True)
class constant(Time):
    """No change over time, ``time(t) = 1`` (LayerDrop; Fan, Grave, Joulin 2019)."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class decreasing(Time):
    """Less dropping as training goes on, ``time(t) = 1 - t / (total - 1)``, 0 from the last step on.

    "DTS" of "Don't Drop Dropout" (arXiv 2609.05275). ``total`` is the number of steps; ``total = 1`` gives 1.
    """

    total: int

    def __post_init__(self) -> None:
        check_count(self.total, "decreasing total", 1)

    def __call__(self, step: int) -> float:
        return 1.0 if self.total == 1 else 1.0 - min(step, self.total - 1) / (self.total - 1)


@dataclass(frozen=True)
class increasing(Time):
    """More dropping as training goes on, ``time(t) = t / (total - 1)``, 1 from the last step on.

    The counterpart that arXiv 2609.05275 compares "DTS" with. ``total = 1`` gives 1.
    """

    total: int

    def __post_init__(self) -> None:
        check_count(self.total, "increasing total", 1)

    def __call__(self, step: int) -> float:
        return 1.0 if self.total == 1 else min(step, self.total - 1) / (self.total - 1)


@dataclass(frozen=True)
class progressive(Time):
    """Progressive Layer Dropping, ``time(t) = 1 - theta(t)`` with ``theta(t) = (1 - theta) exp(-gamma t) + theta``.

    Zhang & He, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping" (NeurIPS
    2020), section 4; theta = 0.5 and gamma = 0.001 are DeepSpeed's defaults. theta(t) is the keep rate, so that
    ``DropSchedule(L, linear(1.0), progressive())`` drops nothing at first and 1 - theta of the deepest layer at last.
    """

    theta: float = 0.5
    gamma: float = 0.001

    def __post_init__(self) -> None:
        check_rate(self.theta, "progressive theta")
        if not 0.0 <= self.gamma < math.inf:
            raise ValueError(f"progressive gamma must be finite and at least 0, got {self.gamma}")

    def __call__(self, step: int) -> float:
        return 1.0 - ((1.0 - self.theta) * math.exp(-self.gamma * step) + self.theta)


@dataclass(frozen=True)
class warmup(Time):
    """A linear ramp to the full rate, ``time(t) = (t + 1) / steps``, 1 from step ``steps - 1`` on.

    As a learning-rate warm-up counts; ``warmup(1)`` is ``constant()``. Composer's ``drop_warmup`` has the same purpose.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count(self.steps, "warmup steps", 1)

    def __call__(self, step: int) -> float:
        return min(step + 1, self.steps) / self.steps


@dataclass(frozen=True)
class DropSchedule:
    """The drop rate of every layer at every step, ``p_l(t) = depth_l * time(t)``.

    Shapes:
        schedule(step) -> float64 [num_layers], in [0, 1]

    Args:
        num_layers: how many layers decide, at least 1.
        depth: ``uniform(p)``, ``linear(p_max)``, ``alternating(p_max)`` or ``per_layer([...])``.
        time: ``constant()``, ``decreasing(total)``, ``increasing(total)``, ``progressive(theta, gamma)`` or
            ``warmup(steps)``.

    Raises:
        ValueError: a rate outside [0, 1] or NaN, a wrong number of rates, a negative step.
        TypeError: something that is no number or no profile.
    """

    num_layers: int
    depth: Depth
    time: Time = constant()
    depth_rates: FloatArray = field(init=False, repr=False, compare=False)  # depth(num_layers), read-only

    def __post_init__(self) -> None:
        check_count(self.num_layers, "num_layers", 1)
        for name, value, expected in (("depth", self.depth, Depth), ("time", self.time, Time)):
            if not isinstance(value, expected):
                raise TypeError(
                    f"{name} must be a {expected.__name__} such as {_EXAMPLES[expected]}, "
                    f"got {value!r} of type {type(value).__name__}"
                )
        rates = np.array(self.depth(self.num_layers), dtype=np.float64)
        if rates.shape != (self.num_layers,):
            raise ValueError(f"depth profile gave rates of shape {list(rates.shape)}, expected [{self.num_layers}]")
        for layer, rate in enumerate(rates):
            check_rate(rate, f"drop rate of layer {layer}")
        rates.setflags(write=False)
        object.__setattr__(self, "depth_rates", rates)

    def __call__(self, step: int) -> FloatArray:
        """The drop rates of step ``step`` (0-based), float64 [num_layers]."""
        return self.depth_rates * self.time(check_count(step, "step", 0))

    @classmethod
    def of(cls, schedule: float | Sequence[float] | Depth | DropSchedule, num_layers: int) -> DropSchedule:
        """What ``schedule=`` accepts everywhere: one rate, one a layer, a profile, or a DropSchedule of that depth."""
        if isinstance(schedule, DropSchedule):
            if schedule.num_layers != num_layers:
                raise ValueError(f"schedule is for {schedule.num_layers} layers, expected {num_layers}")
            return schedule
        if isinstance(schedule, Depth):
            return cls(num_layers, schedule)
        if np.ndim(schedule) == 0:
            return cls(num_layers, uniform(check_rate(schedule, "drop rate")))  # type: ignore[arg-type]
        return cls(num_layers, per_layer(schedule))  # type: ignore[arg-type]


_EXAMPLES = {Depth: "uniform(0.2)", Time: "decreasing(1000)"}


def optimal_drop_rate(num_groups: int, kept: float) -> float:
    """The drop rate whose expected number of active groups is the size that you will prune to, ``p* = 1 - r / N``.

    Args:
        num_groups: N, the number of groups (layers) that are dropped independently, at least 1.
        kept: r, the number of groups of the pruned network, in [0, N].

    Returns:
        p*, in [0, 1].

    Raises:
        ValueError: r outside [0, N].

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3. The paper itself trains with 0.2 throughout and
    recommends 0.5 for very small inference models.
    """
    check_count(num_groups, "num_groups", 1)
    if not 0 <= kept <= num_groups:
        raise ValueError(f"kept must lie in [0, {num_groups}], got {kept}")
    return 1.0 - kept / num_groups
