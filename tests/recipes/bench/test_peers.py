"""The restated rules of other libraries do what those libraries publish."""

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropModuleList, LayerDropStack
from layerdrop_fast.recipes.bench.peers import Masked, Skip


class Counting(nn.Module):
    """A residual layer of one branch that counts how often it ran."""

    def __init__(self, width=4, end=None):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.end = end or nn.Identity()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.end(self.linear(x))


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_masked_keeps_or_zeroes_whole_samples(scale_by_keep):
    torch.manual_seed(0)
    branch = torch.randn(4000, 3, 2)
    out = Masked(0.3, scale_by_keep=scale_by_keep)(branch)
    factor = 1 / 0.7 if scale_by_keep else 1.0
    kept = out.abs().sum((1, 2)) > 0
    torch.testing.assert_close(out[kept], branch[kept] * factor)
    assert not out[~kept].any()
    # Four standard deviations of a binomial share of 4000.
    assert abs(kept.float().mean() - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_masked_by_batch_decides_once_for_all_samples():
    torch.manual_seed(0)
    mask, branch = Masked(0.5, "batch"), torch.ones(6, 2)
    seen = {tuple(mask(branch).flatten().tolist()) for _ in range(30)}
    assert seen == {(0.0,) * 12, (2.0,) * 12}


@pytest.mark.parametrize(("mode", "numbers"), [("row", 5), ("batch", 1)])
def test_masked_draws_as_published(mode, numbers):
    branch = torch.randn(5, 3)
    torch.manual_seed(3)
    mask = Masked(0.4, mode).mask(branch)
    torch.manual_seed(3)
    assert torch.equal(mask, torch.empty(numbers, 1).bernoulli_(0.6) / 0.6)


def test_masked_changes_nothing_in_evaluation_or_at_rate_0():
    branch = torch.randn(5, 3)
    assert Masked(0.9).eval()(branch) is branch
    assert Masked(0.0)(branch) is branch


def test_masked_at_rate_1_is_zero_not_nan():
    assert torch.equal(Masked(1.0)(torch.ones(5, 3)), torch.zeros(5, 3))


def test_masked_runs_what_it_drops_and_gives_it_zero_gradients():
    mask = Masked(0.5, "batch")
    mask.outcome = False
    layer, x = Counting(end=mask), torch.randn(2, 4)
    out = layer(x)
    out.sum().backward()
    assert layer.calls == 1
    assert torch.equal(out, x)
    assert torch.equal(layer.linear.weight.grad, torch.zeros(4, 4))


def test_masked_layers_equal_a_stack_that_scales_by_the_inverse_density():
    stack = LayerDropStack([Counting() for _ in range(6)], 0.5, scale="inverse", seed=1)
    kept = stack.plan().layers
    assert 0 < len(kept) < 6
    masked = x = torch.randn(2, 4)
    for index, layer in enumerate(stack.layers):
        mask = Masked(0.5, "batch")
        mask.outcome = index in kept
        masked = masked + mask(layer.linear(masked))
    torch.testing.assert_close(stack(x), masked)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_skip_yields_the_layers_above_p_of_one_vector(p):
    layers = [Counting() for _ in range(12)]
    skip, ours = Skip(p, layers), LayerDropModuleList(p, layers)
    for seed in range(20):
        torch.manual_seed(seed)
        uniform = torch.rand(12)
        after = torch.rand(())
        torch.manual_seed(seed)
        yielded = list(skip)
        assert torch.rand(()) == after  # it drew twelve numbers, no more
        assert [id(layer) for layer in yielded] == [id(layers[i]) for i in range(12) if uniform[i] > p]
        torch.manual_seed(seed)
        assert [id(layer) for layer in ours] == [id(layer) for layer in yielded]


def test_skip_draws_anew_each_time_and_yields_all_in_evaluation():
    layers = [Counting() for _ in range(12)]
    skip = Skip(0.5, layers)
    torch.manual_seed(0)
    assert len({tuple(map(id, skip)) for _ in range(10)}) > 5
    skip.eval()
    before = torch.get_rng_state()
    assert list(skip) == layers
    assert not torch.equal(torch.get_rng_state(), before)


def test_skip_does_not_call_what_it_drops():
    layers = [Counting() for _ in range(4)]
    skip, x = Skip(0.5, layers), torch.randn(2, 4)
    skip.keep([1, 2])
    for layer in skip:
        x = layer(x)
    x.sum().backward()
    assert [layer.calls for layer in layers] == [0, 1, 1, 0]
    assert [layer.linear.weight.grad is None for layer in layers] == [True, False, False, True]


@pytest.mark.parametrize("kept", [[], [0], [0, 3], [0, 1, 2, 3]])
def test_outcomes_replace_what_was_drawn_until_taken_back(kept):
    skip = Skip(0.5, [Counting() for _ in range(4)])
    skip.keep(kept)
    for _ in range(5):
        before = torch.get_rng_state()
        assert [id(layer) for layer in skip] == [id(skip[i]) for i in kept]
        assert not torch.equal(torch.get_rng_state(), before)  # the numbers are still drawn
    skip.keep(None)
    assert len({tuple(map(id, skip)) for _ in range(20)}) > 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"drop rate p must lie in \[0, 1\], got 1.5"):
        Skip(1.5, [])
    with pytest.raises(ValueError, match=r"drop rate p must lie in \[0, 1\], got -0.1"):
        Masked(-0.1)
    with pytest.raises(ValueError, match="mode is 'sample'"):
        Masked(0.1, "sample")
