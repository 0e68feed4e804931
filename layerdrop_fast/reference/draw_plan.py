"""The plan of a step: which layers and samples are kept (DropPlan explains what each tensor means).

Decisions are drawn group by group. At batch granularity all layers form one group of L units, each with a rate of its
own; at sample granularity each layer is a group of B units with one rate. A unit's threshold is
``t = round((1 - p) * 2**32)``, so that every marginal is the exact fraction ``t / 2**32``.
"""

import torch
from torch import Tensor

from layerdrop_fast.reference.philox import (
    MASK32,
    SITE_KEEP,
    SITE_PERMUTATION,
    SITE_START,
    random_bits,
    step_key,
)


def draw_plan(
    counters: Tensor,  # int64 [3]: seed, step, stream
    rates: Tensor,  # float64 [L], drop rates in [0, 1]
    batch_size: int | None,  # B, or None for batch granularity
    systematic: bool,
    min_kept: int,  # 0 to the number of units in a group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # keep bool [L, B], rows int32 [L, B], slot int32 [L, B], kept int64 [L]
    num_layers, device = rates.numel(), rates.device
    grouped = (1, num_layers) if batch_size is None else (num_layers, batch_size)
    thresholds = torch.round((1.0 - rates) * 2.0**32).to(torch.int64)
    thresholds = thresholds[None, :] if batch_size is None else thresholds[:, None].expand(grouped)

    key = step_key(counters)
    draw = systematic_units if systematic else bernoulli_units
    keep, priority = draw(key, thresholds)
    keep = keep | (rank(torch.where(keep, -1, priority)) < min_kept)

    keep = keep.view(num_layers, 1 if batch_size is None else batch_size)
    place = torch.arange(keep.shape[1], device=device)
    kept = keep.sum(dim=1)
    rows = torch.argsort(~keep, dim=1, stable=True).where(place < kept[:, None], -1)
    slot = (keep.cumsum(dim=1) - 1).where(keep, -1)
    return keep, rows.to(torch.int32), slot.to(torch.int32), kept


def draw_plan_(
    counters: Tensor,  # int64 [3]: seed, step, stream; the step becomes the next one
    rates: Tensor,
    batch_size: int | None,
    systematic: bool,
    min_kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = draw_plan(counters, rates, batch_size, systematic, min_kept)
    counters[1] += 1  # int64 wraps as the 64 bits of the step do
    return plan


def bernoulli_units(key: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit alone: kept iff its u32 < t. Priority is how far a unit was from being kept."""
    bits = unit_bits(key, SITE_KEEP, thresholds.shape)
    return bits < thresholds, bits - thresholds


def systematic_units(key: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic sampling (Madow 1949): lay the units end to end in random order, keep those that a comb with teeth
    at start, start + 2**32, ... hits. Priority is a unit's place in that order."""
    order = rank(unit_bits(key, SITE_PERMUTATION, thresholds.shape))
    ends = torch.zeros_like(thresholds).scatter(1, order, thresholds).cumsum(dim=1)  # [G, U], in random order
    start = unit_bits(key, SITE_START, (thresholds.shape[0], 1))
    teeth = (ends + MASK32 - start) >> 32  # how many teeth lie before each end
    hit = teeth.diff(dim=1, prepend=torch.zeros_like(start)) > 0
    return hit.gather(1, order), order


def unit_bits(key: Tensor, site: int, shape: tuple[int, ...]) -> Tensor:
    """The u32 of every unit, int64 [G, U]; units are numbered through all groups."""
    elements = torch.arange(shape[0] * shape[1], device=key.device).view(shape)
    return random_bits(key, torch.tensor(site, dtype=torch.int32, device=key.device), elements)


def rank(values: Tensor) -> Tensor:
    """Each unit's place in its group when sorted by value, equal values by index (2**-32 a pair)."""
    return torch.argsort(torch.argsort(values, dim=1, stable=True), dim=1)
