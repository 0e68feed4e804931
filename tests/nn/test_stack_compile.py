"""Compiled layers whose samples change in number: few graphs, however many plans and layers."""

import collections

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from layerdrop_fast import LayerDropStack
from tests.nn.residual import Block

B = 5
X = torch.randn(B, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(3) >= torch.tensor([3, 1, 2, 3, 2])[:, None]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plain(Block):
    def forward(self, x, padding):
        return x + torch.tanh(self.linear(x)).masked_fill(padding[:, :, None], 0.0)


class Attention(nn.Module):
    """Reshapes by its batch size."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x, padding):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None])
        return x + y.transpose(1, 2).reshape(batch, length, width)


class CallsAll(LayerDropStack):
    """As under FSDP: layers that no sample keeps are called too."""

    calls_every_layer = True


def build(kind, layers, stack=LayerDropStack):
    torch.manual_seed(0)
    rates = [0.3, 0.5, 0.7, 0.9, 0.6, 0.8][:layers]
    return stack([kind() for _ in range(layers)], rates, granularity="sample", scale="inverse", seed=3)


@pytest.mark.parametrize("kind", [Plain, Attention])
@pytest.mark.parametrize("stack", [LayerDropStack, CallsAll])
def test_graphs_do_not_grow_with_plans_and_layers(kind, stack):
    """For 5 of 5 samples, one, none, and any other number."""
    x = X.clone().requires_grad_()
    seen, graphs = collections.Counter(), []
    for layers in (3, 6):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        eager, compiled = build(kind, layers, stack), build(kind, layers, stack)
        for layer in compiled.layers:
            layer.compile(backend=counter, fullgraph=True)
        for _ in range(50):
            seen.update(compiled.plan(batch_size=B).kept_counts)
            results = []
            for model in (compiled, eager):
                model.zero_grad(set_to_none=True)
                out = model(x, PADDING)
                weights = list(model.parameters())
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, *weights], allow_unused=True)])
            assert [g is None for g in results[0]] == [g is None for g in results[1]]
            torch.testing.assert_close(*([g for g in result if g is not None] for result in results))
        graphs.append(counter.frame_count)
    assert set(seen) == set(range(B + 1))
    assert graphs[0] == graphs[1] <= 4


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_torchs_own_layers_are_compiled_by_torch_compile(granularity):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True, "norm_first": True}
    layers = [nn.TransformerEncoderLayer(**sizes, dtype=torch.float64) for _ in range(4)]
    counter = CompileCounterWithBackend("aot_eager")
    stacks = [
        LayerDropStack(of, 0.5, granularity=granularity, seed=3)
        for of in ([torch.compile(layer, backend=counter) for layer in layers], layers)
    ]
    x = X.clone().requires_grad_()
    for _ in range(10):
        out, expected = (stack(x) for stack in stacks)
        torch.testing.assert_close(out, expected)
        inputs = [x, *layers[0].parameters()]
        found, wanted = (torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (out, expected))
        assert [g is None for g in found] == [g is None for g in wanted]
        torch.testing.assert_close(*([g for g in given if g is not None] for given in (found, wanted)))
    assert 1 <= counter.frame_count <= 4
