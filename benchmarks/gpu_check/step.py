"""A training step over all public ops, forward and backward, with its plan drawn on the device: what waits for nothing
and can be captured whole."""

import torch
from torch import Tensor

from layerdrop_fast import ops
from layerdrop_fast.ops import owned_stream

CHANNELS, WIDTH, P = 64, 96, 0.1
VARIANTS = ((torch.bfloat16, "layernorm", "gelu"), (torch.float32, "rmsnorm", "swiglu"))


class Step:
    """Rows have room for all samples: those that a layer drops are spare rows, -1."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        norm: str = "layernorm",
        activation: str = "gelu",
        *,
        tiny: bool = False,
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return (0.3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()

        self.branches, self.samples, positions = (2, 3, 1) if tiny else (4, 8, 5)
        self.norm, self.activation = norm, activation
        self.counters = torch.tensor([3, 5, 7], device=device)
        self.rates = torch.linspace(0.2, 0.6, self.branches, dtype=torch.float64, device=device)
        self.sites = torch.arange(256, 256 + 2 * self.branches, dtype=torch.int32, device=device)
        self.scale = torch.full((), 1.25, device=device)
        self.x = normal(self.samples, positions, CHANNELS)
        hidden = WIDTH * (2 if activation == "swiglu" else 1)
        self.weights = [
            (normal(hidden, CHANNELS), normal(hidden), normal(CHANNELS), normal(CHANNELS), normal(CHANNELS, WIDTH))
            for _ in range(self.branches)
        ]
        self.leaves = [self.x, *(weight for weights in self.weights for weight in weights)]
        self.gradient = torch.randn(self.x.shape, device=device).to(dtype)

    def run(self, owned: bool) -> list[Tensor]:
        """Plan, key, output and all gradients; the counters advance. ``owned``: the stream is written in place."""
        key = ops.step_key(self.counters)
        plan = ops.draw_plan(self.counters, self.rates, self.samples, sampling="systematic", min_kept=1, advance=True)
        rows = plan[1].unbind()
        if owned:
            x, xhat = owned_stream.enter(self.x, rows[0], norm=self.norm)
            both, last = owned_stream.scatter_residual_gather_norm_, owned_stream.scatter_residual_
        else:
            x, xhat = self.x, ops.gather_norm(self.x, rows[0], norm=self.norm)
            both, last = ops.scatter_residual_gather_norm, ops.scatter_residual
        for i, (up, bias, gamma, beta, down) in enumerate(self.weights):
            inner, outer = ({"dropout_p": P, "key": key, "site": self.sites[2 * i + j]} for j in range(2))
            u = ops.norm_linear(xhat, up, bias, gamma=gamma, beta=beta)
            y = ops.act_linear(u, down, activation=self.activation, rows=rows[i], **inner)
            if i + 1 < self.branches:
                x, xhat = both(x, y, rows[i], rows[i + 1], scale=self.scale, norm=self.norm, **outer)
            else:
                x = last(x, y, rows[i], scale=1.25, **outer)
        return [*plan, key, x.detach(), *torch.autograd.grad(x, self.leaves, self.gradient)]
