"""LayerDropStack: the plan it follows, what a dropped layer costs, scales, counters, resume."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from layerdrop_fast import DropSchedule, LayerDropModuleList, LayerDropStack, decreasing, draw_plan, linear
from layerdrop_fast.memory import saved_bytes
from tests.nn.residual import Block, X, by_hand, gradients, stack


class TupleBlock(Block):
    def forward(self, x, shift=0.0):
        return super().forward(x, shift), "attention"


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
@pytest.mark.parametrize("schedule", [0.5, [0.1, 0.9, 0.5, 0.3, 0.0, 1.0], DropSchedule(6, linear(0.8), decreasing(4))])
def test_forward_n_follows_the_plan_that_a_user_can_draw(schedule, sampling):
    model = stack(schedule=schedule, sampling=sampling, accumulation=2)
    rates = DropSchedule.of(schedule, 6)
    for n in range(8):
        step, microbatch = divmod(n, 2)
        plan = draw_plan(rates(step), seed=11, step=step, stream=microbatch, sampling=sampling)
        assert model.plan(n).layers == model.plan().layers == plan.layers
        torch.testing.assert_close(model(X), by_hand(model, X, plan.layers), rtol=0, atol=0)


def test_a_dropped_layer_costs_nothing():
    """Not called, no tensor saved, gradient None; kept ones have a gradient."""
    model = stack(12)
    kept = model.plan().layers
    assert 0 < len(kept) < 12
    model(X).sum().backward()
    assert [layer.calls for layer in model.layers] == [int(index in kept) for index in range(12)]
    for index, gradient in enumerate(gradients(model)):
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == (index in kept)


def test_saved_bytes_are_those_of_a_dense_stack_of_the_kept_layers():
    model = stack(12)
    for _ in range(5):
        kept = len(model.plan().layers)
        dense = nn.Sequential(*(Block() for _ in range(kept)))
        assert saved_bytes(model, X, exclude=[X]) == saved_bytes(dense, X, exclude=[X])


@pytest.mark.parametrize("scale", ["none", "inverse", "eval"])
def test_residual_scales(scale):
    rates = np.array([0.0, 0.2, 0.5, 0.75, 0.9, 1.0])
    model = stack(schedule=rates, scale=scale)
    for n in range(5):
        expected = {"inverse": [1, 1 / 0.8, 2, 4, 1 / (1 - 0.9), 0]}.get(scale)
        torch.testing.assert_close(model(X), by_hand(model, X, model.plan(n).layers, expected))
    model.eval()
    expected = {"eval": 1 - rates}.get(scale)
    torch.testing.assert_close(model(X), by_hand(model, X, range(6), expected))


def test_inverse_scale_keeps_the_mean_of_a_layer():
    """Over many plans, one layer's expected residual is what evaluation computes; within 5 standard errors."""
    model = stack(1, 0.3, scale="inverse")
    with torch.no_grad():
        residuals = torch.stack([(model(X) - X)[0, 0, 0] for _ in range(4000)])
        exact = (model.eval()(X) - X)[0, 0, 0]
    assert abs(residuals.mean() - exact) < 5 * residuals.std() / 4000**0.5


def test_gradients_are_those_of_the_kept_layers():
    model = stack(scale="inverse", schedule=0.3)
    x = X.clone().requires_grad_()
    kept = model.plan().layers
    model(x).square().sum().backward()
    ours, ours_x = gradients(model), x.grad
    model.zero_grad(set_to_none=True)
    x.grad = None
    by_hand(model, x, kept, [1 / 0.7] * 6).square().sum().backward()
    torch.testing.assert_close(ours_x, x.grad)
    for got, expected in zip(ours, gradients(model), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_everything_dropped_is_a_differentiable_identity():
    model = stack(schedule=1.0)
    x = X.clone().requires_grad_()
    out = model(x)
    assert torch.equal(out, x)
    with torch.no_grad():
        model(x).mul_(100.0)  # what is done to the result is not done to the input
    assert torch.equal(x, X)
    out.backward(torch.full_like(out, 3.0))
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert all(gradient is None for gradient in gradients(model))
    assert torch.autograd.gradcheck(model, (x,))


def test_tuples_and_arguments():
    model = stack(kind=TupleBlock, scale="inverse")
    kept = model.plan().layers
    torch.testing.assert_close(model(X, shift=2.0), by_hand(model, X, kept, [2.0] * 6, 2.0))
    kept = model.plan().layers
    torch.testing.assert_close(model(X, 3.0), by_hand(model, X, kept, [2.0] * 6, 3.0))


def test_evaluation_drops_nothing_and_advances_nothing():
    model = stack().eval()
    torch.testing.assert_close(model(X), by_hand(model, X, range(6)), rtol=0, atol=0)
    assert model.counters.forwards == 0
    assert model.stats().forwards == 0


def test_no_random_state_is_read_or_advanced():
    model = stack()
    state = torch.get_rng_state()
    model(X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_continue_alike(copied):
    model = stack()
    model(X)
    twin = copied(model)
    for _ in range(4):
        torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)


def test_layers_taken_from_a_list_that_drops():
    """A LayerDropModuleList in training mode does not drop layers while it is handed over."""
    blocks = LayerDropModuleList(1.0, [Block() for _ in range(5)])
    assert len(LayerDropStack(blocks, 0.2).layers) == 5


def test_stats():
    model = stack(schedule=[0.0, 0.5, 0.5, 0.5, 0.5, 1.0])
    runs = np.zeros(6)
    for n in range(50):
        runs[model.plan(n).layers] += 1
        model(X)
    stats = model.stats()
    assert (stats.forwards, stats.layers_run, stats.layers_skipped) == (50, runs.sum(), 300 - runs.sum())
    np.testing.assert_allclose(stats.realized_rates, 1 - runs / 50, rtol=1e-15)
    # A layer's matrix has 8 * 8 weights; a forward has 4 * 3 tokens.
    assert stats.flops_skipped == 6 * 64 * 12 * stats.layers_skipped
    model.reset_stats()
    assert model.stats().forwards == 0
    assert np.isnan([*model.stats().realized_rates, model.stats().share_run]).all(), "of nothing"


def test_autocast():
    torch.manual_seed(0)
    model = LayerDropStack([Block(dtype=torch.float32) for _ in range(6)], 0.3, scale="inverse", seed=1)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert {g.dtype for g in gradients(model) if g is not None} == {torch.float32}


def test_compiled_layers():
    """One graph serves all layers and all plans."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    class Plain(Block):
        def forward(self, x):
            return x + torch.tanh(self.linear(x))

    eager, compiled = stack(kind=Plain, schedule=0.3), stack(kind=Plain, schedule=0.3)
    for layer in compiled.layers:
        layer.compile(backend=backend)
    for _ in range(12):
        torch.testing.assert_close(compiled(X), eager(X), rtol=0, atol=0)
    # Two: of an input that needs a gradient, and of one that does not.
    assert len(graphs) <= 2


def test_a_default_device_does_not_move_the_decisions():
    with torch.device("meta"):
        model = LayerDropStack([nn.Linear(2, 2)], 0.5)
        state = model.state_dict()["counters._extra_state"]
        assert len(list(LayerDropModuleList(0.0, [nn.Linear(2, 2)]))) == 1
    assert state.tolist() == [1, model.counters.seed, 0]


def test_changed_layers_are_noticed():
    model = stack()
    model.layers.append(Block())
    for mode in (True, False):
        with pytest.raises(ValueError, match="has 7 layers and a schedule for 6"):
            model.train(mode)(X)
    assert model.counters.forwards == 0
    model.schedule = DropSchedule(7, linear(0.5))
    model.reset_stats()
    assert model(X).shape == X.shape


@pytest.mark.parametrize("schedule", [0.2, {"layer": 0.2}])
def test_a_schedule_set_later_is_one(schedule):
    stack = LayerDropStack([nn.Linear(4, 4) for _ in range(3)], 0.2)
    stack.schedule = schedule
    with pytest.raises(TypeError, match=r"stack.schedule is .*0.2.*, expected a DropSchedule"):
        stack(torch.randn(2, 4))


def test_data_parallel_is_refused():
    replica = stack()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(X)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(granularity="token"), ValueError, r"granularity is 'token', expected one of \('batch', 'sample'\)"),
        (dict(sampling="x"), ValueError, r"sampling is 'x', expected one of \('bernoulli', 'systematic'\)"),
        (dict(scale="x"), ValueError, r"scale is 'x', expected one of \('none', 'inverse', 'realized', 'eval'\)"),
        (dict(scale="realized"), ValueError, r"expected \"sample\" as granularity, got 'batch'"),
        (dict(schedule=[0.1]), ValueError, r"got 1 drop rates, expected 6"),
        (dict(schedule=2.0), ValueError, r"\[0, 1\], got 2.0"),
        (dict(seed=-1), ValueError, r"seed is -1, expected"),
        (dict(accumulation=0), ValueError, r"accumulation must be at least 1, got 0"),
        (dict(accumulation=1.5), TypeError, r"accumulation must be an integer, got 1.5"),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        stack(**keywords)
