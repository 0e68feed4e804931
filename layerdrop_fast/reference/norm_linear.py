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
    product: Tensor, total: Tensor | None, weight: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``product = g^T xhat`` and ``total = sum(g)``: ``grad_weight = product * gamma + total beta^T``,
    ``grad_gamma = sum over outputs of weight * product``, ``grad_beta = total weight``."""
    wide = accumulator(product.dtype)
    product, wide_weight = product.to(wide), weight.to(wide)
    grad_weight = product if gamma is None else product * gamma.to(wide)
    if beta is not None and total is not None:
        grad_weight = grad_weight.addr(total, beta.to(wide))
    grad_beta = product.new_zeros(product.shape[1]) if total is None else total @ wide_weight
    return grad_weight.to(weight.dtype, copy=True).contiguous(), (wide_weight * product).sum(0), grad_beta
