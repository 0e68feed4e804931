"""What a GraphedStep refuses, by name, and what a refusal leaves as it was."""

import copy

import pytest
import torch
from torch import nn

from layerdrop_fast import (
    GraphedStep,
    LayerDropStack,
)
from tests.graphed import (
    Eager,
    Model,
    adamw,
    assert_same,
    batch,
    loss,
)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sampling": "bernoulli"}, "sampling is 'bernoulli', expected 'systematic'"),
        ({"accumulation": 2}, "accumulation is 2, expected 1"),
        ({"hidden_states": True}, "hidden_states is True, expected False"),
        ({"max_kept": 3}, "max_kept is 3, expected None"),
        ({"norm_first": False}, "norm_first is False, expected True"),
        ({"target": "branch"}, "target is 'branch', expected 'layer' at granularity \"batch\""),
    ],
)
def test_settings_that_cannot_be_captured(keywords, message):
    with pytest.raises(ValueError, match=message):
        GraphedStep(Model(**keywords), loss, adamw, *batch(0))


def share(model):
    model.stack.layers[1].linear1.weight = model.stack.layers[0].linear1.weight


def add_hook(model):
    model.stack.layers[1].register_forward_hook(lambda *_: None)


CHANGES = [
    (lambda model: model.eval(), "in evaluation, expected model.train"),
    (lambda model: model.stack.layers[2].compile(), "layer 2 is wrapped, parametrised or compiled"),
    (lambda model: nn.utils.parametrizations.weight_norm(model.stack.layers[1].linear1), "layer 1 is wrapped, param"),
    (lambda model: setattr(model.stack.layers[1], "dropout", 0.5), "dropout of layer 1 is 0.5, expected 0.0"),
    (lambda model: model.stack.layers[3].linear1.requires_grad_(False), "linear1.weight of layer 3 is"),
    (share, "stack.layers.1.linear1.weight is stack.layers.0.linear1.weight too"),
    (add_hook, "layer 1 has hooks"),
    (lambda model: setattr(model, "other", LayerDropStack([nn.Identity()])), "expected one TransformerStack"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_models_that_cannot_be_captured(change, message):
    model = Model()
    change(model)
    with pytest.raises(ValueError, match=message):
        GraphedStep(model, loss, adamw, *batch(0))


@pytest.mark.parametrize(
    ("optimizer_of", "message"),
    [
        (lambda p: torch.optim.AdamW(p), "got AdamW with fused=None, expected Adam, AdamW or SGD with fused=True"),
        (lambda p: torch.optim.Adagrad(p, fused=True), "got Adagrad with fused=True, expected Adam"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1, fused=True), "with dampening=0.1, expected 0"),
    ],
)
def test_optimizers_that_cannot_skip(optimizer_of, message):
    with pytest.raises(ValueError, match=message):
        GraphedStep(Model(), loss, optimizer_of, *batch(0))


def test_a_step_that_fails_counts_nothing():
    fail = False

    def failing(model, x, target):
        value = loss(model, x, target)
        if fail:
            raise ArithmeticError
        return value

    model = Model()
    eager = Eager(model)
    step = GraphedStep(model, failing, adamw, *batch(0))
    step(*batch(0)), eager(*batch(0))
    fail = True
    with pytest.raises(ArithmeticError):
        step(*batch(1))
    fail = False
    with pytest.raises(ValueError, match=r"inputs: got .*\[3, 7, 12\].*, expected .*\[5, 7, 12\].* as captured"):
        step(*(x[:3] for x in batch(1)))
    with pytest.raises(TypeError, match="input 1: got float, expected a tensor"):
        step(batch(1)[0], 1.0)
    step(*batch(1)), eager(*batch(1))
    assert_same(step, model, eager, rtol=0, atol=0)


def test_the_stack_runs_once():
    def twice(model, x, target):
        return loss(model, x, target) + loss(model, x, target)

    with pytest.raises(RuntimeError, match="loss ran the stack 2 times, expected once"):
        GraphedStep(Model(), twice, adamw, *batch(0))


def test_a_learning_rate_that_is_a_tensor_can_change():
    rate = torch.tensor(1e-2)
    model = Model()
    eager = Eager(model, lambda p: adamw(p, 1e-2))
    step = GraphedStep(model, loss, lambda p: adamw(p, rate), *batch(0))
    for number, value in enumerate((1e-2, 3e-3)):
        rate.fill_(value)
        for optimizer in eager.optimizers:
            optimizer.param_groups[0]["lr"] = rate.item()
        step(*batch(number)), eager(*batch(number))
        assert_same(step, model, eager, rtol=1e-6, atol=1e-9)
    saved = copy.deepcopy(step.state_dict())
    rate.fill_(0.7)
    step.load_state_dict(saved)
    assert rate.item() == pytest.approx(3e-3)  # of the state, and still the tensor to fill
    assert all(optimizer.param_groups[0]["lr"] is rate for optimizer in step.optimizers)
    step(*batch(2)), eager(*batch(2))
    assert_same(step, model, eager, rtol=1e-6, atol=1e-9)
    step.optimizers[0].param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="settings of an optimizer are others than at capture"):
        step(*batch(3))


def copied(model):
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float32), lambda m: m.load_state_dict(copied(m), assign=True)])
def test_parameters_that_were_moved_are_refused(move):
    model = Model(granularity="sample")
    step = GraphedStep(model, loss, adamw, *batch(0))
    model.load_state_dict(copied(model))
    step(*batch(0))
    move(model)
    with pytest.raises(RuntimeError, match="parameters are elsewhere than at capture"):
        step(*batch(0))
