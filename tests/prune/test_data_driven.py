"""DataDriven: rates that are learned, with a mean that stays."""

import math
import pickle

import pytest
import torch
from torch import nn

from layerdrop_fast import DropSchedule, LayerDropStack, TransformerStack, decreasing, uniform
from layerdrop_fast.prune import DataDriven, extract
from layerdrop_fast.prune.data_driven import HIGHEST_RATE, _rates


@pytest.mark.parametrize("mean", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_rates_have_the_mean_and_the_order_of_scores(mean, spread):
    scores = spread * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates = _rates(scores, mean)
    assert rates.mean().item() == pytest.approx(mean, rel=1e-9)
    assert 0 <= rates.min() <= rates.max() <= HIGHEST_RATE
    assert (rates[scores.argsort()].diff() >= 0).all()


def test_small_rates_are_a_softmax():
    scores = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_rates(scores, 1e-6), 8e-6 * scores.softmax(0), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("mean", [0.1, 0.6])
def test_rates_follow_scores_as_autograd_says(mean):
    scores = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: _rates(scores, mean), scores, eps=1e-6, atol=1e-7)


class Branch(nn.Module):
    """x + factor * fc2(tanh(fc1(x)))"""

    def __init__(self, width=6):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 8), nn.Linear(8, width)
        self.factor = torch.ones((), requires_grad=True)

    def forward(self, x):
        return x + self.factor * self.fc2(torch.tanh(self.fc1(x)))


class Gain(nn.Module):
    """x + gain"""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x + self.gain


GAINS = torch.tensor([1.0, -2.0, 0.5, 3.0])


def linear_loss(granularity="batch", sampling="bernoulli", every=1000, rate=0.5):
    """A loss that is linear in every decision, so that its slopes are known, and 200 steps of it."""
    stack = LayerDropStack(
        [Gain(gain) for gain in GAINS.tolist()], rate, granularity=granularity, sampling=sampling, seed=0
    )
    driven = DataDriven(stack, rate, every=every, width=1)
    nn.init.normal_(driven.score.weight)
    for _ in range(200):
        loss = stack(torch.zeros(8, 1, requires_grad=True))[:, 0]
        loss = loss.mean() if granularity == "batch" else loss
        loss.sum().backward()
        driven.backward(loss)
    return driven


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_the_slopes_are_those_of_the_loss(granularity):
    torch.manual_seed(0)
    driven = linear_loss(granularity, every=200)
    torch.testing.assert_close(driven.slopes, GAINS.double(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(driven.regression.normal[0, 0].item(), 200.0 * (8 if granularity == "sample" else 1))


def test_a_fixed_number_of_layers_shows_their_differences():
    """Systematic sampling keeps two of four layers in every step: only differences of slopes can be seen, or matter."""
    torch.manual_seed(0)
    slopes = linear_loss(sampling="systematic", every=200).slopes
    torch.testing.assert_close(slopes - slopes.mean(), (GAINS - GAINS.mean()).double(), rtol=0.05, atol=0.05)


def test_the_parameters_get_the_gradient_of_the_expected_loss():
    torch.manual_seed(0)
    driven = linear_loss(every=200)
    got, rates = driven.score.weight.grad.clone(), driven()
    driven.zero_grad()
    ((1 - rates) @ driven.slopes.float()).backward()
    assert got.abs().max() > 0.01
    torch.testing.assert_close(got, driven.score.weight.grad)


def test_earlier_steps_count_less():
    torch.manual_seed(0)
    stack = LayerDropStack([Gain(1.0), Gain(2.0)], 0.5, seed=0)
    driven = DataDriven(stack, 0.5, every=2, memory=10, width=1)
    for _ in range(6):
        stack(torch.zeros(1, 1, requires_grad=True))
        driven.backward(torch.ones(()))
    assert driven.regression.normal[0, 0].item() == pytest.approx(2 * (1 + math.exp(-0.2) + math.exp(-0.4)))
    assert driven.regression.normal[0, -1].item() == pytest.approx(driven.regression.normal[0, 0].item())


@pytest.mark.parametrize("kind", ["fused", "any layers"])
def test_layers_that_help_are_kept(kind):
    """Only two of six layers can learn: their rates fall, the mean stays, and dropped layers still cost nothing."""
    torch.manual_seed(0)
    if kind == "fused":
        stack = TransformerStack(6, 8, 2, 16, dropout=0.0, schedule=0.4, sampling="bernoulli", seed=1)
        layers = list(stack.layers)
    else:
        layers = [Branch(8) for _ in range(6)]
        stack = LayerDropStack(layers, 0.4, seed=1)
    for index, layer in enumerate(layers):
        for name, weight in layer.named_parameters():
            if name.rpartition(".")[0].endswith(("out_proj", "linear2", "fc2")):
                nn.init.zeros_(weight)
                weight.requires_grad_(index in (1, 4))
                if index not in (1, 4):
                    weight.requires_grad_(True).register_hook(torch.zeros_like)
    driven = DataDriven(stack, 0.4, every=5, width=8)
    optimizer = torch.optim.Adam([*stack.parameters(), *driven.parameters()], lr=0.01)
    x = torch.randn(8, 5, 8, requires_grad=True)
    target = torch.randn(8, 5, 8)
    for _ in range(300):
        optimizer.zero_grad()
        before = stack.counters.forwards
        loss = (stack(x) - target).square().mean()
        loss.backward()
        kept = stack.plan(before).layers
        assert [layer for layer in range(6) if next(layers[layer].parameters()).grad is not None] == kept
        driven.backward(loss)
        optimizer.step()
    rates = driven.rates
    assert rates.mean().item() == pytest.approx(0.4, abs=1e-5)
    assert driven.keep(2) == [1, 4]
    assert rates[[1, 4]].max() < 0.2 < rates[[0, 2, 3, 5]].min()
    assert stack.schedule(0).tolist() == pytest.approx(rates.tolist())
    assert len(extract(stack, driven.keep(2)).layers) == 2


def test_the_time_multiplier_stays():
    stack = LayerDropStack([Branch() for _ in range(3)], DropSchedule(3, uniform(0.1), decreasing(11)))
    DataDriven(stack, 0.6, width=6)
    assert stack.schedule(5).tolist() == pytest.approx([0.3] * 3)


def made(granularity="batch", targets=None):
    torch.manual_seed(0)
    if targets is None:
        stack = LayerDropStack([Branch() for _ in range(4)], 0.5, granularity=granularity, seed=2)
    else:
        stack = TransformerStack(4, 6, 2, 8, dropout=0.0, schedule=targets, seed=2)
    driven = DataDriven(stack, 0.5, every=4, width=6)
    return stack, driven, torch.optim.Adam([*stack.parameters(), *driven.parameters()], lr=0.05)


def steps(stack, driven, optimizer, numbers):
    for n in numbers:
        optimizer.zero_grad()
        out = stack(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(n)))
        losses = out.square().mean((1, 2))
        losses = losses if stack.granularity == "sample" else losses.mean()
        losses.mean().backward()
        driven.backward(losses)
        optimizer.step()


@pytest.mark.parametrize("at", [8, 9, 10])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_resumed_training_ends_as_an_unbroken_one(granularity, at):
    unbroken = made(granularity)
    steps(*unbroken, range(16))
    first = made(granularity)
    steps(*first, range(at))
    again = made(granularity)
    torch.randn(7)
    for one, other in zip(again, first, strict=True):
        one.load_state_dict(other.state_dict())
    assert again[0].schedule(0).tolist() == first[0].schedule(0).tolist()
    steps(*again, range(at, 16))
    assert unbroken[1].rates.std() > 0
    for name, value in unbroken[1].state_dict().items():
        assert torch.equal(again[1].state_dict()[name], value), name


def test_with_heads_and_chunks_the_rates_of_layers_are_learned():
    stack, driven, optimizer = made(targets={"layer": 0.5, "head": 0.3, "ffn_chunk": 0.2})
    steps(stack, driven, optimizer, range(12))
    assert driven.rates.std() > 0
    assert len(stack.rates(0)) == 4 + 4 * 2 + 4 * 8
    torch.testing.assert_close(torch.from_numpy(stack.rates(0)[:4]).float(), driven.rates)


def test_evaluation_is_not_looked_at_and_copies_look_at_nothing():
    stack, driven, _ = made()
    stack.eval()(100 * torch.ones(2, 6))
    assert not driven.activations.any()
    small = extract(stack, [0, 2])
    assert pickle.loads(pickle.dumps(small)).layers[0]._forward_hooks
    small.train()
    small.schedule = DropSchedule.of(0.0, 2)
    small(torch.ones(2, 6))
    assert not any(layer._forward_hooks for layer in small.layers)
    assert not driven.activations.any()
    assert all(layer._forward_hooks for layer in stack.layers)


def test_activations_are_a_running_mean_and_their_size_does_not_matter():
    torch.manual_seed(0)
    stack = LayerDropStack([Gain(1.0), Gain(-2.0)], 0.5, seed=0)
    driven = DataDriven(stack, 0.5, momentum=0.25, width=1)
    for gain in (1.0, 5.0):
        stack.layers[0].gain.data.fill_(gain)
        driven.looking.fill_(True)
        driven._take_up()
        stack.schedule = DropSchedule.of(0.0, 2)
        stack(torch.zeros(3, 1))
    torch.testing.assert_close(driven.activations, torch.tensor([[0.25 * 1 + 0.75 * 5], [-2.0]]))
    nn.init.normal_(driven.score.weight)
    before = driven()
    driven.activations[0] *= 10
    torch.testing.assert_close(driven(), before)
    driven.activations[0] *= -1
    assert not torch.allclose(driven(), before)


def test_it_looks_at_activations_now_and_then():
    torch.manual_seed(0)
    stack = LayerDropStack([Branch() for _ in range(3)], 0.0, seed=2)
    driven = DataDriven(stack, 0.5, every=2, momentum=0.5, width=6)
    x = torch.randn(4, 5, 6)
    states, seen = [], x
    for layer in stack.layers:
        before, seen = seen, layer(seen)
        states.append((seen - before).detach().mean((0, 1)))
    driven.activations.zero_()
    driven.looking.fill_(True)
    driven._take_up()
    stack.schedule = DropSchedule.of(0.0, 3)
    stack(x).sum().backward()
    torch.testing.assert_close(driven.activations, torch.stack(states))
    stack(2 * x).sum().backward()  # not looked at
    torch.testing.assert_close(driven.activations, torch.stack(states))
    assert not any(layer._forward_hooks for layer in stack.layers)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_of_a_transformer_stack_it_takes_what_each_layer_adds(granularity, norm_first):
    torch.manual_seed(0)
    stack = TransformerStack(
        4,
        8,
        2,
        16,
        schedule=0.3,
        granularity=granularity,
        scale="inverse",
        hidden_states=True,
        seed=1,
        norm_first=norm_first,
    )
    driven = DataDriven(stack, 0.3, momentum=0.0)
    x = torch.randn(6, 5, 8)
    _, states = stack(x)
    added = [(behind - before).mean((0, 1)) for before, behind in zip([x, *states], states, strict=False)]
    assert any(vector.any() for vector in added)
    torch.testing.assert_close(driven.activations, torch.stack(added).detach())


def test_a_stack_that_is_compiled_as_one_is_refused():
    stack, driven, _ = made(targets=0.5)
    stack.compile(backend="eager")
    with pytest.raises(RuntimeError, match="the stack is compiled as one, expected it not to be"):
        stack(torch.randn(3, 5, 6))
    with pytest.raises(RuntimeError, match="the stack is compiled as one, expected it not to be"):
        DataDriven(stack, 0.5)
    assert stack.counters.forwards == 0
    small = extract(stack, [0, 2])
    small.compile(backend="eager")
    small(torch.randn(3, 5, 6))
    assert not small._forward_pre_hooks
    assert not any(layer._forward_hooks for layer in small.layers)
    assert driven is not None  # which is looking


def test_of_equal_rates_the_first_layers_are_kept():
    driven = DataDriven(LayerDropStack([Branch() for _ in range(5)], 0.2), 0.5, width=6)
    assert driven.keep(2) == [0, 1]
    driven.rates.copy_(torch.tensor([0.9, 0.4, 0.4, 0.4, 0.4]))
    assert driven.keep(2) == [1, 2]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(target_rate=0.0), ValueError, r"target_rate is 0.0, expected a number in \(0, 0.95\)"),
        (dict(target_rate=1.0), ValueError, "target_rate is 1.0"),
        (dict(target_rate="x"), TypeError, "target_rate must be a number"),
        (dict(target_rate=0.5, every=0), ValueError, "every must be at least 1"),
        (dict(target_rate=0.5, hidden=0), ValueError, "hidden must be at least 1"),
        (dict(target_rate=0.5, memory=0), ValueError, "memory must be at least 1"),
        (
            dict(target_rate=0.5, width=None),
            ValueError,
            "width is None, expected the stream's last dimension: Branch has no d_model",
        ),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        DataDriven(LayerDropStack([Branch(), Branch()], 0.2), **(dict(width=6) | keywords))
    with pytest.raises(TypeError, match="stack: got Linear"):
        DataDriven(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("kept", [0, 3])
def test_keep_names_both_sides(kept):
    with pytest.raises(ValueError, match=r"kept (is|must be)"):
        DataDriven(LayerDropStack([Branch(), Branch()], 0.2), 0.5, width=6).keep(kept)
