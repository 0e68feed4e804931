"""scatter_residual_gather_norm: from one kept branch to the next in one pass over the stream."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.ops.scatter_residual import check_branch
from layerdrop_fast.reference import scatter_residual_gather_norm as reference
from layerdrop_fast.reference.rows import accumulator

_ops = torch.ops.layerdrop_fast


def scatter_residual_gather_norm(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    next_rows: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    site: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the stream, then normalise for the next kept branch.

    ``x' = scatter_residual(x, y, rows)``, ``xhat = gather_norm(x', next_rows)``. Saves xhat and 1/sqrt(...), never x
    or x'. Samples outside ``rows`` pass bit for bit, forward; those outside ``next_rows``, backward.

    Shapes:
        x: [B, ..., D] f64|f32|bf16|f16; y: [K, ..., D], any of these; rows: int32 [K]; next_rows: int32 [N]
        -> x' [B, ..., D], xhat [N, ..., D], dtype of x

    Args:
        x: the residual stream; not written.
        y: the branch's output for the samples in ``rows``.
        rows: the samples of this branch, as in ``scatter_residual``.
        next_rows: the samples of the next kept branch, as in ``gather_norm``; may be ``rows`` itself.
        scale, dropout_p, key, site: as in ``scatter_residual``.
        norm, eps: as in ``gather_norm``.

    Returns:
        (x', xhat).

    Raises:
        TypeError, ValueError: as ``scatter_residual`` and ``gather_norm``.

    Source and randomness contract: as ``scatter_residual`` and ``gather_norm``.
    """
    check_branch(x, y, rows)
    same_rows = next_rows is rows
    if not same_rows:
        _checks.check_rows("next_rows", next_rows, x, x.shape[0])
    _checks.check_dropout(dropout_p, key, site, x)
    rms = _checks.check_norm(norm, eps)
    scale_tensor = _checks.check_scale(scale, x)
    # Dynamo refuses a Function that gets the same tensor twice.
    x_out, xhat, _ = _ScatterResidualGatherNorm.apply(  # type: ignore[no-untyped-call]
        x, y, rows, None if same_rows else next_rows, same_rows, scale_tensor, dropout_p, key, site, rms, eps
    )
    return x_out, xhat


class _ScatterResidualGatherNorm(Function):
    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        rows: Tensor | None,
        next_rows: Tensor | None,
        same_rows: bool,
        scale: Tensor | None,
        dropout_p: float,
        key: Tensor | None,
        site: Tensor | None,
        rms: bool,
        eps: float,
    ) -> Any:
        following = rows if same_rows else next_rows
        return _ops.scatter_residual_gather_norm(x, y, rows, following, scale, dropout_p, key, site, rms, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, y, rows, next_rows, ctx.same_rows, scale, ctx.dropout_p, key, site, ctx.rms, _ = inputs
        _, xhat, rstd = output
        ctx.y_dtype = y.dtype
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(xhat, rstd, rows, next_rows, scale, key, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_out: Tensor, grad_xhat: Tensor, _: Tensor | None) -> Any:
        xhat, rstd, rows, next_rows, scale, key, site = ctx.saved_tensors
        following = rows if ctx.same_rows else next_rows
        if not ctx.needs_input_grad[1]:
            rows = torch.empty(0, dtype=torch.int32, device=xhat.device)  # no row of y, no work for it
        grad_x, grad_y = _ops.scatter_residual_gather_norm_bwd(
            grad_x_out,
            grad_xhat,
            xhat,
            rstd,
            rows,
            following,
            scale,
            ctx.dropout_p,
            key,
            site,
            ctx.rms,
            ctx.y_dtype,
        )
        need_x, need_y = ctx.needs_input_grad[:2]
        return grad_x if need_x else None, grad_y if need_y else None, *[None] * 9


def _fake_scatter_residual_gather_norm(
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
    following = x.shape[0] if next_rows is None else next_rows.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(following, *x.shape[1:]),
        x.new_empty(following, *x.shape[1:-1], dtype=accumulator(x.dtype)),
    )


def _fake_scatter_residual_gather_norm_bwd(
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
    kept = grad_x_out.shape[0] if rows is None else rows.shape[0]
    return (
        grad_x_out.new_empty(grad_x_out.shape),
        grad_x_out.new_empty(kept, *grad_x_out.shape[1:], dtype=dtype),
    )


def _fake_scatter_residual_gather_norm_(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_scatter_residual_gather_norm(x, y, *others)[1:]


def _fake_scatter_residual_gather_norm_bwd_(grad_x: Tensor, grad_xhat: Tensor, *others: Any) -> Tensor:
    return _fake_scatter_residual_gather_norm_bwd(grad_x, grad_xhat, *others)[1]


for _name, _fake in (
    ("scatter_residual_gather_norm", _fake_scatter_residual_gather_norm),
    ("scatter_residual_gather_norm_", _fake_scatter_residual_gather_norm_),
    ("scatter_residual_gather_norm_bwd", _fake_scatter_residual_gather_norm_bwd),
    ("scatter_residual_gather_norm_bwd_", _fake_scatter_residual_gather_norm_bwd_),
):
    implement(_name, reference=getattr(reference, _name), fake=_fake)
