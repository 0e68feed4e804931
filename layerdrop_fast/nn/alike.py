"""Given layers as a TransformerStack can run them: all of one shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.nn.transformer_layer import TransformerLayer


def alike(layers: Iterable[nn.Module]) -> list[TransformerLayer]:
    """The layers as TransformerLayers, which one set of masks, positions and decisions fits."""
    made: list[TransformerLayer] = []
    for index, layer in enumerate(every_layer(layers)):
        try:
            made.append(layer if isinstance(layer, TransformerLayer) else TransformerLayer.from_torch(layer))
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {index}: {error}") from None
        got, expected = (_shape(made[i]) for i in (-1, 0))
        if got != expected:
            differing = [name for name in expected if got[name] != expected[name]]
            wanted = ", ".join(f"{name} {expected[name]}" for name in differing)
            found = ", ".join(f"{name} {got[name]}" for name in differing)
            raise ValueError(f"layer {index}: got {found}, expected {wanted}, as layer 0 has")
    if not made:
        raise ValueError("layers: got none, expected at least one")
    return made


def _shape(layer: TransformerLayer) -> dict[str, Any]:
    """What a stack asks its first layer only."""
    heads = {"nhead": layer.self_attn.nhead, "num_kv_heads": layer.self_attn.num_kv_heads}
    settings = {"norm_first": layer.norm_first, "rope_theta": layer.rope_theta, "branches": layer.num_branches}
    return {"d_model": layer.d_model} | heads | settings
