"""Which plan a forward uses: seeds, steps, resume, and recomputes under activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import DropSchedule, LayerDropStack, decreasing, draw_plan, linear, set_step
from tests.nn.residual import Block, X, gradients, stack


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


def test_weights_without_counters_load():
    model = stack()
    model(X)
    weights = {name: tensor for name, tensor in stack().state_dict().items() if "extra_state" not in name}
    model.load_state_dict(weights)
    assert (model.counters.seed, model.counters.forwards) == (11, 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in weights.items() if "layers.0" not in name})


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
