"""Cutting the attention heads and feed-forward chunks of a trained network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layerdrop_fast._checks import check_count, check_indices
from layerdrop_fast.nn.parts import Parts, indices_of
from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.ops.blocks import Blocks, take

Model = TypeVar("Model", bound=nn.Module)
# In every layer, or by the layer's number; layers that are not named stay whole.
KeptParts: TypeAlias = Sequence[int] | Mapping[int, Sequence[int]]


def prune_heads(model: Model, keep: KeptParts, *, stack: str | None = None) -> Model:
    """A copy of ``model`` whose attention has only the heads in ``keep``: smaller matrices, and less to compute.

    Of cross-attention the same heads are kept. Query heads that share a key and value head are one. The copy drops no
    heads in training; its layers cannot become torch's.

        small = prune_heads(model, every_other(8, kept=4))          # in every layer
        small = prune_heads(model, {0: [0, 1, 5], 3: [2]})

    Args:
        model: a module that is or holds a TransformerStack; it is left as it is.
        keep: 0-based numbers of key and value heads, ascending, at least one; for all layers, or by layer.
        stack: the name of the TransformerStack; None: the only one.

    Raises:
        ValueError: heads or a layer that do not exist, unsorted or repeated; no single TransformerStack; layers that
            share weights. TypeError: parametrized weights, or no list of numbers.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), figure 4 left; Michel, Levy, Neubig 2019 (arXiv 1905.10650).
    """
    return _pruned(model, keep, "head", None, stack)


def prune_ffn_chunks(
    model: Model, keep: KeptParts, *, num_chunks: int | None = None, stack: str | None = None
) -> Model:
    """A copy of ``model`` whose feed-forward networks have only the chunks in ``keep``.

    Chunk c of n has the hidden channels from ``c / n`` to ``(c + 1) / n`` of all, as in training with
    ``schedule={"ffn_chunk": p}, ffn_chunks=n``. The copy drops no chunks in training.

    Args, Raises: as ``prune_heads``; ``num_chunks`` must divide the hidden width, None: the stack's ``ffn_chunks``.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.1 and figure 4 left.
    """
    return _pruned(model, keep, "ffn_chunk", num_chunks, stack)


def _pruned(model: Model, keep: KeptParts, kind: str, num_chunks: int | None, name: str | None) -> Model:
    names = [found for found, module in model.named_modules() if isinstance(module, TransformerStack)]
    if name is None and len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(names)} TransformerStacks {names}, expected 1, or its name: stack=name"
        )
    if name is not None and name not in names:
        raise ValueError(f"no TransformerStack {name!r}, expected one of {names}")
    name = names[0] if name is None else name
    whole: Any = model.get_submodule(name)
    layers = whole.layers
    num_chunks = whole.parts.ffn_chunks if num_chunks is None else check_count(num_chunks, "num_chunks", 1)
    by_layer = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(range(len(layers)), keep)
    parts = {
        number: Parts(*_checked(layers, number, kept, kind, num_chunks), scale=1.0) for number, kept in by_layer.items()
    }
    smaller = copy.deepcopy(model)
    stack = smaller.get_submodule(name)
    assert isinstance(stack, TransformerStack)
    cut: dict[int, Parts] = {}  # a layer may stand at several places
    for number, part in parts.items():
        layer = stack.layers[number]
        if id(layer) not in cut:
            _cut(layer, kind, part)
        elif cut[id(layer)] != part:
            raise ValueError(
                f"layer {number} stands elsewhere too, where {cut[id(layer)].kept} are kept: got {part.kept}"
            )
        cut[id(layer)] = part
    stack.parts = stack.parts.without(kind)
    stack.reset_stats()
    return smaller


def _checked(layers: Any, number: int, kept: Sequence[int], kind: str, num_chunks: int) -> tuple[list[int], int]:
    """The parts to keep of a layer, and how many it has."""
    if not 0 <= check_count(number, "layer", 0) < len(layers):
        raise ValueError(f"layer {number}: expected 0 to {len(layers) - 1}")
    layer: TransformerLayer = layers[number]
    total = num_chunks if kind == "ffn_chunk" else layer.self_attn.num_kv_heads
    if isinstance(kept, Sequence) and any(isinstance(part, Sequence) for part in kept):
        raise TypeError(f"{kind}s to keep are {kept}, expected one list for all layers, or {{layer: list}}")
    for name, module in layer.named_modules():
        if parametrize.is_parametrized(module):
            raise TypeError(f"layer {number}: {name} is parametrized, expected plain weights: remove_parametrizations")
    for name, weight in layer.named_parameters():
        others = [i for i, other in enumerate(layers) if other is not layer and _holds(other, weight)]
        if others:
            raise ValueError(f"layer {number} shares {name} with layer {others[0]}, expected weights of its own")
    if kind == "ffn_chunk" and layer.dim_feedforward % num_chunks:
        raise ValueError(f"num_chunks is {num_chunks}, expected a divisor of {layer.dim_feedforward} in layer {number}")
    return check_indices(kept, f"{kind}s to keep of layer {number}", total), total


def _holds(layer: nn.Module, weight: Tensor) -> bool:
    return any(parameter is weight for parameter in layer.parameters())


def _cut(layer: Any, kind: str, parts: Parts) -> None:
    """In place."""
    ffn = layer.num_branches - 1
    for branch in [ffn] if kind == "ffn_chunk" else range(ffn):
        size, lists = indices_of(layer, branch, parts)
        *inner, outer = (Blocks(torch.tensor(indices, device=layer.linear1.weight.device), size) for indices in lists)
        if branch == ffn:
            _cut_linear(layer.linear1, inner[0], 0)
            _cut_linear(layer.linear2, outer, 1)
            layer.dim_feedforward = layer.linear2.in_features
            continue
        attention = layer.self_attn if branch == 0 else layer.multihead_attn
        width = attention.nhead * attention.head_dim
        rows = [len(attention.in_proj_weight)] if len(inner) == 1 else [width, len(attention.in_proj_weight) - width]
        for weight in ("in_proj_weight", "in_proj_bias"):
            whole = getattr(attention, weight)
            if whole is not None:
                cut = [take(part, blocks, 0) for part, blocks in zip(whole.split(rows), inner, strict=True)]
                setattr(attention, weight, _like(whole, torch.cat(cut)))
        _cut_linear(attention.out_proj, outer, 1)
        attention.nhead = attention.nhead // attention.num_kv_heads * len(parts.kept)
        attention.num_kv_heads = len(parts.kept)


def _cut_linear(linear: nn.Linear, blocks: Blocks, dim: int) -> None:
    """Leaves only these blocks of outputs (dim 0) or inputs (dim 1)."""
    linear.weight = _like(linear.weight, take(linear.weight, blocks, dim))
    if dim == 0 and linear.bias is not None:
        linear.bias = _like(linear.bias, take(linear.bias, blocks, 0))
    linear.out_features, linear.in_features = linear.weight.shape


def _like(before: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=before.requires_grad)
