"""Rows of a batch: which samples take part, and what is left of the others."""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on ``dtype`` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def clear_spare(values: Tensor, rows: Tensor | None) -> Tensor:
    """``values [K, ...]`` with 0 in the place of spare rows."""
    if rows is None:
        return values
    return values.masked_fill((rows < 0).view(-1, *[1] * (values.dim() - 1)), 0)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """``x[rows[k]]``; 0 for a spare row."""
    if rows is None:
        return x
    if x.shape[0] == 0:  # all rows are spare
        return x.new_zeros(rows.shape[0], *x.shape[1:])
    return clear_spare(x.index_select(0, rows.clamp(min=0)), rows)


def put(x: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    """``x`` with ``values[k]`` in place of row ``rows[k]``; a spare row replaces nothing."""
    if rows is None:
        return values
    batch = x.shape[0]
    source = torch.arange(batch + 1, device=x.device)  # index -1, a spare row, is the last and surplus entry
    source[rows.long()] = batch + torch.arange(rows.shape[0], device=x.device)
    return torch.cat([x, values]).index_select(0, source[:batch])
