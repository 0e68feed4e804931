"""LayerDropStack: the plan it follows, what a dropped layer costs, scales, counters, resume."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import DropSchedule, LayerDropModuleList, LayerDropStack, decreasing, draw_plan, linear, set_step
from layerdrop_fast.memory import saved_bytes


class Block(nn.Module):
    """A residual layer that counts its calls."""

    def __init__(self, width=8, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=dtype)
        self.calls = 0

    def forward(self, x, shift=0.0):
        self.calls += 1
        return x + torch.tanh(self.linear(x)) + shift


class TupleBlock(Block):
    def forward(self, x, shift=0.0):
        return super().forward(x, shift), "attention"


def stack(count=6, schedule=0.5, kind=Block, **keywords):
    torch.manual_seed(0)
    return LayerDropStack([kind() for _ in range(count)], schedule, **({"seed": 11} | keywords))


def by_hand(model, x, layers, scale=None, shift=0.0):
    for layer in layers:
        y = x + torch.tanh(model.layers[layer].linear(x)) + shift
        x = y if scale is None else x + scale[layer] * (y - x)
    return x


def gradients(model):
    return [layer.linear.weight.grad for layer in model.layers]


X = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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
    assert torch.equal(out, x)
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


def test_without_a_seed_one_is_drawn_from_torch_at_construction():
    block = Block()
    seeds = []
    for torch_seed in (5, 5, 6):
        torch.manual_seed(torch_seed)
        seeds.append(LayerDropStack([block]).counters.seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_resume_from_the_state_dict():
    """Two microbatches into a step, in the middle of a schedule."""
    schedule = DropSchedule(6, linear(0.9), decreasing(10))
    unbroken = stack(schedule=schedule, accumulation=3)
    for _ in range(11):
        unbroken(X)
    resumed = stack(schedule=schedule, accumulation=3, seed=99)
    resumed.load_state_dict(unbroken.state_dict())
    for _ in range(12):
        assert resumed.plan().layers == unbroken.plan().layers
        torch.testing.assert_close(resumed(X), unbroken(X), rtol=0, atol=0)
    assert resumed.counters.step == 7


def test_state_dict_of_a_large_seed():
    model = stack(seed=2**64 - 1)
    model(X)
    state = model.state_dict()["counters._extra_state"]
    assert state.tolist() == [1, -1, 1]
    other = stack(seed=0)
    other.load_state_dict(model.state_dict())
    assert (other.counters.seed, other.counters.forwards) == (2**64 - 1, 1)
    bad = model.state_dict() | {"counters._extra_state": torch.tensor([2, 0, 0])}
    with pytest.raises(ValueError, match=r"tensor\(\[2, 0, 0\]\), expected int64 \[1, seed, forwards >= 0\]"):
        other.load_state_dict(bad)
    assert (other.counters.seed, other.counters.forwards) == (2**64 - 1, 1)


def test_set_step_reaches_every_stack():
    model = nn.Sequential(stack(accumulation=4), stack(seed=12))
    set_step(model, 5)
    assert [part.counters.step for part in model] == [5, 5]
    assert model[0].plan().layers == draw_plan([0.5] * 6, seed=11, step=5).layers
    with pytest.raises(ValueError, match=r"step is -1, expected an integer in \[0, 2\*\*64\)"):
        set_step(model, -1)
    with pytest.raises(ValueError, match="Linear holds no LayerDropStack, expected at least one"):
        set_step(nn.Linear(2, 2), 1)
    assert [part.counters.step for part in model] == [5, 5]


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


def microbatch_gradients(model, wrap, losses=lambda out: out.square().sum()):
    """Gradients of one training forward through ``wrap``, and the layers that it was planned to keep."""
    model.zero_grad(set_to_none=True)
    kept = model.plan().layers
    x = X.clone().requires_grad_()
    losses(wrap(x)).backward()
    return kept, [None if g is None else g.clone() for g in gradients(model)]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("behind", [lambda out: out, lambda out: torch.tanh(out) ** 2])
def test_a_recompute_sees_the_plan_of_its_forward_and_counts_nothing(use_reentrant, behind):
    """Checkpoints that end with the stack and ones that go on behind it."""
    plain, checkpointed = stack(), stack()
    for n in range(6):
        kept, expected = microbatch_gradients(plain, lambda x: behind(plain(x)))
        recomputed = lambda x: checkpoint(  # noqa: E731
            lambda x: behind(checkpointed(x)), x, use_reentrant=use_reentrant
        )
        kept_again, got = microbatch_gradients(checkpointed, recomputed)
        assert kept_again == kept
        assert checkpointed.counters.forwards == checkpointed.stats().forwards == n + 1
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def checkpointed(model, use_reentrant):
    """A forward in a checkpoint that goes on behind the stack, so that it recomputes before the stack's backward."""
    return checkpoint(lambda x: model(x) ** 2, X.clone().requires_grad_(), use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("before_each", [lambda model, n: None, lambda model, n: set_step(model, n)])
def test_an_uncertain_recompute_raises(use_reentrant, before_each):
    """Two forwards wait for their backward: which one is repeated is not known, so nothing is guessed."""
    model = stack()
    outs = []
    for n in range(2):
        before_each(model, n)
        outs.append(checkpointed(model, use_reentrant))
    with pytest.raises(RuntimeError, match="2 of its forwards may be meant, expected 1"):
        outs[0].sum().backward()


def fails(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 3, 5, dtype=torch.float64))


def runs_without_gradients(model):
    with torch.no_grad():
        model(X)


def skips_its_backward(model):
    model(X.clone().requires_grad_()).sum()


def skips_the_backward_of_a_checkpoint(model):
    checkpointed(model, use_reentrant=False)


def keeps_the_loss(model):
    loss = model(X).sum()
    loss.backward()
    model.kept_loss = loss


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "earlier",
    [fails, runs_without_gradients, skips_its_backward, skips_the_backward_of_a_checkpoint, keeps_the_loss],
)
def test_what_came_before_does_not_confuse_a_recompute(earlier, use_reentrant):
    model = stack()
    for _ in range(3):
        earlier(model)
        model.zero_grad()
        kept = model.plan().layers
        checkpointed(model, use_reentrant).sum().backward()
        assert [index for index, g in enumerate(gradients(model)) if g is not None] == kept


def test_a_skipped_backward_of_a_reentrant_checkpoint_can_be_forgotten():
    model = stack()
    checkpointed(model, use_reentrant=True)
    model.counters.forget()
    kept = model.plan().layers
    checkpointed(model, use_reentrant=True).sum().backward()
    assert [index for index, g in enumerate(gradients(model)) if g is not None] == kept


def test_a_failed_forward_counts_nothing():
    model = stack()
    fails(model)
    assert model.counters.forwards == model.stats().forwards == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_inside_the_stack(use_reentrant):
    """The decisions are drawn outside the layers, so their recompute draws nothing."""

    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    plain, inside = stack(), stack(kind=Checkpointed)
    for _ in range(4):
        (_, expected), (_, got) = microbatch_gradients(plain, plain), microbatch_gradients(inside, inside)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


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


def test_weights_without_counters_load():
    model = stack()
    model(X)
    weights = {name: tensor for name, tensor in stack().state_dict().items() if "extra_state" not in name}
    model.load_state_dict(weights)
    assert (model.counters.seed, model.counters.forwards) == (11, 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in weights.items() if "layers.0" not in name})


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


def test_data_parallel_is_refused():
    replica = stack()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(X)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(granularity="sample"), ValueError, r"granularity is 'sample', expected one of \('batch',\)"),
        (dict(sampling="x"), ValueError, r"sampling is 'x', expected one of \('bernoulli', 'systematic'\)"),
        (dict(scale="realized"), ValueError, r"scale is 'realized', expected one of \('none', 'inverse', 'eval'\)"),
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
