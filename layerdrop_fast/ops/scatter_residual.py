"""scatter_residual: a branch's output, dropped out and scaled, added to the samples that ran it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.reference import scatter_residual as reference

_ops = torch.ops.layerdrop_fast


def scatter_residual(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    site: Tensor | None = None,
) -> Tensor:
    """Add a branch to its samples of the stream: ``x' = x``, ``x'[rows[k]] += scale * dropout(y[k])``.

    Saves nothing but its integers. Samples outside ``rows`` pass bit for bit, forward and backward.

    Shapes:
        x: [B, ..., D] f64|f32|bf16|f16; y: [K, ..., D], any of these; rows: int32 [K] -> [B, ..., D], dtype of x

    Args:
        x: the residual stream; not written.
        y: the branch's output for the kept samples.
        rows: the kept samples, ascending and without duplicates; a row of -1 is spare and adds nothing; None: all.
        scale: the residual scale; where layers differ, a float32 [] tensor on x's device (float64 for float64 x): a
            Python float makes one compiled graph for each of its values.
        dropout_p: probability of zeroing an element of y, in [0, 1]; the others are multiplied by 1 / (1 - p).
        key: int32 [4], from ``step_key``; not needed where dropout_p is 0.
        site: int32 [], in [FIRST_DROPOUT_SITE, 2^24), numbers the dropouts of a step; not needed where dropout_p is 0.

    Returns:
        x'.

    Raises:
        TypeError: a dtype is not among those above.
        ValueError: a shape, device or number is wrong; on the CPU also row values out of range or not ascending.

    Source: He et al. 2016 (residual learning); Huang et al. 2016 (stochastic depth). The dropout mask is a function of
    key, site and an element's number in the full [B, ..., D] alone; backward makes it anew.
    """
    check_branch(x, y, rows)
    _checks.check_dropout(dropout_p, key, site, x)
    scale_tensor = _checks.check_scale(scale, x)
    return _ScatterResidual.apply(x, y, rows, scale_tensor, dropout_p, key, site)  # type: ignore[no-any-return, no-untyped-call]


def check_branch(x: Tensor, y: Tensor, rows: Tensor | None) -> None:
    """A stream, and a branch's output for the samples in ``rows``."""
    _checks.check_tensor("x", x, *_checks.FLOATING)
    _checks.check_tensor("y", y, *_checks.FLOATING)
    _checks.check_rank("x", x, "[B, ..., D]")
    _checks.check_device("y", y, x)
    kept = _checks.check_rows("rows", rows, x, x.shape[0])
    _checks.check_shape("y", y, [kept, *x.shape[1:]])


class _ScatterResidual(Function):
    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        rows: Tensor | None,
        scale: Tensor | None,
        dropout_p: float,
        key: Tensor | None,
        site: Tensor | None,
    ) -> Any:
        return _ops.scatter_residual(x, y, rows, scale, dropout_p, key, site)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, y, rows, scale, ctx.dropout_p, key, site = inputs
        ctx.y_dtype = y.dtype
        ctx.save_for_backward(rows, scale, key, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        rows, scale, key, site = ctx.saved_tensors
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = _ops.scatter_residual_bwd(grad_out, rows, scale, ctx.dropout_p, key, site, ctx.y_dtype)
        return grad_out if ctx.needs_input_grad[0] else None, grad_y, None, None, None, None, None


def _fake_scatter_residual(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_scatter_residual_bwd(
    grad_out: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    kept = grad_out.shape[0] if rows is None else rows.shape[0]
    return grad_out.new_empty(kept, *grad_out.shape[1:], dtype=dtype)


def _fake_scatter_residual_(x: Tensor, y: Tensor, *others: Any) -> None:
    return None


implement("scatter_residual", reference=reference.scatter_residual, fake=_fake_scatter_residual)
implement("scatter_residual_", reference=reference.scatter_residual_, fake=_fake_scatter_residual_)
implement("scatter_residual_bwd", reference=reference.scatter_residual_bwd, fake=_fake_scatter_residual_bwd)
