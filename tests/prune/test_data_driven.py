"""DataDriven: rates that are learned, with a mean that stays."""

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


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_gradients_of_weights_hold_the_derivative_by_a_factor(granularity):
    torch.manual_seed(0)
    stack = LayerDropStack([Branch() for _ in range(5)], 0.5, granularity=granularity, seed=4).double()
    driven = DataDriven(stack, 0.5, every=1000)
    stack(torch.randn(4, 6, dtype=torch.float64, requires_grad=True)).square().sum().backward()
    driven.backward()
    ran = [layer.factor.grad is not None for layer in stack.layers]
    assert any(ran)
    assert granularity == "sample" or not all(ran)
    expected = torch.stack([torch.zeros(()) if f.grad is None else f.grad for f in (la.factor for la in stack.layers)])
    torch.testing.assert_close(driven.derivatives, expected / 0.5)


def test_the_parameters_get_the_derivative_of_the_expected_loss():
    """A loss that is linear in every gate: its expectation is known for all rates."""
    torch.manual_seed(0)
    gains = torch.tensor([1.0, -2.0, 0.5, 3.0])

    class Gain(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.fc2 = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.fc2.weight, gain)

        def forward(self, x):
            return x + self.fc2(torch.ones_like(x))

    stack = LayerDropStack([Gain(gain) for gain in gains.tolist()], 0.5, seed=0)
    driven = DataDriven(stack, 0.5, every=4000)
    nn.init.normal_(driven.score.weight)
    x = torch.zeros(1, 1, requires_grad=True)
    stack(x).sum().backward()
    for _ in range(4000):
        for weight in stack.parameters():
            weight.grad = None
        stack(x).sum().backward()
        driven.backward()
    got = driven.score.weight.grad.clone()
    driven.zero_grad()
    (-(gains * driven()).sum()).backward()
    torch.testing.assert_close(got, driven.score.weight.grad, rtol=0.15, atol=0.02)


@pytest.mark.parametrize("kind", ["fused", "any layers"])
def test_layers_that_help_are_kept(kind):
    """Only two of six layers can learn: their rates fall, the mean stays, and dropped layers still cost nothing."""
    torch.manual_seed(0)
    if kind == "fused":
        stack = TransformerStack(6, 8, 2, 16, dropout=0.0, schedule=0.4, sampling="bernoulli", seed=1)
        layers = list(stack.layers)
        ends = ("out_proj", "linear2")
    else:
        layers = [Branch(8) for _ in range(6)]
        stack, ends = LayerDropStack(layers, 0.4, seed=1), ("fc2",)
    for index, layer in enumerate(layers):
        for name, weight in layer.named_parameters():
            if name.rpartition(".")[0].endswith(ends):
                nn.init.zeros_(weight)
                weight.requires_grad_(index in (1, 4))
                if index not in (1, 4):
                    weight.requires_grad_(True).register_hook(torch.zeros_like)
    driven = DataDriven(stack, 0.4, every=5, ends=ends)
    optimizer = torch.optim.Adam([*stack.parameters(), *driven.parameters()], lr=0.01)
    x = torch.randn(8, 5, 8, requires_grad=True)
    target = torch.randn(8, 5, 8)
    for _ in range(300):
        optimizer.zero_grad()
        before = stack.counters.forwards
        (stack(x) - target).square().mean().backward()
        kept = stack.plan(before).layers
        assert [layer for layer in range(6) if next(layers[layer].parameters()).grad is not None] == kept
        driven.backward()
        optimizer.step()
    rates = driven.rates
    assert rates.mean().item() == pytest.approx(0.4, abs=1e-5)
    assert driven.keep(2) == [1, 4]
    assert rates[[1, 4]].max() < 0.2 < rates[[0, 2, 3, 5]].min()
    assert stack.schedule(0).tolist() == pytest.approx(rates.tolist())
    assert len(extract(stack, driven.keep(2)).layers) == 2


def test_the_time_multiplier_stays():
    stack = LayerDropStack([Branch() for _ in range(3)], DropSchedule(3, uniform(0.1), decreasing(11)))
    DataDriven(stack, 0.6)
    assert stack.schedule(5).tolist() == pytest.approx([0.3] * 3)


def test_it_is_saved_and_resumed():
    def made():
        torch.manual_seed(0)
        stack = LayerDropStack([Branch() for _ in range(4)], 0.5, seed=2)
        driven = DataDriven(stack, 0.5, every=2)
        return stack, driven, torch.optim.Adam([*stack.parameters(), *driven.parameters()], lr=0.05)

    def steps(stack, driven, optimizer, count):
        for n in range(count):
            optimizer.zero_grad()
            stack(torch.randn(4, 6, generator=torch.Generator().manual_seed(n))).square().mean().backward()
            driven.backward()
            optimizer.step()

    stack, driven, optimizer = made()
    steps(stack, driven, optimizer, 8)
    assert driven.rates.std() > 0
    other_stack, other, _ = made()
    other_stack.load_state_dict(stack.state_dict())
    other.load_state_dict(driven.state_dict())
    assert torch.equal(other.rates, driven.rates)
    assert other_stack.schedule(0).tolist() == stack.schedule(0).tolist()
    torch.testing.assert_close(other(), driven())


def test_it_looks_at_activations_now_and_then():
    torch.manual_seed(0)
    stack = LayerDropStack([Branch() for _ in range(3)], 0.0, seed=2)
    driven = DataDriven(stack, 0.5, every=2, momentum=0.5)
    stack.schedule = DropSchedule.of(0.0, 3)
    x = torch.randn(4, 5, 6)
    states, seen = [], x
    for layer in stack.layers:
        before, seen = seen, layer(seen)
        states.append((seen - before).detach().mean((0, 1)))
    driven.activations.zero_()
    driven._look()
    stack(x).sum().backward()
    torch.testing.assert_close(driven.activations, torch.stack(states))
    stack(2 * x).sum().backward()  # not looked at
    torch.testing.assert_close(driven.activations, torch.stack(states))
    assert not any(layer._forward_hooks for layer in stack.layers)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(target_rate=0.0), ValueError, r"target_rate is 0.0, expected a number in \(0, 0.95\)"),
        (dict(target_rate=1.0), ValueError, "target_rate is 1.0"),
        (dict(target_rate="x"), TypeError, "target_rate must be a number"),
        (dict(target_rate=0.5, every=0), ValueError, "every must be at least 1"),
        (dict(target_rate=0.5, hidden=0), ValueError, "hidden must be at least 1"),
        (dict(target_rate=0.5, ends=("x",)), ValueError, r"layer 0 has linear maps \['fc1', 'fc2'\], expected one"),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        DataDriven(LayerDropStack([Branch(), Branch()], 0.2), **keywords)
    with pytest.raises(TypeError, match="stack: got Linear"):
        DataDriven(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("kept", [0, 3])
def test_keep_names_both_sides(kept):
    with pytest.raises(ValueError, match="kept (is|must be)"):
        DataDriven(LayerDropStack([Branch(), Branch()], 0.2), 0.5).keep(kept)
