"""The restated rules that decide for each sample, and what all rules share."""

import pytest
import torch
from torch import nn

from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.bench.peers import RunAndDiscard, SampleSkip, Skip, Subset
from tests.recipes.bench.counting import Counting


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_discard_and_samples_draw_nothing_in_evaluation_or_at_rate_0(p):
    layers, x = [Counting() for _ in range(2)], torch.randn(3, 4)
    discard, skip, subset = RunAndDiscard(p, layers), SampleSkip(p), Subset(p)
    for rule in (discard, skip, subset):
        rule.train(p == 0)
    skip.inferred = None
    before, private = torch.get_rng_state(), skip.generator.get_state()
    assert torch.equal(discard(x), layers[1](layers[0](x)))
    assert torch.equal(skip(layers[0], x), layers[0](x))
    assert torch.equal(subset(x, layers[0].linear), layers[0](x))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(skip.generator.get_state(), private)
    assert skip.inferred == 1
    assert skip(lambda x: x, x) is x


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_are_dropped_where_the_private_generator_says(p, dtype):
    layer, x = Counting().to(dtype), torch.randn(7, 3, 4, dtype=dtype)
    skip, generator = SampleSkip(p, seed=5), torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(20):
        dropped = torch.bernoulli(torch.full([7], p), generator=generator).bool()
        layer.calls, seen = 0, []
        hook = layer.linear.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0]))
        y = skip(layer, x)
        hook.remove()
        assert layer.calls == (not dropped.all())
        assert torch.equal(y[dropped], x[dropped])
        if layer.calls:
            assert torch.equal(seen[0], x[~dropped])
            torch.testing.assert_close(y[~dropped], layer(x[~dropped]), rtol=0, atol=0)
        torch.testing.assert_close(skip.inferred.double(), (~dropped).double().mean(), rtol=0, atol=2e-2)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_without_a_seed_share_torchs_default_seed():
    x = torch.randn(64, 2)
    assert torch.equal(SampleSkip(0.5)(torch.zeros_like, x), SampleSkip(0.5)(torch.zeros_like, x))
    assert not torch.equal(SampleSkip(0.5, 0)(torch.zeros_like, x), SampleSkip(0.5, 1)(torch.zeros_like, x))


@pytest.mark.parametrize("kept", [[], [6], [5, 0, 3], list(range(7)), torch.tensor([1, 4])])
def test_samples_given_are_kept_until_taken_back(kept):
    layer, x = Counting(), torch.randn(7, 3, 4, requires_grad=True)
    skip, drawn = SampleSkip(0.5, seed=0), SampleSkip(0.5, seed=0)
    skip.keep(kept)
    for size in (7, 7, 9):
        batch = torch.cat([x, x[:2] + 1])[:size]
        rows = torch.zeros(size, dtype=torch.bool)
        rows[kept] = True
        y = skip(layer, batch)
        drawn(torch.ones_like, batch)
        expected = torch.where(rows[:, None, None], layer(batch), batch)
        torch.testing.assert_close(y, expected)
    # Only what was called has gradients.
    layer.zero_grad(set_to_none=True)
    skip(layer, x).sum().backward()
    assert (layer.linear.weight.grad is None) == (len(kept) == 0)
    assert torch.equal((x.grad != 1).flatten(1).any(1), rows[:7])
    drawn(torch.ones_like, x)
    skip.keep(None)
    assert torch.equal(skip(torch.zeros_like, x), drawn(torch.zeros_like, x))  # the numbers were drawn all the time


def test_samples_none_of_which_is_kept_are_a_copy():
    x = torch.randn(3, 4, requires_grad=True)
    y = SampleSkip(1.0)(None, x)
    assert torch.equal(y, x)
    assert y is not x
    assert y.data_ptr() != x.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4))


def test_samples_save_what_the_layer_saves_of_the_kept():
    # For each kept sample the linear's input and a tanh's output, and its index.
    layer, skip, x = Counting(end=nn.Tanh()), SampleSkip(0.5), torch.randn(7, 3, 4, requires_grad=True)
    for count in range(8):
        skip.keep(range(count))
        assert saved_bytes(skip, layer, x) == count * (2 * x[0].nbytes + 8)


@pytest.mark.parametrize(
    ("p", "counts"),
    [
        (0.1, {1: 1, 2: 1, 4: 3, 8: 7, 16: 14, 32: 28}),
        (0.5, {1: 1, 2: 1, 3: 1, 5: 2, 8: 4}),
        (0.99, {1: 1, 64: 1}),
        (1.0, {1: 1, 8: 1}),
    ],
)
def test_a_subset_is_the_head_of_a_permutation(p, counts):
    branch, subset = Counting().linear, Subset(p)
    for samples, count in counts.items():
        x = torch.randn(samples, 3, 4)
        torch.manual_seed(samples)
        rows = torch.randperm(samples)[:count]
        after = torch.get_rng_state()
        torch.manual_seed(samples)
        y = subset(x, branch)
        assert torch.equal(torch.get_rng_state(), after)
        expected = x.clone()
        expected[rows] += branch(x[rows]) * (samples / count)
        torch.testing.assert_close(y, expected)
        left = torch.ones(samples, dtype=torch.bool).index_fill_(0, rows, False)
        assert torch.equal(y[left], x[left])


def test_a_subset_is_drawn_anew_for_each_branch_and_leaves_x_alone():
    x, subset = torch.randn(8, 2), Subset(0.5)
    before = x.clone()
    seen = {tuple(subset(x, torch.ones_like).ne(x).any(1).tolist()) for _ in range(10)}
    assert len(seen) > 3
    assert torch.equal(x, before)


def test_a_subset_is_unbiased():
    torch.manual_seed(0)
    x, subset = torch.zeros(5, 1), Subset(0.5)
    added = torch.stack([subset(x, torch.ones_like) for _ in range(4000)])
    assert set(added.unique().tolist()) == {0.0, 2.5}
    # Four standard deviations of the mean of 4000 draws of 2.5 with probability 2/5.
    assert (added.mean(0) - 1).abs().max() < 4 * 2.5 * (0.4 * 0.6 / 4000) ** 0.5


@pytest.mark.parametrize("given", [[6, 1, 3], torch.tensor([0, 5, 2])])
def test_a_subset_given_is_taken_until_taken_back(given):
    branch, subset, x = Counting().linear, Subset(0.5), torch.randn(7, 3, 4, requires_grad=True)
    subset.keep(given, 7)
    seen = []
    branch.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for _ in range(3):
        before = torch.get_rng_state()
        y = subset(x, branch)
        assert not torch.equal(torch.get_rng_state(), before)  # the permutation is still drawn
        assert torch.equal(seen[-1], x[given])
    rows = torch.zeros(7, 1, 1).index_fill_(0, torch.as_tensor(given), 7 / 3)
    torch.testing.assert_close(y, x + rows * branch(x))
    y.sum().backward()
    got, x.grad = x.grad, None
    (x + rows * branch(x)).sum().backward()
    torch.testing.assert_close(got, x.grad)
    subset.keep(None)
    assert len({tuple(subset.rows(x).tolist()) for _ in range(10)}) > 3


def test_a_subset_saves_its_rows_and_the_branch_result():
    # For each of k samples the linear's input and its output; the whole permutation.
    branch, x = nn.Linear(4, 4), torch.randn(8, 3, 4, requires_grad=True)
    for p, count in {0.1: 7, 0.5: 4, 0.8: 1}.items():
        assert saved_bytes(Subset(p), x, branch) == count * 2 * x[0].nbytes + 8 * 8


def test_a_subset_adds_in_the_dtype_of_x():
    x, branch = torch.randn(4, 3, dtype=torch.bfloat16), nn.Linear(3, 3)
    y = Subset(0.5)(x, lambda rows: branch(rows.float()))
    assert y.dtype == torch.bfloat16


def test_a_subset_of_no_samples_is_empty():
    assert Subset(0.5)(torch.randn(0, 4), nn.Linear(4, 4)).shape == (0, 4)


@pytest.mark.parametrize("layer", ["encoder", "counting"])
def test_compiled_layers_give_the_same(layer):
    torch._dynamo.reset()
    eager = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    eager = eager if layer == "encoder" else Counting(8)
    compiled = torch.compile(eager, backend="aot_eager")
    x = torch.randn(6, 3, 8)

    def results(function):
        discard, skip, subset = RunAndDiscard(0.5, [function] * 3), SampleSkip(0.5, seed=1), Subset(0.5)
        torch.manual_seed(4)
        eager.zero_grad()
        inputs = x.clone().requires_grad_()
        out = discard(inputs)
        for _ in range(3):
            out = subset(skip(function, out), function)
        out.sum().backward()
        return [out, inputs.grad, *(parameter.grad.clone() for parameter in eager.parameters())]

    for got, expected in zip(results(compiled), results(eager), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.cuda
def test_a_gpu_takes_the_decisions_of_the_cpu():
    layers, x = [nn.Linear(4, 4) for _ in range(4)], torch.randn(8, 4)

    def results(device):
        discard, skip, subset = RunAndDiscard(0.5, layers).to(device), SampleSkip(0.5, seed=1), Subset(0.5)
        torch.manual_seed(4)
        subset.keep([5, 0, 7, 2], 8)
        out = subset(skip(layers[0], discard(x.to(device))), layers[1])
        subset.keep(torch.tensor([1, 2, 3, 4], device=device), 8)
        skip.keep(torch.tensor([1, 2], device=device))
        return subset(skip(layers[0], out), layers[1]).cpu()

    torch.testing.assert_close(results("cpu"), results("cuda"))


@pytest.mark.parametrize("rule", [Skip(0.5, [nn.Identity()] * 9), RunAndDiscard(0.5, []), SampleSkip(1.0), Subset(1.0)])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1, 1], ValueError, r"got \[1, 1\], expected distinct indices from 0 on"),
        ([-1], ValueError, r"got \[-1\], expected distinct indices from 0 on"),
        ([0.5], TypeError, "must be an integer, got 0.5"),
        (torch.tensor([True, False]), TypeError, "got torch.bool, expected torch.int64"),
        (torch.tensor([[0]]), ValueError, r"got \[1, 1\], expected \[k\]"),
    ],
)
def test_bad_indices_are_refused_and_change_nothing(rule, given, error, message):
    before = dict(vars(rule))
    with pytest.raises(error, match=message):
        rule.keep(given)
    assert dict(vars(rule)) == before


def test_rows_that_do_not_fit_the_batch_are_refused():
    x, skip, subset = torch.randn(8, 4), SampleSkip(0.5), Subset(0.5)
    skip.keep([0, 8])
    with pytest.raises(ValueError, match="rows: got index 8, expected indices below 8"):
        skip(torch.ones_like, x)
    with pytest.raises(ValueError, match="rows: got index 8, expected indices below 8"):
        subset.keep([0, 1, 2, 8], 8)
    with pytest.raises(ValueError, match="got 3, expected k = 4 of 8 samples"):
        subset.keep([0, 1, 2], 8)
    assert subset.kept is None


@pytest.mark.parametrize("rule", [RunAndDiscard(0.0, []), SampleSkip(0.0), Subset(0.0)])
def test_there_is_nothing_to_override_at_rate_0(rule):
    rule.keep(None)
    with pytest.raises(ValueError, match="p is 0, where nothing is drawn"):
        rule.keep([])
