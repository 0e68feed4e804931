"""Every drop decision of a training step, drawn in one call.

A plan is a pure function of the integers (seed, step, stream) and the rates. It holds no random state, so a step can
be drawn beforehand, drawn again, or drawn on every rank, always with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerdrop_fast._checks import check_choice, check_integer, check_word
from layerdrop_fast._extension import planner
from layerdrop_fast.schedule import FloatArray

SAMPLINGS = ("bernoulli", "systematic")
KIND_BIT = 60  # of a stream: what a draw decides, where the decisions of a step are several draws


class DropPlan:
    """What ``draw_plan`` drew: which layers are kept, for which samples.

    Host answers (``layers``, ``kept_counts``, ``realized_rates``) never touch a device. Tensors are made when first
    asked for, on ``device``.

    Shapes:
        L layers, B samples (B = 1 at batch granularity), k_l kept samples of layer l.
    """

    __slots__ = ("_keep", "_tensors", "batch_size", "device", "sampling", "seed", "step", "stream")

    def __init__(
        self,
        keep: npt.NDArray[np.bool_],
        *,
        batch_size: int | None,
        seed: int,
        step: int,
        stream: int,
        sampling: str,
        device: torch.device | str,
    ) -> None:
        self._keep = keep
        self._tensors: dict[str, Any] = {}
        self.batch_size = batch_size
        self.seed = seed
        self.step = step
        self.stream = stream
        self.sampling = sampling
        self.device = device

    @property
    def layers(self) -> list[int]:
        """The layers kept for any sample, ascending."""
        return planner.kept_layers(self._keep)  # type: ignore[no-any-return]

    @property
    def kept_counts(self) -> list[int]:
        """The number of kept samples of each layer, k_l, on the host."""
        return self._keep.sum(axis=1).tolist()  # type: ignore[no-any-return]

    @property
    def realized_rates(self) -> FloatArray:
        """The share of samples that each layer drops in this plan, ``1 - k_l / B``, float64 [L]."""
        return 1.0 - self._keep.mean(axis=1, dtype=np.float64)  # type: ignore[no-any-return]

    @property
    def keep(self) -> Tensor:
        """bool [L, B]: whether layer l is kept for sample b."""
        return self._tensor("keep", self._keep.copy)

    @property
    def kept(self) -> Tensor:
        """int64 [L]: the number of kept samples of each layer."""
        return self._tensor("kept", lambda: self._keep.sum(axis=1, dtype=np.int64))

    @property
    def slot(self) -> Tensor:
        """int32 [L, B]: a sample's place among the kept ones of its layer, or -1."""
        return self._tensor("slot", lambda: planner.compact_slot(self._keep))

    def rows(self, layer: int) -> Tensor:
        """int32 [k_l]: the indices of the kept samples of a layer, ascending."""
        if "rows" not in self._tensors:
            rows, counts = planner.compact_rows(self._keep)
            self._tensors["rows"] = to_device(rows, self.device), counts.tolist()
        padded, kept = self._tensors["rows"]
        return padded[layer, : kept[layer]]  # type: ignore[no-any-return]

    def kept_samples(self, layer: int) -> list[int]:
        """``rows`` on the host."""
        return np.flatnonzero(self._keep[layer]).tolist()  # type: ignore[no-any-return]

    def to(self, device: torch.device | str) -> DropPlan:
        """The same plan with its tensors on another device."""
        integers = {name: getattr(self, name) for name in ("batch_size", "seed", "step", "stream", "sampling")}
        return DropPlan(self._keep, **integers, device=device)

    def _tensor(self, name: str, make: Any) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = to_device(make(), self.device)
        return self._tensors[name]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        units = "x".join(map(str, self._keep.shape))
        return (
            f"DropPlan({self._keep.sum()} of {units} kept, sampling={self.sampling!r}, "
            f"seed={self.seed}, step={self.step}, stream={self.stream})"
        )


def draw_plan(
    rates: FloatArray | Sequence[float] | Tensor,
    batch_size: int | None = None,
    *,
    seed: int,
    step: int,
    stream: int = 0,
    sampling: str = "bernoulli",
    min_kept: int = 0,
    device: torch.device | str = "cpu",
) -> DropPlan:
    """Draws all drop decisions of a step.

    Layer l is kept with probability ``rho_l = 1 - rates[l]``: a unit with random word u (32 bits) is kept iff
    ``u < round(rho_l * 2**32)``.

    Args:
        rates: drop rates, [L], each in [0, 1], on the host.
        batch_size: None for batch granularity (one decision a layer, B = 1), else B for sample granularity (one a
            layer and sample).
        seed, step, stream: integers in [0, 2**64). The stream numbers what shares a step: ``rank << 32 | microbatch``.
        sampling: ``"bernoulli"``, independent decisions; or ``"systematic"`` (Madow 1949), a fixed number up to
            rounding, of the layers (batch granularity) or of each layer's samples (sample granularity). Either way
            every unit is kept with exactly its own probability.
        min_kept: at least so many layers (batch) or samples of each layer (sample) are kept: where fewer were drawn,
            dropped ones are added, of independent decisions those whose words came nearest to their thresholds, of
            systematic ones any, in random order. That raises the expected number of kept units by
            ``E[max(0, min_kept - K)]``, K being the number drawn; for ``min_kept=1`` and independent decisions this
            is the probability that everything is dropped, e.g. ``0.5**40 = 9e-13`` for 40 layers at rate 0.5, but
            0.25 for a batch of 2.
        device: where the plan's tensors go.

    Returns:
        A DropPlan.

    Raises:
        ValueError: a rate outside [0, 1], an unknown sampling, an integer out of range.
        TypeError: rates that are no vector of numbers, counters that are no integers.

    Randomness: a pure function of the arguments. Equal integers give equal bits on every machine; torch's and
    numpy's generators are neither read nor advanced.

    Source: Fan, Grave, Joulin 2019, section 3.2 (batch granularity); Huang et al. 2016 (one decision a sample).
    """
    if not isinstance(rates, np.ndarray) or rates.dtype != np.float64:
        rates = _as_rates(rates)
    if rates.ndim != 1:
        raise ValueError(f"rates have shape {list(rates.shape)}, expected [num_layers]")
    seed, step, stream = check_word(seed, "seed"), check_word(step, "step"), check_word(stream, "stream")
    check_choice(sampling, "sampling", SAMPLINGS)
    if batch_size is not None and not 1 <= check_integer(batch_size, "batch_size") < 1 << 31:
        raise ValueError(f"batch_size is {batch_size}, expected 1 to 2**31 - 1, or None for batch granularity")
    units = len(rates) if batch_size is None else batch_size
    if not 0 <= check_integer(min_kept, "min_kept") <= units:
        raise ValueError(f"min_kept is {min_kept}, expected 0 to {units}, the number of units that are drawn together")

    keep = planner.draw_keep(rates, batch_size, seed, step, stream, sampling == "systematic", min_kept)
    if keep is None:
        layer = next(layer for layer, rate in enumerate(rates) if not 0.0 <= rate <= 1.0)
        raise ValueError(f"drop rate of layer {layer} is {rates[layer]}, expected a number in [0, 1]")
    return DropPlan(keep, batch_size=batch_size, seed=seed, step=step, stream=stream, sampling=sampling, device=device)


def joined(plans: Iterable[DropPlan]) -> DropPlan:
    """Plans of one step as one: the decisions of each behind those of the one before. The stream is the first one's."""
    first, *others = plans
    if not others:
        return first
    integers = {name: getattr(first, name) for name in ("batch_size", "seed", "step", "stream", "sampling", "device")}
    return DropPlan(np.concatenate([first._keep, *(plan._keep for plan in others)]), **integers)


def _as_rates(rates: Any) -> FloatArray:
    if isinstance(rates, Tensor) and rates.device.type != "cpu":
        raise TypeError(f"rates are a tensor on {rates.device}, expected numbers on the host")
    try:
        return np.asarray(rates.detach() if isinstance(rates, Tensor) else rates, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"rates must be a vector of numbers, got {rates!r}") from None


def to_device(array: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """A host array on a device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
