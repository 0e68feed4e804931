"""act_linear: activation, dropout and a linear map, saving the activation's input only."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.ops.blocks import Blocks, apart, put, take, together
from layerdrop_fast.reference import act_linear as reference
from layerdrop_fast.reference.rows import accumulator

_ops = torch.ops.layerdrop_fast


def act_linear(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    rows: Tensor | None = None,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    site: Tensor | None = None,
    blocks: Blocks | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Apply an activation, dropout and a linear map: ``scale * dropout(act(u)) W^T + b``.

    Saves u; backward makes the activation and the mask anew in the pass that computes the gradient of u. With
    ``blocks`` only those columns of W are used, and F counts them; no copy of them is saved, and the gradients of the
    others are 0.

    Shapes:
        u: [K, ..., F], swiglu [K, ..., 2F]; weight: [O, F]; bias: [O], all f64|f32|bf16|f16; rows: int32 [K]
        -> [K, ..., O]

    Args:
        u: the activation's input.
        weight, bias: of the linear map. Forward hooks of a Linear that owns them do not run.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu" or "swiglu", silu(first half) * second half;
            or "identity".
        rows: which samples the rows of u are; they number the mask's elements. None: all samples in order.
        dropout_p: probability of zeroing an element of act(u), in [0, 1]; the others are multiplied by 1 / (1 - p).
        key: int32 [4], from ``step_key``; not needed where dropout_p is 0.
        site: int32 [], in [FIRST_DROPOUT_SITE, 2^24), numbers the dropouts of a step; not needed where dropout_p is 0.
        blocks: which columns of the weight; None: all.
        scale: a factor of the product, for instance 1 / density where ``blocks`` were drawn.

    Returns:
        The output, in autocast's dtype where autocast is on, else in the weight's; gradients have the dtype of what
        they belong to.

    Raises:
        TypeError: a dtype is not among those above.
        ValueError: a shape, device, name or number is wrong; on the CPU also row values that are not ascending.

    Source: Hendrycks, Gimpel 2016 (GELU); Shazeer 2020 (SwiGLU). The dropout mask is a function of key, site and an
    element's number in the full [B, ..., F] alone; with ``blocks`` F counts theirs.
    """
    _checks.check_tensor("u", u, *_checks.FLOATING)
    _checks.check_rank("u", u, "[K, ..., F]")
    _checks.check_activation(activation)
    kept = _checks.check_rows("rows", rows, u, None)
    _checks.check_shape("u", u, [kept, *u.shape[1:]])
    channels = u.shape[-1]
    if activation == "swiglu":
        if channels % 2:
            raise ValueError(f"u: got {list(u.shape)}, expected an even number of channels for swiglu")
        channels //= 2
    _checks.check_blocks(blocks, weight, 1)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise TypeError(f"scale: got {scale!r}, expected a finite number")
    _checks.check_linear(weight, bias, u, channels if blocks is None else None)
    if blocks is not None:
        _checks.check_shape("u", u, [*u.shape[:-1], u.shape[-1] // channels * len(blocks.kept) * blocks.size])
    _checks.check_dropout(dropout_p, key, site, u)
    return _ActLinear.apply(u, weight, bias, rows, activation, dropout_p, key, site, *apart(blocks), scale)  # type: ignore[no-any-return, no-untyped-call]


class _ActLinear(Function):
    @staticmethod
    def forward(
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        activation: str,
        dropout_p: float,
        key: Tensor | None,
        site: Tensor | None,
        kept: Tensor | None,
        size: int,
        scale: float,
    ) -> Any:
        a = _ops.act(u, rows, activation, dropout_p, key, site)
        weight = _scaled(take(weight, together(kept, size), 1), scale)
        return F.linear(a.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, weight, _, rows, ctx.activation, ctx.dropout_p, key, site, kept, ctx.size, ctx.scale = inputs
        ctx.save_for_backward(u, weight, rows, key, site, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        u, weight, rows, key, site, kept = ctx.saved_tensors
        blocks = together(kept, ctx.size)
        need_u, need_weight, need_bias = ctx.needs_input_grad[:3]
        mask = (rows, ctx.activation, ctx.dropout_p, key, site)
        g = grad_out.flatten(0, -2)
        grad_u = grad_weight = None
        if need_u:
            used = _scaled(take(weight, blocks, 1), ctx.scale)
            grad_u, a = _ops.act_bwd(u, grad_out @ used.to(grad_out.dtype), *mask)
        if need_weight:
            a = a if need_u else _ops.act(u, *mask)
            grad_weight = _scaled(g.t() @ a.flatten(0, -2).to(g.dtype), ctx.scale)
            grad_weight = put(grad_weight, blocks, 1, weight.shape[1])
        grad_bias = g.sum(0, dtype=accumulator(g.dtype)) if need_bias else None
        return grad_u, grad_weight, grad_bias, *[None] * 8


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return weight if scale == 1 else weight * scale


def _fake_act(
    u: Tensor, rows: Tensor | None, activation: str, dropout_p: float, key: Tensor | None, site: Tensor | None
) -> Tensor:
    return u.new_empty(*u.shape[:-1], u.shape[-1] // (2 if activation == "swiglu" else 1))


def _fake_act_bwd(
    u: Tensor,
    grad_a: Tensor,
    rows: Tensor | None,
    activation: str,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(grad_a.shape)


implement("act", reference=reference.act, fake=_fake_act)
implement("act_bwd", reference=reference.act_bwd, fake=_fake_act_bwd)
