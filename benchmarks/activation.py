"""The elementwise half of ``act_linear`` as autograd sees it."""

from typing import Any

import torch
from torch import Tensor


class Act(torch.autograd.Function):
    """It saves u, and makes activation and mask anew in backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *others: Any) -> Tensor:
        ctx.save_for_backward(u)
        ctx.others = others
        return torch.ops.layerdrop_fast.act(u, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.layerdrop_fast.act_bwd(*ctx.saved_tensors, grad, *ctx.others)[0], *[None] * 5
