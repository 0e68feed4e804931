"""TransformerLM: shapes, drops, cuts, and the options that go to its stack."""

import pytest
import torch
from torch.nn import functional as F

from layerdrop_fast import prune
from layerdrop_fast.models import TransformerLM


def lm(**changes):
    torch.manual_seed(0)
    arguments = {"dropout": 0.0, "schedule": 0.0, "max_len": 12, "seed": 3} | changes
    sizes = {"vocab_size": 11, "d_model": 8, "nhead": 2, "num_layers": 4, "dim_feedforward": 16}
    sizes |= {name: arguments.pop(name) for name in list(arguments) if name in sizes}
    return TransformerLM(**sizes, **arguments)


def tokens(batch=3, length=9, vocab=11):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(5))


def test_logits_have_the_promised_shape_and_dtype():
    logits = lm()(tokens())
    assert logits.shape == (3, 9, 11)
    assert logits.dtype == torch.float32


def test_a_position_sees_no_later_token():
    model, before = lm().eval(), tokens()
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 11
    changed = (model(before) - model(after)).abs().amax(dim=(0, 2))
    assert changed[:5].max() == 0
    assert changed[5:].min() > 0


def test_positions_matter():
    logits = lm().eval()(torch.full((1, 6), 4))
    assert (logits[0, 0] - logits[0, 5]).abs().max() > 1e-3


def test_with_rotary_positions_none_are_learned():
    model = lm(rope_theta=100.0, max_len=None, nhead=1).eval()
    assert not any("position" in name for name in model.state_dict())
    batch = tokens(1, 40)
    logits = model(batch)
    swapped = model(batch[:, [1, 0, *range(2, 40)]])
    assert (logits[0, 5:] - swapped[0, 5:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"\[1, 40\], expected \[B, S\] with S <= 12"):
        lm(rope_theta=100.0)(batch)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "sample", "target": "branch", "scale": "inverse", "max_kept": 1},
        {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1, "rope_theta": 10.0, "recompute": "qkv"},
        {"dropout": 0.2, "activation_dropout": 0.3, "attention_dropout": 0.4},
    ],
)
def test_options_reach_the_stack(options):
    model = lm(**options)
    layer = model.stack.layers[0]
    layer.attention_dropout, layer.num_kv_heads = layer.self_attn.dropout, layer.self_attn.num_kv_heads
    for name, value in options.items():
        assert getattr(model.stack if hasattr(model.stack, name) else layer, name) == value
    assert type(model.norm) is type(layer.norm1)
    model(tokens()).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_dropout_alone_is_behind_embeddings_and_branches():
    layer = lm(dropout=0.3).stack.layers[0]
    assert (layer.dropout, layer.activation_dropout, layer.self_attn.dropout) == (0.3, 0.0, 0.0)


@pytest.mark.parametrize("num_layers", [1, 16, 40])
def test_the_first_loss_is_near_that_of_guessing(num_layers):
    model = lm(num_layers=num_layers, d_model=32, nhead=4, dim_feedforward=64)
    batch = tokens(64, 12)
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    # Unit logits: ln(11) + 1/2.
    assert loss.item() == pytest.approx(2.4 + 0.5, abs=0.25)


@pytest.mark.parametrize("num_layers", [1, 16])
def test_what_ends_a_branch_starts_smaller_the_more_there_are(num_layers):
    model = lm(num_layers=num_layers, d_model=64, nhead=4, dim_feedforward=256, vocab_size=500).eval()
    assert model.token_embedding.weight.std().item() == pytest.approx(0.5, rel=0.02)
    for layer in model.stack.layers:
        for weight in (layer.self_attn.out_proj.weight, layer.linear2.weight):
            assert weight.std().item() == pytest.approx((2 * num_layers * weight.shape[1]) ** -0.5, rel=0.05)
        assert layer.linear1.weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_a_dropped_layer_gets_no_gradient_and_a_kept_one_does():
    model = lm(schedule=0.5, num_layers=8, seed=0)
    kept = model.stack.plan().layers
    assert 0 < len(kept) < 8
    model(tokens()).sum().backward()
    for index, layer in enumerate(model.stack.layers):
        gradients = [weight.grad for weight in layer.parameters()]
        assert all((gradient is not None) == (index in kept) for gradient in gradients)


def test_decisions_follow_the_seed_and_not_torch_s_generator():
    first, second = lm(schedule=0.5, num_layers=8), lm(schedule=0.5, num_layers=8)
    torch.manual_seed(99)
    assert [first.stack.plan(n).layers for n in range(20)] == [second.stack.plan(n).layers for n in range(20)]


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_a_cut_model_is_the_model_of_the_kept_layers(kept):
    model = lm(schedule=0.2).eval()
    keep = prune.every_other(4, kept=kept)
    small = prune.extract(model, keep).eval()
    assert len(small.stack.layers) == kept
    x = model.token_embedding(tokens()) + model.position_embedding.weight[:9]
    for index in keep:
        x = model.stack.layers[index](x, is_causal=True)
    torch.testing.assert_close(small(tokens()), model.head(model.norm(x)), rtol=0, atol=0)


def test_the_state_dict_restores_weights_and_counters():
    model, other = lm(schedule=0.5), lm(schedule=0.5, seed=4)
    model(tokens())
    other.load_state_dict(model.state_dict())
    assert other.stack.counters.forwards == 1
    torch.testing.assert_close(other.train()(tokens()), model.train()(tokens()), rtol=0, atol=0)


def test_dropout_acts_in_training_only():
    model = lm(dropout=0.5)
    assert (model(tokens()) - model(tokens())).abs().max() > 0
    model.eval()
    assert (model(tokens()) - model(tokens())).abs().max() == 0


def test_dropout_acts_behind_the_embeddings():
    model = lm(dropout=0.5, schedule=1.0, d_model=64, nhead=4)  # no layer runs
    assert (model._stream(tokens(), None) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (model.eval().token_embedding(tokens()) == 0).sum() == 0


def test_gradients_agree_with_finite_differences():
    model = lm(num_layers=2).double().eval()
    weight = model.stack.layers[1].linear1.weight
    batch = tokens(2, 5)

    def loss(changed):
        return torch.func.functional_call(model, {"stack.layers.1.linear1.weight": changed}, (batch,)).square().sum()

    torch.autograd.gradcheck(loss, (weight.detach().clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead": 3}, "d_model is 8, expected a multiple of nhead, 3"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ({"schedule": -0.1}, "drop rate"),
        ({"scale": "half"}, "scale is 'half'"),
        ({"max_len": None}, "max_len is None without rope_theta, expected how many positions there are"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        lm(**changes)


def test_a_sequence_that_is_too_long_is_refused_and_counts_nothing():
    model = lm(schedule=0.5)
    with pytest.raises(ValueError, match=r"\[1, 13\], expected \[B, S\] with S <= 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    assert model.stack.counters.forwards == 0
