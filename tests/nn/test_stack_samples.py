"""Decisions per sample, against a loop in plain PyTorch over the plan that was drawn beforehand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import DropSchedule, LayerDropStack, decreasing, linear
from layerdrop_fast.prune import extract
from tests.nn.residual import Block, gradients, stack

B = 7
X = torch.randn(B, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Masked(Block):
    """Uses a mask [B, 1, S, S], position ids [B, S] and rotary tables (cos, sin) [S, D], all per layer call."""

    def forward(self, x, mask, tables, position_ids=None, extra=None):
        cos, sin = tables
        weights = (x @ x.transpose(1, 2)).masked_fill(mask[:, 0], -30.0).softmax(-1)
        shift = position_ids[..., None] * 0.1 + extra["bias"][0][:, None]
        return super().forward(x) + weights @ (x * cos) + shift * sin, "attention"


def arguments(batch=B):
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(batch, 1, 3, 3, generator=generator) < 0.3
    tables = tuple(torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    bias = torch.randn(batch, 8, dtype=torch.float64, generator=generator)
    return (mask, tables), dict(position_ids=torch.arange(batch * 3).reshape(batch, 3), extra={"bias": [bias]})


def per_sample(args, kwargs, sample):
    """The arguments of one sample."""
    (mask, tables), one = args, slice(sample, sample + 1)
    positions, bias = kwargs["position_ids"][one], kwargs["extra"]["bias"][0][one]
    return (mask[one], tables), dict(position_ids=positions, extra={"bias": [bias]})


def by_sample(model, x, plan, args=(), kwargs=None, scale="none", rates=None):
    """Each sample through the layers that it keeps, one at a time; and the stream behind each layer."""
    states = []
    for index, layer in enumerate(model.layers):
        rows, factor = plan.keep[index].nonzero()[:, 0].tolist(), 1.0
        if rows and scale != "none":
            factor = len(x) / len(rows) if scale == "realized" else 1 / (1 - rates[index])
        parts = list(x.split(1))
        for sample in rows:
            own = per_sample(args, kwargs, sample) if args else ((), {})
            y = layer(parts[sample], *own[0], **own[1])
            y = y[0] if isinstance(y, tuple) else y
            parts[sample] = parts[sample] + factor * (y - parts[sample])
        x = torch.cat(parts)
        states.append(x)
    return x, states


def all_gradients(out, model, *inputs):
    return torch.autograd.grad(out.square().sum(), [*inputs, *model.parameters()], allow_unused=True)


def assert_same(got, expected, exactly=False):
    tolerance = dict(rtol=0, atol=0) if exactly else dict(rtol=1e-10, atol=1e-10)
    assert [g is None for g in got] == [e is None for e in expected]
    torch.testing.assert_close([g for g in got if g is not None], [e for e in expected if e is not None], **tolerance)


def sampled(count=6, schedule=0.5, **keywords):
    return stack(count, schedule, granularity="sample", **keywords)


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
@pytest.mark.parametrize("scale", ["none", "inverse", "realized"])
def test_equals_a_loop_over_samples(scale, sampling):
    rates = [0.0, 0.3, 0.5, 0.9, 1.0, 0.6]
    model = sampled(schedule=rates, scale=scale, sampling=sampling, kind=Masked, hidden_states=True)
    args, kwargs = arguments()
    x, bias = X.clone().requires_grad_(), kwargs["extra"]["bias"][0].requires_grad_()
    for n in range(6):
        plan = model.plan(batch_size=B)
        for index, layer in enumerate(model.layers):
            layer.requires_grad_(index != n)
        got, states = model(x, *args, **kwargs)
        expected, by_hand = by_sample(model, x, plan, args, kwargs, scale, rates)
        torch.testing.assert_close([got, *states], [expected, *by_hand], rtol=1e-12, atol=1e-12)
        weights = nn.ModuleList(layer for index, layer in enumerate(model.layers) if index != n)
        ours, theirs = (all_gradients(out, weights, x, bias) for out in (got, expected))
        assert_same(ours, theirs)
        dropped = [index for index in range(6) if index != n and not plan.kept_counts[index]]
        assert [g is None for g in ours[2::2]] == [index in dropped for index in range(6) if index != n]
        assert 4 in [*dropped, n]


def test_a_layer_sees_its_kept_samples_only():
    model, seen = sampled(schedule=[0.0, 0.5, 0.6, 0.7, 0.9, 1.0]), []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, inputs, out, index=index: seen.append((index, inputs[0], out)))
    plan = model.plan(batch_size=B)
    _, states = by_sample(model, X, plan)
    seen.clear()
    model(X)
    assert [index for index, _, _ in seen] == plan.layers
    for index, part, out in seen:
        keep, before = plan.keep[index], states[index - 1] if index else X
        torch.testing.assert_close(part, before[keep])
        torch.testing.assert_close(out, states[index][keep])
    assert any(0 < len(part) < B for _, part, _ in seen)


def test_dropped_samples_pass_bit_for_bit_and_cost_no_forward():
    model = sampled(1, 0.5, scale="inverse")
    keep = model.plan(batch_size=B).keep[0]
    assert 0 < keep.sum() < B
    x = X.clone().requires_grad_()
    out = model(x)
    assert torch.equal(out[~keep], X[~keep])
    assert not torch.isclose(out[keep], X[keep]).all(-1).any()
    gradient = torch.randn_like(X)
    out.backward(gradient)
    assert torch.equal(x.grad[~keep], gradient[~keep])


def test_all_samples_dropped_is_a_differentiable_identity():
    model = sampled(schedule=1.0, scale="realized", hidden_states=True)
    x = X.clone().requires_grad_()
    out, states = model(x)
    assert torch.equal(out, X)
    assert all(torch.equal(state, X) for state in states)
    assert len(states) == 6
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(X))
    assert gradients(model) == [None] * 6


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_hidden_states_have_an_entry_a_layer(granularity):
    model = stack(schedule=[0.0, 1.0, 0.5, 0.5, 1.0, 0.0], granularity=granularity, hidden_states=True)
    batch_size = B if granularity == "sample" else None
    for _ in range(4):
        plan = model.plan(batch_size=batch_size)
        before = X
        out, states = model(X)
        assert len(states) == 6
        assert torch.equal(states[-1], out)
        for index, state in enumerate(states):
            keep = plan.keep[index].expand(B)
            changed = (state != before).any(-1).any(-1)
            assert torch.equal(changed, keep)
            before = state
    states = model.eval()(X)[1]
    assert torch.equal(states[2], nn.Sequential(*model.layers[:3])(X))


def test_autocast_returns_the_dtype_of_x():
    torch.manual_seed(0)
    for scale in ("none", "inverse"):
        layers = [nn.Sequential(Block(dtype=torch.float32), nn.Linear(8, 8)) for _ in range(4)]
        model = LayerDropStack(layers, 0.4, granularity="sample", scale=scale, seed=1)
        x = X.float().requires_grad_()
        plan = model.plan(batch_size=B)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            expected, _ = by_sample(model, x, plan, scale=scale, rates=[0.4] * 4)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)
        out.sum().backward()
        assert {p.grad.dtype for layer in plan.layers for p in layers[layer].parameters()} == {torch.float32}


def test_torch_layers_with_a_padding_mask():
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True, dtype=torch.float64)
        for _ in range(4)
    ]
    model = LayerDropStack(layers, 0.4, granularity="sample", scale="inverse", seed=2)
    padding = torch.arange(3) >= torch.tensor([3, 1, 2, 3, 2, 1, 3])[:, None]
    for _ in range(3):
        plan, expected = model.plan(batch_size=B), X
        for index, layer in enumerate(layers):
            y = layer(expected, src_key_padding_mask=padding)
            y = expected + (y - expected) / 0.6
            expected = torch.where(plan.keep[index][:, None, None], y, expected)
        torch.testing.assert_close(model(X, src_key_padding_mask=padding), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("max_kept", [None, 1])
def test_a_recompute_sees_the_samples_of_its_forward(use_reentrant, max_kept):
    plain, checkpointed = sampled(scale="inverse"), sampled(scale="inverse", max_kept=max_kept)
    for n in range(4):
        results = []
        for call in (plain, lambda x: checkpoint(lambda x: checkpointed(x).tanh(), x, use_reentrant=use_reentrant)):
            x = X.clone().requires_grad_()
            out = call(x)
            (out.tanh() if call is plain else out).sum().backward()
            model = plain if call is plain else checkpointed
            results.append([x.grad, *gradients(model)])
            model.zero_grad(set_to_none=True)
        assert_same(results[1], results[0], exactly=True)
        assert checkpointed.counters.forwards == checkpointed.stats().forwards == n + 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_continue_alike(copied):
    model = sampled(scale="realized", max_kept=2, batch_dims={"shift": 0})
    model(X)
    twin = copied(model)
    shift = torch.randn(B, 1, 8, dtype=torch.float64)
    for _ in range(4):
        torch.testing.assert_close(twin(X, shift=shift), model(X, shift=shift), rtol=0, atol=0)


def test_resume_in_the_middle_of_an_accumulation():
    schedule = DropSchedule(6, linear(0.9), decreasing(10))
    unbroken, resumed = (sampled(schedule=schedule, accumulation=3, seed=seed) for seed in (11, 99))
    for _ in range(8):
        unbroken(X)
    resumed.load_state_dict(unbroken.state_dict())
    for n in range(8, 16):
        plan = resumed.plan(batch_size=B)
        assert (plan.seed, plan.step, plan.stream) == (11, n // 3, n % 3)
        torch.testing.assert_close(resumed(X), unbroken(X), rtol=0, atol=0)
    with pytest.raises(ValueError, match="batch_size is None, expected the number of samples at granularity 'sample'"):
        resumed.plan()


def test_extracted_layers_keep_their_rates_and_samples():
    model = sampled(schedule=[0.0, 0.3, 0.5, 0.7, 0.9, 1.0], scale="realized")
    model(X)
    small = extract(model, [1, 3, 4])
    assert small.schedule(0).tolist() == [0.3, 0.7, 0.9]
    plan = small.plan(batch_size=B)
    torch.testing.assert_close(small(X), by_sample(small, X, plan, scale="realized")[0])


def test_statistics_count_samples():
    model = sampled(schedule=[0.0, 0.5, 0.9, 1.0, 0.5, 0.5])
    plans = [model.plan(n, batch_size=B) for n in range(20)]
    for _ in plans:
        model(X)
    kept = torch.stack([plan.kept for plan in plans])
    stats = model.stats()
    torch.testing.assert_close(torch.from_numpy(stats.realized_rates), 1 - kept.double().mean(0) / B)
    assert (stats.layers_run, stats.layers_skipped) == (int((kept > 0).sum()), int((kept == 0).sum()))
    assert stats.flops_skipped == pytest.approx(6 * 64 * 3 * int((B - kept).sum()))
