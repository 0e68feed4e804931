"""The restated rules of other libraries do what those libraries publish."""

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropModuleList, LayerDropStack
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.bench.peers import Masked, RunAndDiscard, SampleSkip, Skip, Subset
from tests.recipes.bench.counting import Counting


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
    mask.keep(torch.tensor([False]))
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
        mask.keep(torch.tensor([index in kept]))
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


def test_skip_compares_in_float32_and_keeps_above_p(monkeypatch):
    p = 0.7
    nearest = torch.tensor(p)  # the float32 number is smaller than 0.7: p is rounded to it
    above = torch.nextafter(nearest, torch.tensor(1.0))
    below = torch.nextafter(nearest, torch.tensor(0.0))
    layers = [Counting() for _ in range(3)]
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor.copy_(torch.stack([below, nearest, above])))
    assert list(Skip(p, layers)) == [layers[2]]
    larger = torch.tensor(0.1)  # larger than 0.1, and p is rounded to it all the same
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor.copy_(larger.repeat(3)))
    assert list(Skip(0.1, layers)) == []


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


@pytest.mark.parametrize("kept", [[], [0], [0, 3], [0, 1, 2, 3], torch.tensor([1, 2])])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_outcomes_replace_what_was_drawn_until_taken_back(kept, p):
    skip = Skip(p, [Counting() for _ in range(4)])
    skip.keep(kept)
    for _ in range(5):
        before = torch.get_rng_state()
        assert [id(layer) for layer in skip] == [id(skip[i]) for i in kept]
        assert not torch.equal(torch.get_rng_state(), before)  # the numbers are still drawn
    skip.keep(None)
    assert (len({tuple(map(id, skip)) for _ in range(20)}) > 1) == (p < 1)


def test_discard_compares_python_floats_with_p_and_keeps_above_it(monkeypatch):
    p = 0.1
    nearest = torch.tensor(p)  # the float32 number is larger than 0.1
    below = torch.nextafter(nearest, torch.tensor(0.0))
    numbers = torch.stack([nearest, below, torch.tensor(0.0), torch.tensor(1.0)])
    monkeypatch.setattr(torch, "rand", lambda *args, **keywords: numbers.clone())
    discard, x = RunAndDiscard(p, [Counting() for _ in range(4)]), torch.randn(2, 4)
    assert torch.equal(discard(x), discard[3](discard[0](x)))
    discard.p = numbers[0].item()  # equal: dropped
    assert torch.equal(discard(x), discard[3](x))


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_discard_draws_one_vector_a_call_from_torch_or_its_generator(p):
    layers, x = [Counting() for _ in range(12)], torch.randn(2, 4)
    own = RunAndDiscard(p, layers, torch.Generator().manual_seed(0))
    for seed in range(10):
        torch.manual_seed(seed)
        uniform = torch.rand(12)
        after = torch.get_rng_state()
        expected = x
        for layer in [layer for layer, u in zip(layers, uniform.tolist(), strict=True) if u > p]:
            expected = layer(expected)
        torch.manual_seed(seed)
        assert torch.equal(RunAndDiscard(p, layers)(x), expected)
        assert torch.equal(torch.get_rng_state(), after)
        own.generator.manual_seed(seed)
        assert torch.equal(own(x), expected)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_discard_runs_all_layers_and_gives_dropped_ones_zero_gradients(kept):
    layers = [Counting() for _ in range(4)]
    discard = RunAndDiscard(0.5, layers)
    discard.keep(kept)
    x = torch.randn(2, 4, requires_grad=True)
    y = discard(x)
    y.square().sum().backward()
    got = [x.grad, *(layer.linear.weight.grad for layer in layers)]
    assert [layer.calls for layer in layers] == [1] * 4
    expected, x.grad = x, None
    for index in kept:
        expected = layers[index](expected)
    for layer in layers:
        layer.linear.weight.grad = torch.zeros(4, 4)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert got[0].equal(x.grad)
    for index, layer in enumerate(layers):
        assert torch.equal(got[1 + index], layer.linear.weight.grad)
        assert got[1 + index].any() == (index in kept)


def test_discard_runs_the_backward_of_dropped_layers():
    layers = [Counting() for _ in range(3)]
    seen = []
    for index, layer in enumerate(layers):
        layer.linear.register_full_backward_hook(lambda module, into, out, index=index: seen.append((index, out[0])))
    discard = RunAndDiscard(0.5, layers)
    discard.keep([1])
    discard(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert [(index, bool(grad.any())) for index, grad in seen] == [(2, False), (1, True), (0, False)]


def test_discard_saves_what_every_layer_saves():
    # A tanh's output a layer, and the stream that enters it: after a dropped one, the same stream.
    discard, x = RunAndDiscard(0.5, [Counting(end=nn.Tanh()) for _ in range(4)]), torch.randn(2, 4, requires_grad=True)
    numbers = {}
    for kept in ([], [0], [1, 3], [0, 1, 2, 3]):
        discard.keep(kept)
        numbers[len(kept)] = saved_bytes(discard, x) / x.nbytes
    assert numbers == {0: 4 + 1, 1: 4 + 2, 2: 4 + 2, 4: 4 + 4}
    assert saved_bytes(discard.eval(), x) == 8 * x.nbytes


@pytest.mark.parametrize("rule", [Skip(0.5, [nn.Identity()] * 3), RunAndDiscard(0.5, [nn.Identity()] * 3)])
def test_layers_beyond_the_list_are_refused(rule):
    with pytest.raises(ValueError, match="layers: got index 3, expected indices below 3"):
        rule.keep([0, 3])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"drop rate p must lie in \[0, 1\], got 1.5"):
        Skip(1.5, [])
    with pytest.raises(ValueError, match=r"drop rate p must lie in \[0, 1\], got -0.1"):
        Masked(-0.1)
    with pytest.raises(ValueError, match="mode is 'sample'"):
        Masked(0.1, "sample")
    for rule in (SampleSkip, Subset, lambda p: RunAndDiscard(p, [])):
        with pytest.raises(ValueError, match=r"drop rate p must lie in \[0, 1\], got 1.5"):
            rule(1.5)
    with pytest.raises(ValueError, match=r"seed is -1, expected an integer in \[0, 2\*\*64\)"):
        SampleSkip(0.1, -1)
