"""``FusedEncoder``: torch's encoder layers on this package's ops, which is what the price table measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerdrop_fast.nn import LayerDropStack
from layerdrop_fast.ops import FIRST_DROPOUT_SITE, act_linear, norm_linear, owned_stream, step_key
from layerdrop_fast.schedule import DropSchedule


class FusedEncoder(nn.Module):
    """Runs torch's pre-norm encoder layers on the fused ops, in eager PyTorch, and drops whole layers while training.

    With xhat = normalise(x) at the start, each kept layer computes

        x += dropout1(out_proj(attention(norm_linear(xhat, in_proj, norm1)))),            xhat = normalise(x)
        x += dropout2(act_linear(norm_linear(xhat, linear1, norm2), linear2, dropout)),   xhat = normalise(x)

    A line ends in one op, which adds the branch and normalises for the next kept one in one pass; x is written in
    place and never saved. The ops read the layers' weights: ``forward`` and hooks of a layer and of its parts do not
    run, those of ``out_proj`` excepted. A dropout that is in evaluation is off.

    Shapes:
        x: [B, S, D] -> the same shape.

    Args:
        layers: of class ``nn.TransformerEncoderLayer`` with ``norm_first``, ``batch_first``, activation gelu or relu,
            and no dropout of attention weights. They stand in ``.stack.layers``, shared and not copied.
        schedule, sampling, seed: as in ``LayerDropStack``; ``.stack`` draws the plans and counts the forwards.

    Returns:
        A new tensor; a copy of x where all layers were dropped.

    Raises:
        TypeError: a layer of another class. ValueError: a layer made in another way; an x that is not [B, S, D].

    Source: Fan, Grave, Joulin 2019, section 3.2; the layers are torch.nn.TransformerEncoderLayer's.

    Randomness: the plans are those of ``LayerDropStack``. A dropout mask is a function of the plan's (seed, step,
    stream), the site, 256 + 3 l + (0, 1, 2) for layer l's dropout1, dropout and dropout2, and an element's number.
    """

    sites: Tensor  # int32 [L, 3]

    def __init__(
        self,
        layers: Iterable[nn.Module],
        schedule: float | Sequence[float] | DropSchedule = 0.2,
        *,
        sampling: str = "bernoulli",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.stack = LayerDropStack(layers, schedule, sampling=sampling, seed=seed)
        self.activations = [_activation(layer, f"layer {index}") for index, layer in enumerate(self.stack.layers)]
        device = next(self.stack.parameters()).device
        sites = FIRST_DROPOUT_SITE + torch.arange(3 * len(self.activations), dtype=torch.int32, device=device)
        self.register_buffer("sites", sites.view(-1, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"x: got {list(x.shape)}, expected [B, S, D]")
        if not self.training:
            return self._run(x, range(len(self.activations)), None)
        counters = self.stack.counters
        repeated = counters.recomputing
        plan = counters.plan_to_repeat() if repeated else self.stack.plan()
        integers = np.array([plan.seed, plan.step, plan.stream], dtype=np.uint64).view(np.int64)
        out = self._run(x, plan.layers, step_key(torch.from_numpy(integers).to(x.device)))
        if not repeated:
            counters.advance(plan, x, out)
        return out

    def _run(self, x: Tensor, layers: Sequence[int], key: Tensor | None) -> Tensor:
        kept = [cast(nn.TransformerEncoderLayer, self.stack.layers[index]) for index in layers]
        if not kept:
            return x.clone()
        stream, xhat = owned_stream.enter(x, eps=kept[0].norm1.eps)
        for index, layer, following in zip(layers, kept, [*kept[1:], None], strict=True):
            dropouts = zip((layer.dropout1, layer.dropout, layer.dropout2), self.sites[index].unbind(), strict=True)
            first, inner, last = (_dropout(module, key, site) for module, site in dropouts)
            y = _attention(layer, xhat)
            stream, xhat = owned_stream.scatter_residual_gather_norm_(stream, y, eps=layer.norm2.eps, **first)
            norm, up, down = layer.norm2, layer.linear1, layer.linear2
            u = norm_linear(xhat, up.weight, up.bias, gamma=norm.weight, beta=norm.bias)
            y = act_linear(u, down.weight, down.bias, activation=self.activations[index], **inner)
            if following is None:
                stream = owned_stream.scatter_residual_(stream, y, **last)
            else:
                stream, xhat = owned_stream.scatter_residual_gather_norm_(stream, y, eps=following.norm1.eps, **last)
        return stream


def _dropout(module: nn.Dropout, key: Tensor | None, site: Tensor) -> dict[str, Any]:
    return {"dropout_p": module.p if module.training and key is not None else 0.0, "key": key, "site": site}


def _attention(layer: nn.TransformerEncoderLayer, xhat: Tensor) -> Tensor:
    attention, norm = layer.self_attn, layer.norm1
    qkv = norm_linear(xhat, attention.in_proj_weight, attention.in_proj_bias, gamma=norm.weight, beta=norm.bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return attention.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _activation(layer: nn.Module, name: str) -> str:
    """The name of the layer's activation, once it is known that the ops can run the layer."""
    if type(layer) is not nn.TransformerEncoderLayer:  # a subclass may compute something else
        raise TypeError(f"{name} is a {type(layer).__name__}, expected an nn.TransformerEncoderLayer")
    attention = layer.self_attn
    expected = {"norm_first": True, "batch_first": True, "self_attn.dropout": 0.0}
    got = dict(zip(expected, (layer.norm_first, attention.batch_first, attention.dropout), strict=True))
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected}")
    norms = type(layer.norm1), type(layer.norm2)
    if norms != (nn.LayerNorm, nn.LayerNorm):
        raise ValueError(f"{name}: got the norms {[norm.__name__ for norm in norms]}, expected LayerNorm twice")
    activation = layer.activation
    if activation is F.gelu or (isinstance(activation, nn.GELU) and activation.approximate == "none"):
        return "gelu"
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return "relu"
    raise ValueError(f"{name}: got activation {activation!r}, expected gelu (exact) or relu")
