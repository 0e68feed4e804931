"""DataDriven.backward: the losses that it takes, and those that it refuses."""

import copy

import pytest
import torch

from layerdrop_fast import LayerDropStack
from layerdrop_fast.prune import DataDriven
from tests.prune.test_data_driven import Branch, Gain, made


def test_a_loss_that_is_not_finite_is_left_out():
    stack, driven, _ = made()
    for loss in (1.0, float("inf"), 3.0, float("nan")):
        stack(torch.randn(2, 6))
        driven.backward(torch.tensor(loss))
    assert driven.regression.normal[0, 0] == 2
    assert driven.regression.normal[0, -1] == 4
    assert driven.slopes.isfinite().all()


def test_the_mean_of_the_losses_is_not_drawn_to_zero():
    """A loss that no decision changes has slopes of zero, however large it is."""
    torch.manual_seed(0)
    stack = LayerDropStack([Gain(1.0), Gain(2.0)], 0.5, seed=0)
    driven = DataDriven(stack, 0.5, every=4, width=1)
    for _ in range(4):
        stack(torch.zeros(1, 1, requires_grad=True))
        driven.backward(torch.tensor(1000.0))
    assert driven.regression.normal[1:-1, 0].any()  # the decisions' own means are not those of the rates
    torch.testing.assert_close(driven.slopes, torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-6)


def test_losses_are_read_when_rates_are_set_only():
    """A tensor on the meta device has no value to wait for."""
    stack, driven, _ = made()
    for _ in range(3):
        stack(torch.randn(2, 6))
        driven.backward(torch.zeros((), device="meta"))
    stack(torch.randn(2, 6))
    with pytest.raises(NotImplementedError, match="meta"):
        driven.backward(torch.zeros((), device="meta"))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_loss_of_another_shape_is_refused(granularity):
    stack = LayerDropStack([Branch() for _ in range(2)], 0.5, granularity=granularity, seed=2)
    driven = DataDriven(stack, 0.5, width=6)
    right, wrong = (torch.ones(()), torch.ones(4)) if granularity == "batch" else (torch.ones(4), torch.ones(()))
    with pytest.raises(RuntimeError, match="no training forward of the stack"):
        driven.backward(right)
    stack(torch.randn(4, 6))
    with pytest.raises(ValueError, match=rf"loss: got \[4?\], expected \[B?\].* at granularity '{granularity}'"):
        driven.backward(wrong)
    with pytest.raises(TypeError, match="loss: got a float, expected the tensor"):
        driven.backward(1.0)
    driven.backward(right)
    assert driven.state_dict()["steps"] == 1


def test_a_loss_of_another_number_of_samples_is_refused():
    stack, driven, _ = made("sample")
    stack(torch.randn(4, 6))
    before = {name: value.clone() for name, value in driven.state_dict().items()}
    for wrong in (torch.ones(2), torch.ones(5), torch.ones(0)):
        with pytest.raises(ValueError, match=rf"loss: got \[{len(wrong)}\], expected \[4\], as the last forward's"):
            driven.backward(wrong)
    assert all(torch.equal(value, before[name]) for name, value in driven.state_dict().items())
    driven.backward(torch.ones(4))
    assert driven.state_dict()["regression.new"][0, 0] == 4


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_each_forward_has_one_loss(granularity):
    stack, driven, _ = made(granularity)
    loss = torch.ones(()) if granularity == "batch" else torch.ones(3)
    for forwards in (1, 2):  # of two, the last one is taken, and not once more for the first
        for _ in range(forwards):
            stack(torch.randn(3, 6))
        driven.backward(loss)
        before = {name: value.clone() for name, value in driven.state_dict().items()}
        with pytest.raises(
            RuntimeError, match=f"a second loss after training forward {forwards * 2 - 2}, expected one"
        ):
            driven.backward(loss)
        assert all(torch.equal(value, before[name]) for name, value in driven.state_dict().items())
    stack.eval()(torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="a second loss after training forward 2"):
        driven.backward(loss)
    with pytest.raises(RuntimeError, match="no training forward of the stack"):
        DataDriven(copy.deepcopy(stack), 0.5, width=6).backward(loss)


def test_the_decisions_are_those_that_were_made_whatever_the_counters_say():
    stack, driven, _ = made("sample")
    stack(torch.randn(3, 6))
    kept = stack.plan(0, batch_size=3).keep.double()
    stack.counters.set_step(7)
    driven.backward(torch.ones(3))
    torch.testing.assert_close(driven.state_dict()["regression.new"][0, 1:-1], (kept - 0.5).sum(1))
