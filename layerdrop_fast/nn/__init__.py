"""Modules: the swap-in for fairseq's layer list, and a stack for any residual layers."""

from layerdrop_fast.nn.attention import KVCache
from layerdrop_fast.nn.counters import set_step
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.statistics import StackStats
from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.nn.transformer_stack import TransformerStack

__all__ = [
    "KVCache",
    "LayerDropModuleList",
    "LayerDropStack",
    "StackStats",
    "TransformerLayer",
    "TransformerStack",
    "set_step",
]
