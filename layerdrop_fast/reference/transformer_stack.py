"""What a TransformerStack computes, in plain PyTorch: every layer runs for every sample, a mask says who keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdrop_fast.reference.act_linear import ACTIVATIONS
from layerdrop_fast.reference.dropout import dropout


def transformer_stack(
    stack: Any,
    x: Tensor,
    memory: Tensor | None = None,
    *,
    keep: Tensor,
    scales: Tensor,
    key: Tensor | None = None,
    added: Tensor | None = None,
    memory_added: Tensor | None = None,
    position_ids: Tensor | None = None,
    parts: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """The stream behind every layer.

    Pre-norm ``x + r * dropout(branch(norm(x)))``, post-norm ``norm(x + r * dropout(branch(x)))`` for the samples that
    keep the branch, x for the others. Branches that no sample keeps do not run, so that their weights get no gradient.

    Shapes:
        x: [B, S, D]; memory: [B, T, D] -> L tensors [B, S, D]

    Args:
        stack: a TransformerStack, for its weights and settings.
        keep: bool [L * branches, B]; scales: f64 [L * branches], the residual scales r.
        key: int32 [4], of the masks; None: no dropout.
        added: [B or 1, nhead or 1, S, S], added to the scores; memory_added: the same for memory, [..., S, T].
        position_ids: int64 [B, S], of rotary positions.
        parts: of branches that are kept in parts, by unit: f64 [heads, those that share a key and value as one, or
            chunks], what each is multiplied by, 0 where it is dropped.
    """
    states = []
    for number, layer in enumerate(stack.layers):
        branches = layer.num_branches
        for branch in range(branches):
            unit = number * branches + branch
            if keep[unit].any():
                site, inner = (torch.tensor(256 + 2 * unit + i, dtype=torch.int32) for i in range(2))
                norm = getattr(layer, f"norm{branch + 1}")
                h = normalise(x, norm) if layer.norm_first else x
                part = None if parts is None else parts.get(unit)
                if branch == branches - 1:
                    y = feed_forward(layer, h, key, inner, part)
                elif branch == 0:
                    y = attention(layer.self_attn, h, h, added, layer.rope_theta, position_ids, part)
                else:
                    assert memory is not None
                    y = attention(layer.multihead_attn, h, memory, memory_added, None, None, part)
                factors = getattr(layer, f"layer_scale{branch + 1}")
                y = y if factors is None else y * factors
                new = x + scales[unit].to(x.dtype) * dropout(y, None, layer.dropout, key, site)
                new = new if layer.norm_first else normalise(new, norm)
                x = torch.where(keep[unit][:, None, None], new, x)
        states.append(x)
    return states


def normalise(x: Tensor, norm: Any) -> Tensor:
    """LayerNorm or RMSNorm, with its affine."""
    if isinstance(norm, torch.nn.RMSNorm):
        return x * (x.square().mean(-1, keepdim=True) + (norm.eps or 0.0)).rsqrt() * norm.weight
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def feed_forward(layer: Any, h: Tensor, key: Tensor | None, site: Tensor, chunks: Tensor | None) -> Tensor:
    """``linear2(chunks * dropout(activation(linear1(h))))``; the masks are those of the kept channels alone."""
    a, _ = ACTIVATIONS[layer.activation](layer.linear1(h))
    if chunks is None:
        return layer.linear2(dropout(a, None, layer.activation_dropout, key, site))  # type: ignore[no-any-return]
    factors = chunks.repeat_interleave(a.shape[-1] // len(chunks)).to(a.dtype)
    kept = factors.nonzero()[:, 0]
    masked = dropout(a[..., kept], None, layer.activation_dropout, key, site)
    return layer.linear2(factors * torch.zeros_like(a).index_copy(-1, kept, masked))  # type: ignore[no-any-return]


def attention(
    weights: Any,
    h: Tensor,
    source: Tensor,
    added: Tensor | None,
    theta: float | None,
    position_ids: Tensor | None,
    heads: Tensor | None,
) -> Tensor:
    """``out(heads * softmax(q k^T / sqrt(d)) v)`` of each head; q from h, k and v from the source."""
    groups = [n * weights.head_dim for n in (weights.nhead, weights.num_kv_heads, weights.num_kv_heads)]
    matrices = weights.in_proj_weight.split(groups)
    biases = [None] * 3 if weights.in_proj_bias is None else weights.in_proj_bias.split(groups)
    q, k, v = (
        F.linear(tokens, matrix, bias).unflatten(-1, (-1, weights.head_dim)).transpose(1, 2)
        for tokens, matrix, bias in zip((h, source, source), matrices, biases, strict=True)
    )
    if theta is not None:
        q, k = rotary(q, theta, position_ids), rotary(k, theta, position_ids)
    shared = weights.nhead // weights.num_kv_heads
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(weights.head_dim)
    scores = scores if added is None else scores + added
    found = scores.softmax(-1) @ v
    if heads is not None:
        found = found * heads.repeat_interleave(shared)[:, None, None].to(found.dtype)
    return weights.out_proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotary(heads: Tensor, theta: float, position_ids: Tensor | None) -> Tensor:
    """Pairs (i, i + d / 2) of each head turned by the angle ``position * theta^(-2i / d)`` (Su et al. 2021).

    Shapes:
        heads: [B, H, S, d]; position_ids: int64 [B, S] or None for 0..S - 1
    """
    half = heads.shape[-1] // 2
    positions = torch.arange(heads.shape[2], device=heads.device)[None] if position_ids is None else position_ids
    frequency = torch.pow(theta, -torch.arange(half, device=heads.device, dtype=torch.float64) / half)
    angle = (positions[..., None] * frequency)[:, None].to(heads.dtype)
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)
