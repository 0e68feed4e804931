"""Dropout whose mask is a function of integers: which step, which site, which element."""

import torch
from torch import Tensor

from layerdrop_fast.reference.philox import random_bits


def keep_mask(shape: torch.Size, rows: Tensor | None, p: float, key: Tensor, site: Tensor) -> Tensor:
    """Which elements dropout keeps.

    Element (sample, position, channel) has the number ``(sample * S + position) * D + channel`` of the full tensor,
    so a sample has the same mask in a subset of the batch as in the whole batch. It is kept iff its
    u32 < round((1 - p) * 2^32), rounding halves to even: never at p = 1, always at p = 0.

    Shapes:
        shape: (K, ..., D); rows: int32 [K] or None; key: int32 [4]; site: int32 [] -> bool [K, ..., D]
    """
    sample = torch.arange(shape[0], device=key.device) if rows is None else rows.long().clamp(min=0)
    inner = torch.arange(shape[1:].numel(), device=key.device)
    element = (sample[:, None] * inner.numel() + inner).view(shape)
    return random_bits(key, site, element) < round((1 - p) * 2**32)


def dropout(values: Tensor, rows: Tensor | None, p: float, key: Tensor | None, site: Tensor | None) -> Tensor:
    """``values / (1 - p)`` where the mask keeps, 0 elsewhere; a linear map and so its own backward."""
    if key is None or site is None or p == 0:
        return values
    mask = keep_mask(values.shape, rows, p, key, site)
    return torch.where(mask, values * (1 / (1 - p) if p < 1 else 0), 0)
