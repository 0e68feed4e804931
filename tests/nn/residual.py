"""Small residual layers for the tests of stacks, and what they compute, by hand."""

import torch
from torch import nn

from layerdrop_fast import LayerDropStack


class Block(nn.Module):
    """A residual layer that counts its calls."""

    def __init__(self, width=8, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=dtype)
        self.calls = 0

    def forward(self, x, shift=0.0):
        self.calls += 1
        return x + torch.tanh(self.linear(x)) + shift


def stack(count=6, schedule=0.5, kind=Block, **keywords):
    torch.manual_seed(0)
    return LayerDropStack([kind() for _ in range(count)], schedule, **({"seed": 11} | keywords))


def by_hand(model, x, layers, scale=None, shift=0.0):
    for layer in layers:
        y = x + torch.tanh(model.layers[layer].linear(x)) + shift
        x = y if scale is None else x + scale[layer] * (y - x)
    return x


def gradients(model):
    return [layer.linear.weight.grad for layer in model.layers]


X = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
