"""The statements of docs/optimizers.md."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropStack

OPTIMIZERS = [
    lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.1),
    lambda params: torch.optim.AdamW(params, 0.1, foreach=True),
    lambda params: torch.optim.AdamW(params, 0.1, fused=True),
    lambda params: torch.optim.Adam(params, 0.1, weight_decay=0.1, foreach=False),
]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def two_steps(make_optimizer, set_to_none):
    """A step in which both layers run, then one in which the second is dropped; returns the second layer's parameters
    and optimizer state before and after that."""
    torch.manual_seed(0)
    stack = LayerDropStack([Block(), Block()], [0.0, 0.0], seed=1)
    optimizer = make_optimizer(stack.parameters())
    stack(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)

    def snapshot():
        parameters = list(stack.layers[1].parameters())
        state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
        return [tensor.clone() for tensor in parameters], [tensor.clone() for tensor in state]

    before = snapshot()
    stack.schedule = type(stack.schedule).of([0.0, 1.0], 2)
    stack(X).square().sum().backward()
    optimizer.step()
    return before, snapshot()


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_none_leaves_a_dropped_layer_as_it_was(make_optimizer):
    (weights, state), (weights_after, state_after) = two_steps(make_optimizer, set_to_none=True)
    assert len(state) >= len(weights)
    for before, after in zip(weights + state, weights_after + state_after, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_zero_gradients_move_a_dropped_layer(make_optimizer):
    (weights, _), (weights_after, _) = two_steps(make_optimizer, set_to_none=False)
    for before, after in zip(weights, weights_after, strict=True):
        assert not torch.equal(before, after)


def test_accumulation_sums_the_microbatches_in_which_a_layer_ran():
    torch.manual_seed(0)
    stack = LayerDropStack([Block(), Block()], [0.0, 0.5], seed=2, accumulation=6)
    ran = [n for n in range(6) if 1 in stack.plan(n).layers]
    assert 0 < len(ran) < 6
    inputs = torch.randn(6, 5, 4)
    expected = 0
    for n in ran:
        h = stack.layers[1](stack.layers[0](inputs[n]))
        expected += torch.autograd.grad(h.square().sum(), stack.layers[1].linear.weight)[0]
    for x in inputs:
        stack(x).square().sum().backward()
    torch.testing.assert_close(stack.layers[1].linear.weight.grad, expected)


def test_clipping_sees_the_layers_that_ran():
    stack = LayerDropStack([Block() for _ in range(6)], 0.5, seed=4)
    kept = stack.plan().layers
    assert 0 < len(kept) < 6
    stack(X).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(stack.parameters(), 1e9)
    squares = sum(p.grad.square().sum() for layer in kept for p in stack.layers[layer].parameters())
    torch.testing.assert_close(norm, squares.sqrt())
    stack.zero_grad()
    assert torch.nn.utils.clip_grad_norm_(stack.parameters(), 1.0) == 0


def scaled_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(X.clone().requires_grad_()).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def documented_steps(stack, optimizer, steps):
    """Runs the snippet of docs/optimizers.md; returns how often the optimizer stepped."""
    page = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = dict(stack=stack, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=8.0), x=X)
    stepped = 0
    for _ in range(steps):
        exec(snippet, names)
        stepped += names["ran"]
        optimizer.zero_grad()
    return stepped


def test_the_documented_way_past_empty_plans():
    torch.manual_seed(0)
    stack = LayerDropStack([Block(), Block()], 0.6, seed=0)
    empty = sum(not stack.plan(n).layers for n in range(40))
    assert documented_steps(stack, torch.optim.AdamW(stack.parameters()), 40) == 40 - empty < 40
    assert stack.counters.forwards == 40
    with pytest.raises(RuntimeError, match="does not require grad"):
        LayerDropStack([Block()], 1.0)(X).sum().backward()


def test_grad_scaler():
    head = nn.Linear(4, 4)
    before = head.weight.clone()
    scaled_step(nn.Sequential(LayerDropStack([Block()], 1.0), head))
    assert not torch.equal(head.weight, before)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaled_step(LayerDropStack([Block()], 1.0))


def test_fused_sgd_with_momentum_fails_where_a_layer_has_its_first_gradient_late():
    early, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.SGD([early, late], 0.1, momentum=0.9, fused=True)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"expected Tensor .* but got NoneType"):
        optimizer.step()
