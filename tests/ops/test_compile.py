import pytest
import torch
from torch import nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

from layerdrop_fast import ops
from tests.ops.eager import KEY, Saved, rows_of, tensor

BATCH, POSITIONS, CHANNELS, WIDTH = 4, 3, 6, 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """One branch whose scale and dropout site differ from layer to layer."""

    def __init__(self, index: int, activation: str = "gelu") -> None:
        super().__init__()
        hidden = WIDTH * (2 if activation == "swiglu" else 1)
        self.activation = activation
        self.weights = nn.ParameterDict(
            {
                "gamma": 1 + 0.1 * tensor(CHANNELS, seed=index),
                "beta": tensor(CHANNELS, seed=index + 10),
                "up": tensor(hidden, CHANNELS, seed=index + 20),
                "up_bias": tensor(hidden, seed=index + 30),
                "down": tensor(CHANNELS, WIDTH, seed=index + 40),
                "down_bias": tensor(CHANNELS, seed=index + 50),
            }
        )
        self.register_buffer("scale", torch.tensor(1 / (1 - 0.1 * index)))
        self.register_buffer("site", torch.tensor(256 + index, dtype=torch.int32))

    def forward(self, x, xhat, rows, next_rows):
        w, dropout = self.weights, {"dropout_p": 0.25, "key": KEY, "site": self.site}
        u = ops.norm_linear(xhat, w["up"], w["up_bias"], gamma=w["gamma"], beta=w["beta"])
        y = ops.act_linear(u, w["down"], w["down_bias"], activation=self.activation, rows=rows, **dropout)
        return ops.scatter_residual_gather_norm(x, y, rows, next_rows, scale=self.scale, **dropout)


def forward(layers, x, rows):
    xhat = ops.gather_norm(x, rows[0])
    for i, layer in enumerate(layers):
        if not torch.compiler.is_compiling():
            mark_unbacked(xhat, 0)
        x, xhat = layer(x, xhat, rows[i], rows[i + 1])
    return ops.scatter_residual(x, xhat, rows[-1], scale=0.5)


def results(function, layers, rows):
    x = tensor(BATCH, POSITIONS, CHANNELS, seed=99).requires_grad_()
    out = function(layers, x, rows)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])]


@pytest.mark.parametrize(("backend", "activation"), [("aot_eager", "swiglu"), ("inductor", "gelu")])
def test_whole_stack_is_one_graph_equal_to_eager(backend, activation):
    layers = nn.ModuleList(Layer(i, activation) for i in range(2))
    rows = [rows_of(0, 1, 3), rows_of(2, 3), None]
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    torch.testing.assert_close(results(compiled, layers, rows), results(forward, layers, rows))


def test_same_rows_for_both_branches():
    layers, rows = nn.ModuleList([Layer(0)]), rows_of(1, 2)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    expected = results(forward, layers, [rows, rows])
    torch.testing.assert_close(results(compiled, layers, [rows, rows]), expected)


def test_autocast_in_a_compiled_region():
    layers, rows = nn.ModuleList([Layer(0)]).float(), [rows_of(0, 2), rows_of(1, 2, 3)]

    def function(layers, x, rows):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(layers, x.float(), rows)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = results(compiled, layers, rows), results(function, layers, rows)
    assert all(grad.dtype == torch.float32 for grad in got[2:])
    torch.testing.assert_close(got, expected)


def test_one_graph_for_all_layers_and_plans():
    """Scale and site are tensors, rows have an unbacked size: no layer and no plan, k = 0 included, recompiles."""
    counter = CompileCounterWithBackend("aot_eager")
    layers = nn.ModuleList(Layer(i) for i in range(4))
    expected, got = [], []
    plans = [[3, 2, 1, 4, 2], [0, 2, 0, 1, 4], [1, 4, 4, 4, 4], [0, 0, 0, 0, 0]]
    draws = [[torch.arange(k, dtype=torch.int32) for k in plan] for plan in plans]
    for rows in draws:
        expected.append(results(forward, layers, rows))
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    for rows in draws:
        for each in rows:
            mark_unbacked(each, 0)
        got.append(results(forward, layers, rows))
    torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_compiled_layers_save_what_eager_layers_save():
    layers, rows = nn.ModuleList([Layer(0)]), [rows_of(0, 2), rows_of(1, 2, 3)]
    x = tensor(BATCH, POSITIONS, CHANNELS).requires_grad_()

    def saved_bytes(function):
        known = list(layers.parameters())
        with Saved() as saved:
            function(layers, x, rows)
        storages = {t.untyped_storage().data_ptr(): t.nbytes for t in saved.beyond(*known) if t.is_floating_point()}
        return sum(size for size in storages.values() if size > 8)

    compiled = torch.compile(forward, backend="inductor", fullgraph=True)
    compiled(layers, x, rows)
    # Of the branch xhat, rstd and u; of the next norm xhat and rstd.
    units = 2 * (CHANNELS + 1 + WIDTH) + 3 * (CHANNELS + 1)
    assert saved_bytes(forward) == 8 * POSITIONS * units
    assert saved_bytes(compiled) <= 8 * POSITIONS * units


def test_bad_shape_is_found_while_compiling():
    compiled = torch.compile(ops.scatter_residual, backend="aot_eager")
    with pytest.raises(Exception, match=r"Expected cond to be True|expected \[2, 3, 6\]"):
        compiled(tensor(4, 3, 6), tensor(3, 3, 6), rows_of(0, 2))
