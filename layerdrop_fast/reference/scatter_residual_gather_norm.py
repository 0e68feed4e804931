"""scatter_residual_gather_norm: add this branch's output, then normalise for the next kept branch."""

from typing import Any

import torch
from torch import Tensor

from layerdrop_fast.reference.gather_norm import gather_norm, norm_gradient
from layerdrop_fast.reference.rows import put, take
from layerdrop_fast.reference.scatter_residual import scatter_residual, scatter_residual_bwd


def scatter_residual_gather_norm(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None,
    next_rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gather_norm`` of ``scatter_residual``, and the stream between them."""
    x_out = scatter_residual(x, y, rows, scale, dropout_p, key, site)
    return x_out, *gather_norm(x_out, next_rows, rms, eps)


def scatter_residual_gather_norm_(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """``x, xhat, rstd = scatter_residual_gather_norm(x, y, ...)``."""
    x_out, xhat, rstd = scatter_residual_gather_norm(x, y, *others)
    x.copy_(x_out)
    return xhat, rstd


def scatter_residual_gather_norm_bwd(
    grad_x_out: Tensor,
    grad_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    next_rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``grad_x = grad_x_out``, ``grad_x[next_rows[n]] += the norm's gradient``; ``grad_y`` from ``grad_x``."""
    grad = take(grad_x_out, next_rows).to(rstd.dtype) + norm_gradient(grad_xhat, xhat, rstd, rms)
    grad_x = put(grad_x_out, next_rows, grad.to(grad_x_out.dtype)).contiguous()
    return grad_x, scatter_residual_bwd(grad_x, rows, scale, dropout_p, key, site, dtype)


def scatter_residual_gather_norm_bwd_(grad_x: Tensor, grad_xhat: Tensor, *others: Any) -> Tensor:
    """``grad_x, grad_y = scatter_residual_gather_norm_bwd(grad_x, grad_xhat, ...)``."""
    grad_x_out, grad_y = scatter_residual_gather_norm_bwd(grad_x, grad_xhat, *others)
    grad_x.copy_(grad_x_out)
    return grad_y
