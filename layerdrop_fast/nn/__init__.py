"""Modules: the swap-in for fairseq's layer list, and a stack for any residual layers."""

from layerdrop_fast.nn.counters import set_step
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.statistics import StackStats

__all__ = ["LayerDropModuleList", "LayerDropStack", "StackStats", "set_step"]
