"""The ops' kernels in Triton, for NVIDIA and AMD GPUs: ``<op>.py`` holds an op's kernels and what launches them.

``KERNELS`` gives each op that has one its launcher, with the arguments of its schema.
"""

from collections.abc import Callable
from typing import Any

from layerdrop_fast._library import LIBRARY
from layerdrop_fast.triton.act_linear import act, act_bwd
from layerdrop_fast.triton.gather_norm import gather_norm, gather_norm_bwd
from layerdrop_fast.triton.norm_linear import norm_linear_bwd
from layerdrop_fast.triton.scatter_residual import scatter_residual, scatter_residual_, scatter_residual_bwd
from layerdrop_fast.triton.scatter_residual_gather_norm import (
    scatter_residual_gather_norm,
    scatter_residual_gather_norm_,
    scatter_residual_gather_norm_bwd,
    scatter_residual_gather_norm_bwd_,
)

KERNELS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        gather_norm,
        gather_norm_bwd,
        scatter_residual,
        scatter_residual_,
        scatter_residual_bwd,
        scatter_residual_gather_norm,
        scatter_residual_gather_norm_,
        scatter_residual_gather_norm_bwd,
        scatter_residual_gather_norm_bwd_,
        norm_linear_bwd,
        act,
        act_bwd,
    )
}


def register(key: str) -> None:
    """Let the dispatcher choose these for tensors with a dispatch key: "CUDA", which AMD's GPUs have too."""
    for op, launcher in KERNELS.items():
        LIBRARY.impl(op, launcher, key)
