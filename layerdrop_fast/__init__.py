"""LayerDrop and stochastic depth for deep transformers, at the price of the layers that are kept."""

from layerdrop_fast import memory, models, ops, prune
from layerdrop_fast.graphs import GraphedStep
from layerdrop_fast.nn import (
    DropPath,
    KVCache,
    LayerDropModuleList,
    LayerDropStack,
    StackStats,
    StochasticDepth,
    TransformerLayer,
    TransformerStack,
    drop_path,
    set_step,
    stochastic_depth,
)
from layerdrop_fast.plan import DropPlan, draw_plan
from layerdrop_fast.schedule import (
    DropSchedule,
    alternating,
    constant,
    decreasing,
    increasing,
    linear,
    optimal_drop_rate,
    per_layer,
    progressive,
    uniform,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "DropPath",
    "DropPlan",
    "DropSchedule",
    "GraphedStep",
    "KVCache",
    "LayerDropModuleList",
    "LayerDropStack",
    "StackStats",
    "StochasticDepth",
    "TransformerLayer",
    "TransformerStack",
    "alternating",
    "constant",
    "decreasing",
    "draw_plan",
    "drop_path",
    "increasing",
    "linear",
    "memory",
    "models",
    "ops",
    "optimal_drop_rate",
    "per_layer",
    "progressive",
    "prune",
    "set_step",
    "stochastic_depth",
    "uniform",
    "warmup",
]
