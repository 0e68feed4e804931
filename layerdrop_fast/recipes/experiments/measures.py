"""What is measured of a trained network, in validation bits per byte."""

from __future__ import annotations

import copy
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import (
    DataDriven,
    every_other,
    extract,
    layer_importance,
    prune_ffn_chunks,
    prune_heads,
    search,
    skip_layers,
)
from layerdrop_fast.recipes.evaluation import bits_per_token, depth_curve

Windows = npt.NDArray[np.int64]
SEARCHED = 96  # windows that a search scores its candidates on
SEARCHED_THROUGH = 32  # the same where every candidate is scored
CHUNKS = 8


def curve(model: TransformerLM, scored: Windows) -> dict[str, float]:
    """At every depth, cut by Every Other."""
    return {str(depth): bits for depth, bits in depth_curve(model, scored).items()}


def strategies(
    model: TransformerLM, learned: DataDriven | None, chosen_on: Windows, judged_on: Windows
) -> dict[str, dict[str, Any]]:
    """Half of the layers, chosen by each strategy: which, and what they are worth on other windows."""
    layers = len(model.stack.layers)
    half = layers // 2
    kept = {
        "every other": every_other(layers, kept=half),
        "first half": list(range(half)),
        "last half": list(range(layers - half, layers)),
    }
    found = search(
        model, lambda model: bits_per_token(model, chosen_on[:SEARCHED]), kept=half, method="beam", max_bytes=1 << 28
    )
    kept["search"] = found.keep
    if learned is not None:
        kept["data-driven"] = learned.keep(half)
    rows: dict[str, dict[str, Any]] = {}
    for name, keep in kept.items():
        with skip_layers(model, keep):
            rows[name] = {"keep": keep, "bits": bits_per_token(model, judged_on)}
    rows["search"]["chosen_on"] = found.ranked[0].value
    return rows


def halves(model: TransformerLM, chosen_on: Windows, judged_on: Windows) -> dict[str, Any]:
    """Every way to keep half of the layers: the best, where Every Other stands among them, the mean without a layer."""
    found = search(
        model,
        lambda model: bits_per_token(model, chosen_on[:SEARCHED_THROUGH]),
        kept=len(model.stack.layers) // 2,
        method="exhaustive",
        held_out=lambda model: bits_per_token(model, judged_on),
        max_bytes=1 << 28,
    )
    values = [scored.value for scored in found.ranked]
    return {
        "candidates": len(values),
        "layers_run": found.layers_run,
        "layers_asked": found.layers_asked,
        "best": asdict(found.ranked[0]),
        "every other": {**asdict(found.every_other), "rank": values.index(found.every_other.value) + 1},
        "median": median(values),
        "worst": values[-1],
        "without": [
            fmean(scored.value for scored in found.ranked if layer not in scored.keep)
            for layer in range(len(model.stack.layers))
        ],
    }


def importance(model: TransformerLM, scored: Windows, seed: int) -> dict[str, Any]:
    """Of each layer: 20 random sub-networks of half of the layers that lack it, fewer where there are not as many."""
    half = len(model.stack.layers) // 2
    found = layer_importance(
        model, lambda model: bits_per_token(model, scored[:SEARCHED]), kept=half, samples=20, seed=seed
    )
    return {"kept": half, "values": [[value for value in row if value == value] for row in found.values.tolist()]}


def parts(model: TransformerLM, scored: Windows) -> dict[str, float]:
    """With nothing taken out, and with half of each kind of part."""
    layers = len(model.stack.layers)
    first: Any = model.stack.layers[0]
    heads = first.self_attn.num_kv_heads
    fewer_heads = prune_heads(model, every_other(heads, kept=heads // 2))
    cut = {
        "nothing": model,
        "heads": fewer_heads,
        "chunks": prune_ffn_chunks(model, every_other(CHUNKS, kept=CHUNKS // 2)),
        "branches": without_every_other_branch(model),
        "layers": extract(model, every_other(layers, kept=layers // 2)),
        "branches and heads": without_every_other_branch(fewer_heads),
        "layers and heads": extract(fewer_heads, every_other(layers, kept=layers // 2)),
    }
    return {name: bits_per_token(cut_model, scored) for name, cut_model in cut.items()}


@torch.no_grad()
def without_every_other_branch(model: TransformerLM) -> TransformerLM:
    """A copy in which even layers have no feed-forward network and odd ones no attention: both add 0."""
    smaller = copy.deepcopy(model)
    for number, layer in enumerate(smaller.stack.layers):
        end = layer.self_attn.out_proj if number % 2 else layer.linear2  # type: ignore[union-attr]
        for weight in end.parameters():  # type: ignore[union-attr]
            weight.zero_()
    return smaller
