"""norm_linear: the norm's affine and the linear map behind it, with gradients from xhat alone.

With ``h = xhat * gamma + beta`` and ``out = h W^T + b``, ``g^T h = (g^T xhat) * gamma + sum(g) beta^T``: the weight's
gradient needs neither a saved nor a rebuilt ``h``, and gamma's and beta's are sums over W of the same two factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator


def norm_linear(xhat: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """``linear(xhat * gamma + beta, weight, bias)``, the matrix product in the weight's dtype or autocast's."""
    if gamma is not None and beta is not None:
        h = torch.addcmul(beta, xhat, gamma)
    else:
        h = xhat if gamma is None else xhat * gamma
        h = h if beta is None else h + beta
    return F.linear(h.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def norm_linear_bwd(
    grad_out: Tensor,
    xhat: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of (xhat, weight, bias, gamma, beta) None where ``needs`` says so."""
    need_xhat, need_weight, need_bias, need_gamma, need_beta = needs
    dtype, wide = grad_out.dtype, accumulator(grad_out.dtype)
    g = grad_out.flatten(0, -2)
    grad_xhat = grad_weight = grad_gamma = grad_beta = None
    if need_xhat:
        grad_h = grad_out @ weight.to(dtype)
        grad_xhat = grad_h if gamma is None else grad_h * gamma
    if need_bias or need_beta or (need_weight and beta is not None):
        total = g.sum(0, dtype=wide)
    if need_weight or need_gamma:
        product = (g.t() @ xhat.flatten(0, -2).to(dtype)).to(wide)
    if need_weight:
        grad_weight = product if gamma is None else product * gamma.to(wide)
        if beta is not None:
            grad_weight = grad_weight.addr(total, beta.to(wide))
    if need_gamma:
        grad_gamma = (weight * product).sum(0)
    if need_beta:
        grad_beta = total @ weight.to(wide)
    return grad_xhat, grad_weight, total if need_bias else None, grad_gamma, grad_beta
