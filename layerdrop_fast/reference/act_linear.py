"""act_linear: linear(dropout(act(u))); its elementwise halves act and act_bwd are the ops."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layerdrop_fast.reference.dropout import dropout
from layerdrop_fast.reference.rows import accumulator, clear_spare


def gelu(u: Tensor) -> tuple[Tensor, Tensor]:
    """``u * Phi(u)``, Phi the normal distribution function (Hendrycks, Gimpel 2016)."""
    cdf = torch.erfc(u * -math.sqrt(0.5)) / 2
    return u * cdf, cdf + u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(u: Tensor) -> tuple[Tensor, Tensor]:
    """``u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))``."""
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * (u + 0.044715 * u**3))
    return u * (1 + t) / 2, (1 + t) / 2 + u / 2 * (1 - t.square()) * slope * (1 + 3 * 0.044715 * u.square())


def relu(u: Tensor) -> tuple[Tensor, Tensor]:
    """``max(u, 0)``."""
    return u.clamp(min=0), (u > 0).to(u.dtype)


def silu(u: Tensor) -> tuple[Tensor, Tensor]:
    """``u / (1 + exp(-u))``."""
    s = torch.sigmoid(u)
    return u * s, s * (1 + u * (1 - s))


def swiglu(u: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * value``, (gate, value) the halves of u (Shazeer 2020)."""
    gate, value = u.chunk(2, dim=-1)
    activated, slope = silu(gate)
    return activated * value, torch.cat([slope * value, activated], dim=-1)


def identity(u: Tensor) -> tuple[Tensor, Tensor]:
    """``u``; with dropout this is dropout alone."""
    return u, torch.ones_like(u)


# Each gives the activation and its derivative by every channel of u.
ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
    "swiglu": swiglu,
    "identity": identity,
}


def act(
    u: Tensor, rows: Tensor | None, activation: str, dropout_p: float, key: Tensor | None, site: Tensor | None
) -> Tensor:
    """``a = dropout(act(u))``."""
    value, _ = ACTIVATIONS[activation](u.to(accumulator(u.dtype)))
    return clear_spare(dropout(value, rows, dropout_p, key, site), rows).to(u.dtype).contiguous()


def act_bwd(
    u: Tensor,
    grad_a: Tensor,
    rows: Tensor | None,
    activation: str,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``grad_u = dropout(grad_a) * act'(u)``, and ``a`` again."""
    wide = accumulator(u.dtype)
    value, slope = ACTIVATIONS[activation](u.to(wide))
    a = clear_spare(dropout(value, rows, dropout_p, key, site), rows)
    grad = dropout(grad_a.to(wide), rows, dropout_p, key, site)
    grad_u = clear_spare(torch.cat([grad] * (slope.shape[-1] // grad.shape[-1]), dim=-1) * slope, rows)
    return grad_u.to(u.dtype).contiguous(), a.to(u.dtype).contiguous()
