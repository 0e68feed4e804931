"""draw_plan and step_key as ops: the decisions of a step, drawn where its tensors are.

``layerdrop_fast.draw_plan`` is the same on the host, with Python integers.
"""

import torch
from torch import Tensor

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.plan import SAMPLINGS
from layerdrop_fast.reference.draw_plan import draw_plan as reference_draw_plan
from layerdrop_fast.reference.draw_plan import draw_plan_ as reference_draw_plan_
from layerdrop_fast.reference.philox import step_key as reference_step_key

_ops = torch.ops.layerdrop_fast


def step_key(counters: Tensor) -> Tensor:
    """The key that every mask of a step is drawn with: ``Philox4x32-10(key=seed, counter=(step, stream))``.

    Shapes:
        counters: int64 [3] -> int32 [4]

    Args:
        counters: (seed, step, stream), the 64 bits of each.

    Returns:
        The bits of K[0..3], on the device of ``counters``.

    Raises:
        TypeError: another dtype. ValueError: another shape.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A pure function of its argument.
    """
    _check_counters(counters)
    return _ops.step_key(counters)  # type: ignore[no-any-return]


def draw_plan(
    counters: Tensor,
    rates: Tensor,
    batch_size: int | None = None,
    *,
    sampling: str = "bernoulli",
    min_kept: int = 0,
    advance: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All drop decisions of a step as tensors, on the device of ``counters``; the bits of ``layerdrop_fast.draw_plan``.

    The counters are read where they are, when the plan is drawn: a CUDA graph that was captured with ``advance=True``
    draws the plan of the next step at every replay.

    Shapes:
        counters: int64 [3]; rates: float64 [L]
        -> keep: bool [L, B]; rows: int32 [L, B]; slot: int32 [L, B]; kept: int64 [L]; B = 1 at batch granularity

    Args:
        counters: (seed, step, stream), the 64 bits of each.
        rates: drop rates in [0, 1]. Only on the CPU can a wrong one be told without waiting for a device; on a GPU one
            below 0 counts as 0, one above 1 or NaN as 1.
        batch_size: B, or None for batch granularity.
        sampling, min_kept: as in ``layerdrop_fast.draw_plan``.
        advance: add 1 to the step in ``counters`` once the plan is drawn; past 2**64 - 1 it is 0.

    Returns:
        keep; rows, the kept samples of each layer, ascending, padded with -1; slot, a sample's place in rows, or -1;
        kept, how many samples each layer keeps.

    Raises:
        TypeError: another dtype. ValueError: a shape, device, name or number is wrong; on the CPU also a rate.

    Source and randomness: as ``layerdrop_fast.draw_plan``.
    """
    _check_counters(counters)
    _checks.check_tensor("rates", rates, torch.float64)
    _checks.check_device("rates", rates, counters)
    if rates.dim() != 1:
        raise ValueError(f"rates: got {list(rates.shape)}, expected [L]")
    if _checks.readable(rates):
        for layer, rate in enumerate(rates.tolist()):
            if not 0 <= rate <= 1:
                raise ValueError(f"rates: got {rate} for layer {layer}, expected a number in [0, 1]")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling: got {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
    if batch_size is not None and not 1 <= batch_size < 1 << 31:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 to 2**31 - 1, or None for batch granularity")
    units = rates.shape[0] if batch_size is None else batch_size
    if not 0 <= min_kept <= units:
        raise ValueError(f"min_kept: got {min_kept}, expected 0 to {units}")
    if advance and not counters.is_contiguous():
        raise ValueError(f"counters: got strides {list(counters.stride())} for [3], expected contiguous to advance")
    draw = _ops.draw_plan_ if advance else _ops.draw_plan
    return draw(counters, rates, batch_size, sampling == "systematic", min_kept)  # type: ignore[no-any-return]


def _check_counters(counters: Tensor) -> None:
    _checks.check_tensor("counters", counters, torch.int64)
    _checks.check_shape("counters", counters, [3])


def _fake_step_key(counters: Tensor) -> Tensor:
    return counters.new_empty(4, dtype=torch.int32)


def _fake_draw_plan(
    counters: Tensor, rates: Tensor, batch_size: int | None, systematic: bool, min_kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (rates.shape[0], 1 if batch_size is None else batch_size)
    keep, rows, slot = (rates.new_empty(shape, dtype=dtype) for dtype in (torch.bool, torch.int32, torch.int32))
    return keep, rows, slot, rates.new_empty(shape[0], dtype=torch.int64)


implement("step_key", reference=reference_step_key, fake=_fake_step_key)
implement("draw_plan", reference=reference_draw_plan, fake=_fake_draw_plan)
implement("draw_plan_", reference=reference_draw_plan_, fake=_fake_draw_plan)
