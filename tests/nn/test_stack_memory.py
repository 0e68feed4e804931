"""max_kept: the same numbers, and no more held for backward than the bound."""

import math
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from layerdrop_fast.memory import saved_bytes
from tests.nn.residual import Block, stack

B, COUNT = 6, 10
X = torch.randn(B, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRANULARITIES = pytest.mark.parametrize("granularity", ["batch", "sample"])


class Noisy(Block):
    def forward(self, x, shift=0.0):
        return nn.functional.dropout(super().forward(x, shift), 0.3)


def results(model, x, seed):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out, states = model(x, shift=0.1)
    (out.square().sum() + states[2].sum()).backward()
    return [out.detach(), *(s.detach() for s in states), x.grad, *(p.grad for p in model.parameters())]


@GRANULARITIES
@pytest.mark.parametrize("scale", ["none", "inverse"])
@pytest.mark.parametrize("max_kept", [1, 2, 3, COUNT])
def test_the_same_bits_with_and_without(granularity, scale, max_kept):
    keywords = dict(kind=Noisy, schedule=0.3, granularity=granularity, scale=scale, hidden_states=True)
    free, bounded = stack(COUNT, **keywords), stack(COUNT, max_kept=max_kept, **keywords)
    for n in range(4):
        for expected, got in zip(results(free, X, n), results(bounded, X, n), strict=True):
            assert (expected is None) == (got is None)
            assert expected is None or torch.equal(expected, got)
    assert bounded.counters.forwards == bounded.stats().forwards == 4


@GRANULARITIES
@pytest.mark.parametrize("max_kept", [2, 3, 5])
def test_saved_bytes_are_bounded(granularity, max_kept):
    """One layer of all samples saves its input and tanh's output, 2 copies of x; a recomputed piece its input."""
    model = stack(COUNT, 0.2, granularity=granularity, max_kept=max_kept, scale="inverse")
    pieces_seen = 0
    for n in range(5):
        plan = model.plan(batch_size=B if granularity == "sample" else None)
        kept = sum(plan.kept_counts) / (B if granularity == "sample" else 1)
        assert kept > max_kept
        # A piece of samples may have room for all but one sample of another layer.
        least = max_kept if granularity == "batch" else max_kept - 1 + 1 / B
        bound = 2 * max_kept + math.ceil((kept - least) / least)
        rows = plan._keep.size * 4 if granularity == "sample" else 0
        saved = saved_bytes(model, X.clone().requires_grad_()) - rows
        assert saved <= bound * X.nbytes < 2 * kept * X.nbytes or max_kept == 5
        pieces_seen += saved > 2 * max_kept * X.nbytes
        assert model.counters.forwards == n + 1
    assert pieces_seen


@pytest.mark.parametrize("scale", ["none", "inverse", "realized"])
def test_a_sample_saves_what_it_saves_in_a_dense_stack(scale):
    """Exactly: input and tanh's output of each kept sample, the plan's int32 rows, and a layer's scale."""
    model = stack(COUNT, 0.4, granularity="sample", scale=scale)
    for _ in range(3):
        kept = sum(model.plan(batch_size=B).kept_counts)
        saved = saved_bytes(model, X.clone().requires_grad_())
        exact = 2 * kept * X[0].nbytes + COUNT * B * 4
        assert exact <= saved <= exact + (0 if scale == "none" else 8 * COUNT)


class Watched(torch.autograd.Function):
    """Saves one tensor; ``alive`` has the storages of those that still exist."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    peak = 0

    @staticmethod
    def forward(ctx, x, weight):
        saved = x.clone()
        Watched.alive.add(saved.untyped_storage())
        Watched.peak = max(Watched.peak, sum(storage.nbytes() for storage in Watched.alive))
        ctx.save_for_backward(saved)
        return x + weight

    @staticmethod
    def backward(ctx, grad):
        Watched.peak = max(Watched.peak, sum(storage.nbytes() for storage in Watched.alive))
        assert ctx.saved_tensors[0].shape == grad.shape
        return grad, grad.sum()


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return Watched.apply(x, self.weight)


@GRANULARITIES
@pytest.mark.parametrize("max_kept", [None, 1, 3])
def test_the_peak_of_a_step_is_bounded_in_backward_too(granularity, max_kept):
    model = stack(COUNT, 0.2, granularity=granularity, max_kept=max_kept, kind=Counted)
    for _ in range(3):
        kept = sum(model.plan(batch_size=B if granularity == "sample" else None).kept_counts)
        Watched.peak = 0
        model(X.clone().requires_grad_()).sum().backward()
        assert not Watched.alive
        if max_kept is None:
            assert Watched.peak == kept * (X[0].nbytes if granularity == "sample" else X.nbytes)
        else:
            assert 0 < Watched.peak <= max_kept * X.nbytes
