"""dropout: ordinary dropout whose mask is made from counters and never kept."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function

_ops = torch.ops.layerdrop_fast


def dropout(
    y: Tensor,
    rows: Tensor | None = None,
    *,
    dropout_p: float,
    key: Tensor | None = None,
    site: Tensor | None = None,
) -> Tensor:
    """``y / (1 - p)`` where the mask keeps, 0 elsewhere.

    The ops that add a branch drop it out themselves. This one serves where the rows of y and those of the stream have
    different numbers: in packed batches, and in compact ones. Saves nothing but its integers.

    Shapes:
        y: [K, ..., D] f64|f32|bf16|f16; rows: int32 [K] -> [K, ..., D], dtype of y

    Args:
        y: any values.
        rows: which samples of the full tensor the rows of y are; they number the mask's elements. None: all in order.
        dropout_p: probability of zeroing an element, in [0, 1].
        key, site: as in ``scatter_residual``.

    Returns:
        A new tensor; y itself where dropout_p is 0.

    Raises:
        TypeError, ValueError: as ``act_linear``.

    Source: Srivastava et al. 2014. The mask is that of ``scatter_residual`` with the same rows, key and site.
    """
    _checks.check_tensor("y", y, *_checks.FLOATING)
    _checks.check_rank("y", y, "[K, ..., D]")
    kept = _checks.check_rows("rows", rows, y, None)
    _checks.check_shape("y", y, [kept, *y.shape[1:]])
    _checks.check_dropout(dropout_p, key, site, y)
    return _Dropout.apply(y, rows, dropout_p, key, site) if dropout_p else y  # type: ignore[no-untyped-call]


class _Dropout(Function):
    @staticmethod
    def forward(y: Tensor, rows: Tensor | None, dropout_p: float, key: Tensor | None, site: Tensor | None) -> Any:
        return _ops.act(y, rows, "identity", dropout_p, key, site)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, ctx.dropout_p, key, site = inputs
        ctx.save_for_backward(rows, key, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The mask is a diagonal matrix, its own transpose.
        rows, key, site = ctx.saved_tensors
        return _ops.act(grad, rows, "identity", ctx.dropout_p, key, site), None, None, None, None
