"""norm_linear: the norm's affine and a linear map, saving nothing beyond the norm's own xhat."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.ops.blocks import Blocks, apart, put, take, together
from layerdrop_fast.reference import norm_linear as reference
from layerdrop_fast.reference.rows import accumulator

_ops = torch.ops.layerdrop_fast


def norm_linear(
    xhat: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Apply a norm's affine and the linear map behind it: ``(xhat * gamma + beta) W^T + b``.

    Saves xhat, which ``gather_norm`` holds already, and no copy of ``xhat * gamma + beta``: the weight's gradient is
    ``(g^T xhat) * gamma + sum(g) beta^T``. With ``blocks`` only those rows of W and b are used, and O counts them; no
    copy of them is saved, and the gradients of the others are 0.

    Shapes:
        xhat: [K, ..., D]; weight: [O, D]; bias: [O]; gamma, beta: [D], all f64|f32|bf16|f16 -> [K, ..., O]

    Args:
        xhat: what ``gather_norm`` returned.
        weight, bias: of the linear map. Forward hooks of a Linear that owns them do not run.
        gamma, beta: the norm's weight and bias; None is 1 and 0.
        blocks: which rows of the weight; None: all.

    Returns:
        The output, in autocast's dtype where autocast is on, else in the weight's; gradients have the dtype of what
        they belong to.

    Raises:
        TypeError: a dtype is not among those above.
        ValueError: a shape or a device is wrong.

    Source: torch.nn.functional.layer_norm and linear, as one op. Uses no randomness.
    """
    _checks.check_tensor("xhat", xhat, *_checks.FLOATING)
    _checks.check_rank("xhat", xhat, "[K, ..., D]")
    channels = xhat.shape[-1]
    _checks.check_linear(weight, bias, xhat, channels)
    for name, value in (("gamma", gamma), ("beta", beta)):
        if value is not None:
            _checks.check_vector(name, value, xhat, channels)
    _checks.check_blocks(blocks, weight, 0)
    return _NormLinear.apply(xhat, weight, bias, gamma, beta, *apart(blocks))  # type: ignore[no-any-return, no-untyped-call]


class _NormLinear(Function):
    @staticmethod
    def forward(
        xhat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        kept: Tensor | None,
        size: int,
    ) -> Any:
        blocks = together(kept, size)
        weight, bias = take(weight, blocks, 0), None if bias is None else take(bias, blocks, 0)
        return reference.norm_linear(xhat, weight, bias, gamma, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        xhat, weight, _, gamma, beta, kept, ctx.size = inputs
        ctx.save_for_backward(xhat, weight, gamma, beta, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        xhat, weight, gamma, beta, kept = ctx.saved_tensors
        need_xhat, need_weight, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
        blocks, length = together(kept, ctx.size), len(weight)
        weight = take(weight, blocks, 0)
        dtype, wide = grad_out.dtype, accumulator(grad_out.dtype)
        g = grad_out.flatten(0, -2)
        grad_xhat = grad_weight = grad_gamma = grad_beta = total = None
        if need_xhat:
            grad_h = grad_out @ weight.to(dtype)
            grad_xhat = grad_h if gamma is None else grad_h * gamma
        if need_bias or need_beta or (need_weight and beta is not None):
            total = g.sum(0, dtype=wide)
        if need_weight or need_gamma:
            grad_weight = g.t() @ xhat.flatten(0, -2).to(dtype)
            if gamma is not None or beta is not None:
                shift = None if total is None else beta
                grad_weight, grad_gamma, grad_beta = _ops.norm_linear_bwd(grad_weight, total, weight, gamma, shift)
        elif need_beta and total is not None:
            grad_beta = total @ weight.to(wide)
        if need_weight and grad_weight is not None:
            grad_weight = put(grad_weight, blocks, 0, length)
        grad_bias = put(total, blocks, 0, length) if need_bias and total is not None else None
        found = (grad_xhat, grad_weight, grad_bias, grad_gamma, grad_beta, None, None)
        return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=True))


def _fake_norm_linear_bwd(
    product: Tensor, total: Tensor | None, weight: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gamma, grad_beta = (product.new_empty(product.shape[1], dtype=accumulator(product.dtype)) for _ in range(2))
    return weight.new_empty(weight.shape), grad_gamma, grad_beta


implement("norm_linear_bwd", reference=reference.norm_linear_bwd, fake=_fake_norm_linear_bwd)
