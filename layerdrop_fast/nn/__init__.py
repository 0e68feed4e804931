"""Modules: a stack for any residual layers, and the swap-ins for fairseq's, timm's and torchvision's modules."""

from layerdrop_fast.nn.attention import KVCache
from layerdrop_fast.nn.counters import set_step
from layerdrop_fast.nn.drop_path import DropPath, StochasticDepth, drop_path, stochastic_depth
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.statistics import StackStats
from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.nn.transformer_stack import TransformerStack

__all__ = [
    "DropPath",
    "KVCache",
    "LayerDropModuleList",
    "LayerDropStack",
    "StackStats",
    "StochasticDepth",
    "TransformerLayer",
    "TransformerStack",
    "drop_path",
    "set_step",
    "stochastic_depth",
]
