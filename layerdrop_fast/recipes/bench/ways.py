"""The ways to run a stack of layers under LayerDrop that are compared, on one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from layerdrop_fast.recipes.bench.our_ways import LimitWay, NarrowWay, OursWay, StackWay
from layerdrop_fast.recipes.bench.peer_ways import DiscardWay, MaskedWay, SampleSkipWay, SkipWay, SubsetWay
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.way import Layers, Way

# Name -> what it does, and what makes it.
WAYS: dict[str, tuple[str, Callable[[Layers, Setting], Way]]] = {
    "dense": ("every layer runs", Way),
    "masked": (
        "timm's DropPath, torchvision's StochasticDepth: all runs, each branch is multiplied by a mask",
        MaskedWay,
    ),
    "discard": ("fairseq2: all runs, what a dropped layer returns is thrown away", DiscardWay),
    "skip": ("fairseq's LayerDropModuleList: a comparison a layer, inside the loop", SkipWay),
    "sample-skip": (
        "torchtune's LayerDropout: the device is asked for the kept samples, layer by layer",
        SampleSkipWay,
    ),
    "subset": ("DINOv2: a fixed number of samples for each branch, the stream copied behind each", SubsetWay),
    "stack": ("LayerDropStack over the same layers: one plan a step", StackWay),
    "ours": (
        "TransformerStack, the same plan: one pass a branch; neither the stream, masks nor GELU outputs are saved",
        OursWay,
    ),
    "recompute": ('the same with recompute="qkv"', partial(OursWay, recompute="qkv")),
    "limit": ("a dense TransformerStack of as many layers as the others keep", LimitWay),
    "narrow": ("a dense TransformerStack of all layers, on as many samples as the others keep", NarrowWay),
}
BY_GRANULARITY = {
    "batch": ("dense", "masked", "discard", "skip", "stack", "ours", "recompute", "limit"),
    "sample": ("dense", "masked", "sample-skip", "subset", "stack", "ours", "recompute", "limit", "narrow"),
}
