"""TransformerStack: every path equals the pure-PyTorch stack on the same plan; what is dropped costs nothing."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from layerdrop_fast import DropSchedule, TransformerLayer, TransformerStack, draw_plan, linear, prune, set_step
from layerdrop_fast.memory import saved_bytes
from tests.nn.transformer import (
    BATCH,
    HEADS,
    LENGTH,
    SOURCE,
    WIDTH,
    assert_same,
    next_plan,
    reference,
    results,
    stack,
    tensor,
)

X = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
MEMORY = tensor(BATCH, SOURCE, WIDTH, seed=2).requires_grad_()
INFINITY = float("inf")

SHAPES = {
    "pre-norm": {},
    "post-norm": {"norm_first": False},
    "RMSNorm, SwiGLU, no biases": {"norm": "rmsnorm", "activation": "swiglu", "bias": False},
    "post-norm RMSNorm, SiLU": {"norm_first": False, "norm": "rmsnorm", "activation": "silu"},
    "dropout": {"dropout": 0.3, "activation_dropout": 0.2, "activation": "relu"},
    "dropout inside a branch alone": {"activation_dropout": 0.3},
    "post-norm dropout": {"norm_first": False, "dropout": 0.3, "activation_dropout": 0.2},
    "grouped heads, rotary": {"num_kv_heads": 1, "rope_theta": 100.0},
    "layer scale": {"layer_scale": 0.3},
    "recomputed": {"recompute": "qkv", "dropout": 0.1, "rope_theta": 10.0},
}


def compare(model, steps=3, x=X, memory=None, given=None, expected=None):
    """A few training forwards beside the reference."""
    leaves = [x] if memory is None else [x, memory]
    for step in range(steps):
        set_step(model, step)
        expected = (expected or {}) | {"plan": next_plan(model, x.shape[0])}
        ours = results(partial(model, **(given or {})), model, *leaves)
        assert_same(ours, results(partial(last_of_reference, model, **expected), model, *leaves))


def last_of_reference(model, *leaves, **inputs):
    return reference(model, *leaves, **inputs)[-1]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("target", ["layer", "branch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_pure_pytorch_stack(shape, target, granularity):
    compare(stack(**SHAPES[shape], target=target, granularity=granularity))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("target", ["layer", "branch"])
def test_layers_may_differ_in_their_dropout(target, granularity):
    model = stack(target=target, granularity=granularity, schedule=0.2)
    for number, layer in enumerate(model.layers):
        layer.dropout, layer.activation_dropout = 0.2 * number, 0.5 - 0.1 * number
    compare(model)


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
@pytest.mark.parametrize(
    ("granularity", "scale"),
    [("batch", "inverse"), ("batch", "eval"), ("sample", "inverse"), ("sample", "realized"), ("sample", "none")],
)
@pytest.mark.parametrize("norm_first", [True, False])
def test_schedules_samplings_and_scales(norm_first, granularity, scale, sampling):
    schedule = DropSchedule(4, linear(0.9))
    keywords = {"granularity": granularity, "scale": scale, "sampling": sampling, "norm_first": norm_first}
    model = stack(schedule=schedule, **keywords)
    if scale == "eval":
        model.eval()
        assert_same(results(model, model, X), results(lambda x: reference(model, x)[-1], model, X))
    else:
        compare(model, steps=4)


def padding():
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for sample, length in enumerate((7, 3, 5, 1, 6)):
        mask[sample, length:] = True
    return mask


CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
BIAS = tensor(BATCH, HEADS, LENGTH, LENGTH, seed=4)
MASKS = {
    "causal": ({"is_causal": True}, torch.where(CAUSAL, -INFINITY, 0.0)),
    "bool": ({"attn_mask": CAUSAL}, torch.where(CAUSAL, -INFINITY, 0.0)),
    "padding": ({"key_padding_mask": padding()}, torch.where(padding()[:, None, None], -INFINITY, 0.0)),
    "causal and padding": (
        {"is_causal": True, "key_padding_mask": padding()},
        torch.where(padding()[:, None, None] | CAUSAL, -INFINITY, 0.0),
    ),
    "additive, per head": ({"attn_mask": BIAS}, BIAS),
    "additive of torch's shape": ({"attn_mask": BIAS.flatten(0, 1)}, BIAS),
    "additive, per sample, and causal": (
        {"attn_mask": BIAS[:, 0], "is_causal": True},
        BIAS[:, :1] + torch.where(CAUSAL, -INFINITY, 0.0),
    ),
}


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("masks", MASKS)
def test_masks_of_the_kept_samples(masks, granularity):
    given, added = MASKS[masks]
    compare(stack(granularity=granularity), given=given, expected={"added": added.double()})


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("target", ["layer", "branch"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_cross_attention(norm_first, target, granularity):
    model = stack(cross_attention=True, norm_first=norm_first, target=target, granularity=granularity, dropout=0.2)
    blocked = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    blocked[1, 2:], blocked[4, 1:] = True, True
    added = torch.where(blocked[:, None, None], -INFINITY, 0.0).double()
    causal = torch.where(CAUSAL, -INFINITY, 0.0).double()
    given = {"is_causal": True, "memory_key_padding_mask": blocked}
    compare(model, memory=MEMORY, given=given, expected={"added": causal, "memory_added": added})


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_positions_of_the_kept_samples(granularity):
    positions = torch.arange(LENGTH) + torch.tensor([[0], [5], [2], [9], [1]])
    model = stack(rope_theta=100.0, granularity=granularity)
    compare(model, given={"position_ids": positions}, expected={"position_ids": positions})


@pytest.mark.parametrize("shape", ["pre-norm", "post-norm", "grouped heads, rotary", "dropout"])
def test_evaluation_runs_everything_and_advances_nothing(shape):
    model = stack(**SHAPES[shape], granularity="sample").eval()
    expected = results(lambda x: reference(model, x)[-1], model, X)
    assert_same(results(model, model, X), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected[0])
    model.train()(X)
    assert model.counters.forwards == 1


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_hidden_states_have_an_entry_a_layer(granularity, norm_first):
    keywords = {"granularity": granularity, "norm_first": norm_first, "hidden_states": True, "max_kept": 1}
    model = stack(6, schedule=[0.5, 1.0, 0.5, 0.5, 1.0, 0.5], **keywords)
    plan = next_plan(model)
    out, states = model(X)
    for ours, expected in zip(states, reference(model, X, plan=plan), strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(out, states[-1])
    kept = plan.layers
    assert len(kept) < 6
    for layer in set(range(1, 6)) - set(kept):
        assert torch.equal(states[layer], states[layer - 1])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_everything_dropped_is_a_differentiable_identity(granularity, norm_first):
    model = stack(schedule=1.0, granularity=granularity, norm_first=norm_first)
    out, (grad, *weights) = results(model, model, X)
    assert torch.equal(out, X)
    assert torch.equal(grad, tensor(*X.shape, seed=9))
    assert all(weight is None for weight in weights)
    assert saved_bytes(model, X) == 0
    assert model(X).data_ptr() != X.data_ptr()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_neither_input_nor_incoming_gradient_is_written(granularity, norm_first):
    model = stack(granularity=granularity, norm_first=norm_first, schedule=0.3)
    before, grad = X.detach().clone(), torch.ones_like(X)
    model(X).backward(grad)
    assert torch.equal(X, before)
    assert torch.equal(grad, torch.ones_like(grad))


def test_plans_are_those_that_a_user_can_draw():
    for target, repeats in (("layer", 1), ("branch", 2)):
        model = stack(schedule=[0.1, 0.9, 0.5, 0.3], granularity="sample", target=target, accumulation=2)
        for n in range(4):
            plan, step = model.plan(batch_size=BATCH), n // 2
            rates = torch.tensor([0.1, 0.9, 0.5, 0.3]).repeat_interleave(repeats)
            drawn = draw_plan(rates, BATCH, seed=10, step=step, stream=n % 2)
            assert torch.equal(plan.keep, drawn.keep)
            model(X)


def test_only_kept_layers_are_entered():
    model = stack(8, schedule=0.7)
    entered = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: entered.append(number))
    kept = model.plan().layers
    model(X)
    assert entered == kept
    assert 0 < len(kept) < 8


def test_stats_count_samples():
    model = stack(granularity="sample", sampling="systematic", schedule=[0.0, 0.2, 0.6, 1.0])
    for _ in range(3):
        model(X)
    stats = model.stats()
    assert stats.realized_rates.tolist() == pytest.approx([0.0, 0.2, 0.6, 1.0])
    assert (stats.layers_run, stats.layers_skipped) == (9, 3)
    weights = 4 * WIDTH**2 + 2 * WIDTH * 20
    assert stats.flops_skipped == pytest.approx(6 * weights * 3 * BATCH * LENGTH * 1.8)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_continue_alike(copied):
    model = stack(granularity="sample", dropout=0.2)
    model(X)
    twin = copied(model)
    for _ in range(3):
        torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)


def test_extract_cuts_it():
    model = stack(6, granularity="sample", schedule=DropSchedule(6, linear(0.5)))
    small = prune.extract(model.eval(), [0, 2, 5])
    expected = X
    for number in (0, 2, 5):
        expected = model.layers[number](expected)
    torch.testing.assert_close(small(X), expected)
    assert small.schedule(0).tolist() == [model.schedule(0)[i] for i in (0, 2, 5)]


def test_layers_are_shared_with_torch():
    layers = [
        nn.TransformerEncoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True, norm_first=True, dtype=torch.float64)
        for _ in range(3)
    ]
    model = TransformerStack.from_layers(layers, schedule=0.5, seed=1)
    assert {id(w) for w in model.parameters()} == {id(w) for layer in layers for w in layer.parameters()}
    kept = model.plan().layers
    expected = X
    for number in kept:
        expected = layers[number](expected)
    torch.testing.assert_close(model(X), expected)
    assert all(isinstance(layer, TransformerLayer) for layer in model.layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X[0]}, r"x: got \[7, 12\], expected \[B, S, 12\]"),
        ({"x": X[..., :8]}, r"x: got \[5, 7, 8\], expected \[B, S, 12\]"),
        ({"memory": MEMORY}, r"memory: got \[5, 4, 12\], expected none without cross_attention"),
        ({"attn_mask": CAUSAL[:3]}, r"attn_mask: got \[3, 7\], expected \[7, 7\], \[5, 7, 7\] or \[5, 2, 7, 7\]"),
        ({"key_padding_mask": padding()[:2]}, r"key_padding_mask: got \[2, 7\], expected \[5, 7\]"),
        ({"cu_seqlens": [0, 7]}, r"cu_seqlens: got x \[5, 7, 12\] and \[\], expected x \[1, N, D\]"),
        (
            {"x": X[:1], "cu_seqlens": [0, 9, 7]},
            r"cu_seqlens: got \[0, 9, 7\], expected ascending integers from 0 to 7",
        ),
        ({"x": X[:1], "cu_seqlens": [0, 7], "max_seqlen": 3}, "max_seqlen: got 3, expected at least 7"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(given, message):
    model = stack(granularity="sample")
    with pytest.raises(ValueError, match=message):
        model(**({"x": X} | given))
    assert model.counters.forwards == 0


def test_bad_settings_are_named():
    for keywords, message in (
        ({"target": "sublayer"}, r"target is 'sublayer', expected one of \('layer', 'branch', 'head', 'ffn_chunk'\)"),
        ({"num_kv_heads": 3}, "d_model 12, nhead 2, num_kv_heads 3: expected each to be a multiple of the next"),
        ({"activation": "elu"}, "activation is 'elu', expected one of"),
        ({"recompute": "all"}, r"recompute is 'all', expected one of \('qkv',\)"),
        ({"schedule": [0.1]}, "got 1 drop rates, expected 4"),
        ({"rope_theta": 10.0, "nhead": 4}, "rope_theta needs heads of even width, got 12 / 4 = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            stack(**keywords)
