"""torch's encoder layers on the fused ops: the same numbers, masks from counters, and only what backward needs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import LayerDropStack, ops, set_step
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.fused import FusedEncoder
from layerdrop_fast.reference.dropout import dropout

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 12, 2
MADE = {"batch_first": True, "norm_first": True}


def layers_of(count=6, rate=0.0, width=WIDTH, dtype=torch.float64, **keywords):
    """Layers whose biases and norms differ from 0 and 1, and whose epsilons all differ."""
    torch.manual_seed(0)
    keywords = MADE | {"activation": "gelu"} | keywords
    shape = {"d_model": width, "nhead": HEADS, "dim_feedforward": 4 * width, "dropout": rate, "dtype": dtype}
    layers = [nn.TransformerEncoderLayer(**shape, **keywords, layer_norm_eps=10.0 ** -(2 + i)) for i in range(count)]
    for layer in layers:
        layer.self_attn.dropout = 0.0
        layer.norm2.eps *= 3
        for weight in layer.parameters():
            if weight.dim() == 1:
                nn.init.normal_(weight, mean=0.5)
    return layers


def data(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def in_turn(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def results(function, layers, x, grad=None):
    """The output and all gradients, each in a place of its own."""
    for leaf in (x, *nn.ModuleList(layers).parameters()):
        leaf.grad = None
    out = function(x)
    (out.square().sum() if grad is None else (out * grad).sum()).backward()
    weights = [weight.grad for layer in layers for weight in layer.parameters()]
    return out.detach().clone(), [None if g is None else g.clone() for g in (x.grad, *weights)]


def assert_same(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-10, atol=1e-10)
    assert len(ours[1]) == len(expected[1])
    for got, want in zip(ours[1], expected[1], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", nn.GELU(), nn.ReLU()])
def test_computes_the_kept_layers_of_torch(activation, bias, requires_grad):
    layers, x = layers_of(activation=activation, bias=bias), data(requires_grad)
    fused = FusedEncoder(layers, 0.5, seed=10)
    kept = fused.stack.plan(0).layers
    assert kept == [0, 2, 5]
    ours = results(fused, layers, x)
    assert_same(ours, results(lambda x: in_turn([layers[i] for i in kept], x), layers, x))
    ran = [layer.linear1.weight.grad is not None for layer in layers]
    assert ran == [i in kept for i in range(len(layers))]


@pytest.mark.parametrize("kept", [[0], [5], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_any_layers_can_be_next_to_each_other(kept):
    layers, x = layers_of(), data()
    layers[1].activation = layers[5].activation = nn.functional.relu
    fused = FusedEncoder(layers, [float(i not in kept) for i in range(6)], seed=0)
    ours = results(fused, layers, x)
    assert_same(ours, results(lambda x: in_turn([layers[i] for i in kept], x), layers, x))


def test_layers_are_shared():
    layers = layers_of(2)
    fused = FusedEncoder(layers, 0.0, seed=0)
    assert list(fused.stack.layers) == layers
    assert {id(weight) for weight in fused.parameters()} == {id(w) for layer in layers for w in layer.parameters()}
    assert fused.state_dict().keys() == {f"stack.{name}" for name in fused.stack.state_dict()}


class Masks(nn.Module):
    """Dropout of one site, by the reference."""

    def __init__(self, p, key, site):
        super().__init__()
        self.p, self.key, self.site = p, key, torch.tensor(site, dtype=torch.int32)

    def forward(self, x):
        return dropout(x, None, self.p, self.key, self.site)


@pytest.mark.parametrize("seed", [10, 2**64 - 1])
def test_dropout_stands_where_torch_has_it_with_masks_from_counters(seed):
    layers, x, step = layers_of(rate=0.1), data(), 7
    for layer in layers:
        layer.dropout.p, layer.dropout2.p = 0.3, 0.6
    key = ops.step_key(torch.tensor([seed - 2**64 if seed >> 63 else seed, step, 0]))
    fused = FusedEncoder(layers, 0.5, seed=seed)
    set_step(fused, step)
    kept = fused.stack.plan(step).layers
    masked = []
    for i in kept:
        # The memo makes the copy share the layer's parameters.
        layer = copy.deepcopy(layers[i], {id(weight): weight for weight in layers[i].parameters()})
        for j, (name, p) in enumerate({"dropout1": 0.1, "dropout": 0.3, "dropout2": 0.6}.items()):
            setattr(layer, name, Masks(p, key, ops.FIRST_DROPOUT_SITE + 3 * i + j))
        masked.append(layer)
    assert_same(results(fused, layers, x), results(lambda x: in_turn(masked, x), layers, x))


def test_dropout_is_a_function_of_seed_and_step():
    layers, x = layers_of(rate=0.2), data()

    def at(seed, step):
        torch.rand(1)  # torch's generator does not matter
        fused = FusedEncoder(layers, 0.0, seed=seed)
        set_step(fused, step)
        return results(fused, layers, x, torch.ones_like(x))

    first, again = at(1, 0), at(1, 0)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    others = [at(1, 1)[0], at(2, 0)[0], results(lambda x: in_turn(layers, x), layers, x)[0]]
    assert not any(torch.allclose(first[0], other) for other in others)


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_plans_are_those_of_a_stack(sampling):
    layers, x = layers_of(), data()
    fused = FusedEncoder(layers, 0.5, sampling=sampling, seed=8)
    stack = LayerDropStack(layers, 0.5, sampling=sampling, seed=8)
    for _ in range(4):
        assert fused.stack.counters.forwards == stack.counters.forwards
        assert_same(results(fused, layers, x), results(stack, layers, x))
    other = FusedEncoder(layers, 0.5, sampling=sampling, seed=0)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), fused(x))


def test_evaluation_runs_every_layer_without_dropout():
    layers, x = layers_of(rate=0.2), data()
    fused = FusedEncoder(layers, 0.9, seed=0).eval()
    assert_same(results(fused, layers, x), results(lambda x: in_turn(layers, x), layers, x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), in_turn(layers, x), rtol=1e-10, atol=1e-10)
    assert fused.stack.counters.forwards == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_sees_the_same_plan_and_masks(use_reentrant):
    layers, x = layers_of(rate=0.2), data()
    expected = results(FusedEncoder(layers, 0.5, seed=10), layers, x)
    fused = FusedEncoder(layers, 0.5, seed=10)
    assert_same(results(lambda x: checkpoint(fused, x, use_reentrant=use_reentrant), layers, x), expected)
    assert fused.stack.counters.forwards == 1


def test_neither_input_nor_incoming_gradient_is_written():
    layers, x, grad = layers_of(), data(), torch.ones(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    before = x.detach().clone()
    out = FusedEncoder(layers, 0.5, seed=10)(x)
    out.backward(grad)
    assert torch.equal(x, before)
    assert torch.equal(grad, torch.ones_like(grad))


def test_everything_dropped_is_a_differentiable_identity():
    layers, x = layers_of(rate=0.2), data()
    fused = FusedEncoder(layers, 1.0, seed=0)
    out = fused(x)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    grad = torch.randn_like(x)
    out.backward(grad)
    assert torch.equal(x.grad, grad)
    assert all(weight.grad is None for weight in fused.parameters())
    assert fused.stack.counters.forwards == 1
    assert saved_bytes(fused, x) == 0


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_kept_layer_saves_ten_units(p, rate):
    # xhat, q, k, v, attention, xhat, 4 hidden; and small: rstd of two norms, logsumexp of a head's rows.
    width = 64
    fused = FusedEncoder(layers_of(rate=rate, width=width, dtype=torch.float32), p, sampling="systematic", seed=0)
    kept = len(fused.stack.plan(0).layers)
    assert kept == (1 - p) * 6
    units = 10 * kept * (2 * 16 * width * 4)
    assert units < saved_bytes(fused, torch.randn(2, 16, width, requires_grad=True)) <= 1.03 * units


def test_sites_stand_on_the_device_of_the_weights():
    assert FusedEncoder([nn.TransformerEncoderLayer(8, 2, 8, 0.0, "gelu", **MADE, device="meta")], 0).sites.is_meta


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"norm_first": False}, "layer 1: got {'norm_first': False, .*expected {'norm_first': True"),
        ({"batch_first": False}, "layer 1: got {.*'batch_first': False, .*expected {.*'batch_first': True"),
        ({"dropout": 0.1}, "layer 1: got {.*'self_attn.dropout': 0.1}, expected {.*'self_attn.dropout': 0.0}"),
        ({"activation": nn.functional.silu}, "layer 1: got activation <function silu.*expected gelu .exact. or relu"),
        ({"activation": nn.GELU("tanh")}, r"layer 1: got activation GELU\(approximate='tanh'\), expected gelu"),
    ],
)
def test_layers_that_the_ops_cannot_run_are_named(keywords, message):
    bad = nn.TransformerEncoderLayer(WIDTH, HEADS, **({"dropout": 0.0, "activation": "gelu"} | MADE | keywords))
    with pytest.raises(ValueError, match=message):
        FusedEncoder([*layers_of(1), bad], 0.5)


def test_dropout_without_a_plan_is_off():
    """In evaluation there is no plan, and so no key to draw masks with."""
    encoder, x = FusedEncoder(layers_of(rate=0.5), 0.5, seed=0).eval(), data()
    expected = encoder(x)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert torch.equal(encoder(x), expected)


def test_layers_that_compute_something_else_are_refused():
    class Other(nn.TransformerEncoderLayer):
        pass

    with pytest.raises(TypeError, match=r"layer 0 is a Other, expected an nn\.TransformerEncoderLayer"):
        FusedEncoder([Other(WIDTH, HEADS, **MADE)])
    (layer,) = layers_of(1)
    layer.norm2 = nn.RMSNorm(WIDTH)
    with pytest.raises(
        ValueError, match=r"layer 0: got the norms \['LayerNorm', 'RMSNorm'\], expected LayerNorm twice"
    ):
        FusedEncoder([layer])


def test_other_modules_are_named():
    with pytest.raises(TypeError, match=r"layer 0 is a Linear, expected an nn\.TransformerEncoderLayer"):
        FusedEncoder([nn.Linear(4, 4)], 0.5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((LENGTH, WIDTH), r"x: got \[5, 12\], expected \[B, S, D\]"), ((2, 3, 8), r"expected \[O, 8\]")],
)
def test_a_bad_input_is_named_and_counts_nothing(shape, message):
    fused = FusedEncoder(layers_of(2), 0.0, seed=0)
    with pytest.raises(ValueError, match=message):
        fused(torch.randn(*shape, dtype=torch.float64))
    assert fused.stack.counters.forwards == 0
