"""scatter_residual: a branch's output added to the samples that ran it."""

from typing import Any

import torch
from torch import Tensor

from layerdrop_fast.reference.dropout import dropout
from layerdrop_fast.reference.rows import accumulator, put, take


def scatter_residual(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> Tensor:
    """``x' = x``, ``x'[rows[k]] += scale * dropout(y[k])``."""
    wide = accumulator(x.dtype)
    branch = dropout(y.to(wide), rows, dropout_p, key, site)
    if scale is not None:
        branch = branch * scale
    return put(x, rows, (take(x, rows).to(wide) + branch).to(x.dtype)).contiguous()


def scatter_residual_(x: Tensor, y: Tensor, *others: Any) -> None:
    """``x = scatter_residual(x, y, ...)``."""
    x.copy_(scatter_residual(x, y, *others))


def scatter_residual_bwd(
    grad_out: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``grad_y[k] = scale * dropout(grad_out[rows[k]])``; the gradient of x is grad_out itself."""
    grad = dropout(take(grad_out, rows).to(accumulator(grad_out.dtype)), rows, dropout_p, key, site)
    if scale is not None:
        grad = grad * scale
    return grad.to(dtype, copy=True).contiguous()
