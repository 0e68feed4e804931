"""norm_linear: the norm's affine and a linear map, saving nothing beyond the norm's own xhat."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast.ops import _checks
from layerdrop_fast.reference import norm_linear as reference


def norm_linear(
    xhat: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Apply a norm's affine and the linear map behind it: ``(xhat * gamma + beta) W^T + b``.

    Saves xhat, which ``gather_norm`` holds already, and no copy of ``xhat * gamma + beta``: the weight's gradient is
    ``(g^T xhat) * gamma + sum(g) beta^T``.

    Shapes:
        xhat: [K, ..., D]; weight: [O, D]; bias: [O]; gamma, beta: [D], all f64|f32|bf16|f16 -> [K, ..., O]

    Args:
        xhat: what ``gather_norm`` returned.
        weight, bias: of the linear map. Forward hooks of a Linear that owns them do not run.
        gamma, beta: the norm's weight and bias; None is 1 and 0.

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
    return _NormLinear.apply(xhat, weight, bias, gamma, beta)  # type: ignore[no-any-return, no-untyped-call]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(xhat: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Any:
        return reference.norm_linear(xhat, weight, bias, gamma, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        xhat, weight, _, gamma, beta = inputs
        ctx.save_for_backward(xhat, weight, gamma, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        xhat, weight, gamma, beta = ctx.saved_tensors
        return reference.norm_linear_bwd(grad_out, xhat, weight, gamma, beta, ctx.needs_input_grad)
