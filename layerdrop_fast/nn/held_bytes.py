"""What a branch of a TransformerLayer holds for backward, and the elements of its matrices."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.schedule import FloatArray


def branch_bytes(
    layer: TransformerLayer,
    branch: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    memory_tokens: int = 0,
    enters: bool = True,
    share: float | None = None,
) -> int:
    """What one branch of a layer holds for backward: tokens times what a token needs, and what does not depend on them.

        self-attention   xhat D, query (H d), key and value (2 H_kv d), output H d, one logarithm of a sum a head
        cross-attention  xhat D, query, output, logarithms; of each token of memory: key, value
        feed-forward     xhat D, hidden F (2 F with a gate)
        every norm       1 / sqrt(variance), one number a token

    Post-norm, a branch that ``enters`` from the stream holds its input as well, one behind a norm of the same layer
    does not. With ``recompute="qkv"`` neither query, key nor value are held; layer scale holds the scaled matrix. Of
    heads and hidden channels only the ``share`` that runs; None: all of them. In parts, autocast's matrices are cast in
    backward once more and not held.
    """
    in_parts, share = share is not None, 1.0 if share is None else share
    cast = autocast is not None and not in_parts
    inner, wide = (dtype if autocast is None else autocast).itemsize, accumulator(dtype).itemsize
    attention, width = layer.self_attn, layer.d_model
    total = tokens * (width * dtype.itemsize + wide)
    is_ffn = branch == layer.num_branches - 1
    if enters and not layer.norm_first:
        total += tokens * width * (dtype.itemsize if in_parts else inner)
        if cast:  # and its matrix
            queries = attention.nhead * attention.head_dim
            outputs = layer.linear1.out_features if is_ffn else (len(attention.in_proj_weight), queries)[branch]
            total += outputs * width * inner
            if branch == 0 and layer.recompute:  # the input as it was, to cast it anew
                total += tokens * width * dtype.itemsize
    if is_ffn:
        total += int(tokens * layer.linear1.out_features * share) * inner
        end = layer.linear2.weight
    else:
        queries, heads = attention.head_dim * attention.nhead, attention.head_dim * attention.num_kv_heads * 2
        held = queries + attention.nhead * (4 if autocast else wide) / inner
        if branch == 0:
            held += 0 if layer.recompute else queries + heads
        else:
            held += queries
            total += int(memory_tokens * heads * share) * inner
            if cast:  # memory, and the matrix
                total += (memory_tokens + heads) * width * inner
        total += int(tokens * held * inner * share)
        end = attention.out_proj.weight
        if cast:
            total += end.numel() * inner
    if getattr(layer, f"layer_scale{branch + 1}") is not None and (is_ffn or not cast):
        total += end.numel() * end.element_size()
    return total


def bytes_per_token(layers: Iterable[TransformerLayer], dtype: torch.dtype, autocast: torch.dtype | None) -> FloatArray:
    """What each branch of each layer holds for backward a token, float64 [L, branches]; the rest is not counted."""
    many = 1 << 20
    found = [
        [branch_bytes(layer, branch, many, dtype, autocast) // many for branch in range(layer.num_branches)]
        for layer in layers
    ]
    return np.array(found, dtype=np.float64)


def branch_weights(layer: TransformerLayer) -> list[int]:
    """Elements of the matrices of each branch."""
    attention = [layer.self_attn] if layer.multihead_attn is None else [layer.self_attn, layer.multihead_attn]
    found = [part.in_proj_weight.numel() + part.out_proj.weight.numel() for part in attention]
    return [*found, layer.linear1.weight.numel() + layer.linear2.weight.numel()]
