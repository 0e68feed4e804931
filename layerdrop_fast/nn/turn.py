"""What one forward of a stack runs, and in which pieces, so that what it saves is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from layerdrop_fast.nn.parts import Parts
from layerdrop_fast.plan import DropPlan
from layerdrop_fast.schedule import FloatArray


class Kept(NamedTuple):
    """A unit of a plan that some sample keeps: a layer, or one branch of it."""

    unit: int
    rows: Tensor | None  # int32 [K], the samples that keep it, ascending; None: all
    num_rows: int  # K
    scale: float  # the residual scale
    parts: Sequence[Parts | None] = ()  # of each of its branches; None, or no entry: all of it


@dataclass(frozen=True)
class Turn:
    """One forward."""

    plan: DropPlan | None  # None in evaluation
    kept: list[Kept]  # ascending
    counts: bool  # whether it is a training forward, and not the recompute of one


def branch_shares(kept: Sequence[Kept], layers: int, branches: int, per_layer: int, batch: int) -> FloatArray:
    """How much of every branch runs, [layers, branches]: the share of samples, times that of its heads or chunks.

    Args:
        per_layer: units of a layer, 1 or its branches.
    """
    per_unit = branches // per_layer
    shares = np.zeros((layers * per_layer, per_unit))
    for unit in kept:
        parts = [1.0 if part is None else len(part.kept) / part.total for part in unit.parts or [None] * per_unit]
        shares[unit.unit] = np.multiply(parts, unit.num_rows / batch)
    return shares.reshape(layers, branches)


class Piece(NamedTuple):
    """Consecutive kept units, run together."""

    kept: Sequence[Kept]
    recomputed: bool  # saves its input only and runs again in backward


def pieces(kept: Sequence[Kept], bound: int | None) -> list[Piece]:
    """Splits a forward so that no more than ``bound`` rows of layers are ever held for backward.

    The last units that fit are run as usual. Those before them are recomputed in backward, in pieces that fit, so that
    they hold a copy of the stream each. A unit of more than ``bound`` rows stands alone.

    Args:
        kept: the units in order.
        bound: rows, summed over units; None: no bound.
    """
    if bound is None or sum(unit.num_rows for unit in kept) <= bound:
        return [Piece(kept, False)]
    found: list[list[Kept]] = [[]]
    room = bound
    for unit in reversed(kept):
        if found[-1] and unit.num_rows > room:
            found.append([])
            room = bound
        found[-1].append(unit)
        room -= unit.num_rows
    return [Piece(piece[::-1], recomputed=index < len(found) - 1) for index, piece in enumerate(reversed(found))]
