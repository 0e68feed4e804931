"""Small residual layers to cut."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls = 0

    def forward(self, x, shift=0.0):
        self.calls += 1
        return x + torch.tanh(self.linear(x) + shift)


def blocks(count, seed=0):
    torch.manual_seed(seed)
    return [Block() for _ in range(count)]


def skipping(layers, keep, x):
    """What is left of a list of layers, by hand."""
    for index in keep:
        x = layers[index](x)
    return x
