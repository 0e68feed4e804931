"""The public functions over the ops: checks, shapes and gradients; the dispatcher chooses who computes."""

from layerdrop_fast.ops.act_linear import act_linear
from layerdrop_fast.ops.blocks import Blocks
from layerdrop_fast.ops.draw_plan import draw_plan, step_key
from layerdrop_fast.ops.dropout import dropout
from layerdrop_fast.ops.gather_norm import gather_norm
from layerdrop_fast.ops.norm_linear import norm_linear
from layerdrop_fast.ops.scatter_residual import scatter_residual
from layerdrop_fast.ops.scatter_residual_gather_norm import scatter_residual_gather_norm
from layerdrop_fast.reference.philox import FIRST_DROPOUT_SITE

__all__ = [
    "FIRST_DROPOUT_SITE",
    "Blocks",
    "act_linear",
    "draw_plan",
    "dropout",
    "gather_norm",
    "norm_linear",
    "scatter_residual",
    "scatter_residual_gather_norm",
    "step_key",
]
