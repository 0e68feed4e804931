"""The tensors of a forward of a TransformerStack: rows, residual scales, and where masks come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from layerdrop_fast import ops
from layerdrop_fast.nn import distributed
from layerdrop_fast.nn.attention import Attend, KVCache
from layerdrop_fast.nn.packed import Packed
from layerdrop_fast.nn.parts import part_blocks
from layerdrop_fast.nn.residual import Step
from layerdrop_fast.nn.transformer_layer import SITES_PER_BRANCH
from layerdrop_fast.nn.turn import Kept, Turn
from layerdrop_fast.plan import DropPlan, to_device

if TYPE_CHECKING:
    from layerdrop_fast.nn.transformer_stack import TransformerStack


@dataclass(frozen=True)
class Inputs:
    """What a forward is given besides the stream, as the layers take it."""

    memory: Tensor | None
    attend: Attend
    memory_attend: Attend
    packed: Packed | None
    cache: KVCache | None
    steps: dict[int, Step]  # of every kept branch, numbered through the stack


def steps_of(stack: TransformerStack, x: Tensor, turn: Turn, packed: Packed | None) -> dict[int, Step]:
    """How every kept branch runs: the tensors of a forward, made before its first layer."""
    branches, per_unit = stack._branches, stack._branches // stack.units_per_layer
    layers: Sequence[Any] = stack.layers  # type: ignore[assignment]
    rates: list[float] = [layer.dropout if layer.training else 0.0 for layer in layers]
    key = sites = None
    if turn.plan is not None and any(layer.dropout or layer.activation_dropout for layer in layers):
        key, sites = _key(turn.plan, x.device), sites_of(stack, x.device)
    scales: Sequence[Tensor | None] = [None] * len(turn.kept)
    # In a compiled region always a tensor: a plan whose scales happen to be 1 is not compiled anew.
    if any(unit.scale != 1 for unit in turn.kept) or (stack.always_rows and stack.scale != "none"):
        dtype = np.float64 if x.dtype == torch.float64 else np.float32
        scales = to_device(np.array([unit.scale for unit in turn.kept], dtype=dtype), x.device).unbind()
    steps = {}
    for unit, scale in zip(turn.kept, scales, strict=True):
        rows, samples, numbers = unit.rows, None, None
        if packed is not None:
            rows, samples, numbers = _packed_rows(unit, turn, packed, key is not None, x.device)
        for branch in range(unit.unit * per_unit, (unit.unit + 1) * per_unit):
            site, inner = (None, None) if sites is None else sites[branch]
            layer = branch // branches
            rate = 0.0 if key is None else rates[layer]
            steps[branch] = Step(rows, samples, scale, rate, key, site, inner, numbers, layers[layer].training)
    _add_parts(stack, turn, steps, x.device)
    return steps


def _add_parts(stack: TransformerStack, turn: Turn, steps: dict[int, Step], device: torch.device) -> None:
    """Of branches that run in parts, which; one that keeps none does not run."""
    found = []
    for unit in turn.kept:
        for place, parts in enumerate(unit.parts):
            branch = unit.unit * len(unit.parts) + place
            if parts is not None and not parts.kept:
                del steps[branch]
            elif parts is not None and not parts.is_whole:
                layer, number = divmod(branch, stack._branches)
                found.append((branch, (stack.layers[layer], number, parts)))
    if found:
        blocks = part_blocks([kept for _, kept in found], device)
        steps.update(
            (branch, steps[branch]._replace(parts=part)) for (branch, _), part in zip(found, blocks, strict=True)
        )


def _packed_rows(
    unit: Kept, turn: Turn, packed: Packed, masked: bool, device: torch.device
) -> tuple[Tensor | None, list[int] | None, Tensor | None]:
    """The tokens of the kept sequences, those sequences, and what numbers the tokens' masks."""
    if unit.rows is None:
        numbers = to_device(packed.tokens_of(range(packed.batch))[1], device) if masked else None
        return None, None, numbers
    assert turn.plan is not None
    samples = turn.plan.kept_samples(unit.unit)
    places, padded = packed.tokens_of(samples)
    return to_device(places, device), samples, to_device(padded, device) if masked else None


def _key(plan: DropPlan, device: torch.device) -> Tensor:
    microbatch = plan.stream & 0xFFFFFFFF
    counters = np.array([plan.seed, plan.step, distributed.rank() << 32 | microbatch], dtype=np.uint64)
    return ops.step_key(to_device(counters.view(np.int64), device))


def sites_of(stack: TransformerStack, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The two sites of every branch, int32 []: behind it and inside it."""
    behind, inside = site_table(stack, device).t()
    return list(zip(behind.unbind(), inside.unbind(), strict=True))


def site_table(stack: TransformerStack, device: torch.device) -> Tensor:
    """The sites of every branch, int32 [L * branches, 2]; made once."""
    branches = len(stack.layers) * stack._branches
    known = stack._known_sites
    if known is None or (known.device, len(known)) != (device, branches):
        with torch.inference_mode(False):
            sites = torch.arange(SITES_PER_BRANCH * branches, dtype=torch.int32, device=device)
            known = stack._known_sites = (sites + ops.FIRST_DROPOUT_SITE).view(-1, SITES_PER_BRANCH)
    return known
