"""What a whole pre-norm layer saves: 10 units of B * S * D numbers, where eager PyTorch saves 18 (16 without masks).

xhat 1, q, k, v 3, attention 1, xhat 1, u 4.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerdrop_fast import ops
from layerdrop_fast.memory import saved_bytes
from tests.ops.eager import KEY, rows_of, tensor

CHANNELS, HEADS, LAYERS = 64, 2, 2
ROWS = rows_of(0, 3, 4, 6)


@pytest.fixture(autouse=True)
def dynamo_forgets():
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """The two branches of a layer and the norm that follows, from the normalised input of its attention."""

    def __init__(self, index: int) -> None:
        super().__init__()
        shapes = {"gamma": [64], "beta": [64], "qkv": [192, 64], "out": [64, 64], "up": [256, 64], "down": [64, 256]}
        self.weights = nn.ParameterDict(
            {name: tensor(*shape, dtype=torch.float32, seed=index) / 8 for name, shape in shapes.items()}
        )
        self.register_buffer("sites", torch.arange(2, dtype=torch.int32) + 256 + 2 * index)

    def forward(self, x, xhat, rows):
        w, affine = self.weights, {"gamma": self.weights["gamma"], "beta": self.weights["beta"]}
        attention, ffn = ({"dropout_p": 0.1, "key": KEY, "site": site} for site in self.sites.unbind())
        qkv = ops.norm_linear(xhat, w["qkv"], **affine).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv.unbind())
        y = F.linear(heads.transpose(1, 2).flatten(2), w["out"])
        x, xhat = ops.scatter_residual_gather_norm(x, y, rows, rows, **attention)
        u = ops.norm_linear(xhat, w["up"], **affine)
        y = ops.act_linear(u, w["down"], rows=rows, **ffn)
        return ops.scatter_residual_gather_norm(x, y, rows, rows, **ffn)


def stack_bytes(positions: int, compiled: bool, autocast: bool) -> int:
    """What a stack saves for so many positions."""
    torch._dynamo.reset()
    layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
    x = tensor(7, positions, CHANNELS, dtype=torch.float32).requires_grad_()

    def forward(x):
        xhat = ops.gather_norm(x, ROWS)
        for layer in layers:
            x, xhat = layer(x, xhat, ROWS)
        return x, xhat

    function = torch.compile(forward, backend="inductor", fullgraph=True) if compiled else forward
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if compiled:
            function(x)
        return saved_bytes(function, x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_saves_ten_units_of_its_kept_samples(compiled, autocast):
    """Of what grows with the tokens; autocast also holds, as in eager PyTorch, copies of weights."""
    positions = 16
    saved = stack_bytes(2 * positions, compiled, autocast) - stack_bytes(positions, compiled, autocast)
    unit = len(ROWS) * positions * CHANNELS
    # The stream, and so xhat, stays float32 under autocast; the rest is bfloat16. The last norm's xhat comes on top.
    floor = unit * (LAYERS * (2 * 4 + 8 * 2 if autocast else 10 * 4) + 4)
    assert floor <= saved
    # rstd, and the attention's logarithms of sums: 2 and HEADS numbers a token.
    assert saved <= floor + 4 * len(ROWS) * positions * (LAYERS * (2 + HEADS) + 1)
