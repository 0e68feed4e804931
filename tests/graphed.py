"""A model with a stack in the middle, and eager steps of its copy to compare a GraphedStep with."""

import copy

import torch
from torch import nn

from layerdrop_fast import GraphedStep, TransformerStack

BATCH, LENGTH, WIDTH, SOURCE, LAYERS = 5, 7, 12, 4, 6


def adamw(parameters, lr=1e-2):
    """As for a GPU."""
    return torch.optim.AdamW(parameters, lr, weight_decay=0.1, eps=1e-3, fused=True, capturable=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True)


class Model(nn.Module):
    def __init__(self, layers=LAYERS, dtype=torch.float64, device=None, **keywords):
        super().__init__()
        torch.manual_seed(0)
        kind = {"dtype": dtype, "device": device}
        keywords = {"dropout": 0.0, "schedule": 0.45, "sampling": "systematic", "seed": 3} | keywords
        self.begin, self.end = nn.Linear(WIDTH, WIDTH, **kind), nn.Linear(WIDTH, 3, **kind)
        self.stack = TransformerStack(layers, WIDTH, 2, 20, **keywords, **kind)
        self.seen = nn.Buffer(torch.zeros((), **kind))
        for weight in self.stack.parameters():
            if weight.dim() == 1:
                nn.init.normal_(weight, mean=0.5, std=0.3)

    def forward(self, x, *memory, **masks):
        self.seen += x.detach().mean()
        return self.end(self.stack(self.begin(x), *memory, **masks))


def loss(model, x, target):
    return (model(x, is_causal=True) - target).square().mean()


def batch(number, dtype=torch.float64, device="cpu"):
    source = torch.Generator().manual_seed(number)
    return [torch.randn(BATCH, LENGTH, c, generator=source).to(device, dtype) for c in (WIDTH, 3)]


class Eager:
    """The same steps of a copy of the model. An optimizer for each parameter: torch's fused SGD (2.13) fails where some
    of its parameters have had gradients, and one has its first."""

    def __init__(self, model, optimizer_of=adamw, loss=loss):
        self.model, self.loss = copy.deepcopy(model), loss
        self.optimizers = [optimizer_of([weight]) for weight in self.model.parameters()]

    def __call__(self, *inputs):
        value = self.loss(self.model, *inputs)
        value.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return value.detach()


def states_of(optimizers, model):
    """Of each parameter, in the order of the model's."""
    known = {weight: state for optimizer in optimizers for weight, state in optimizer.state.items()}
    return [known.get(weight, {}) for weight in model.parameters()]


def assert_same(step, model, eager, **tolerance):
    """Weights, optimizers' states, counters and statistics."""
    for got, want in zip(model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    states = states_of(step.optimizers, model), states_of(eager.optimizers, eager.model)
    for got, want in zip(*states, strict=True):
        for name, value in got.items():
            # Eager, the first step in which a layer runs makes its state.
            torch.testing.assert_close(value, want.get(name, torch.zeros_like(value)), **tolerance)
    assert model.stack.counters.forwards == eager.model.stack.counters.forwards
    ours, theirs = model.stack.stats(), eager.model.stack.stats()
    assert ours.realized_rates.tolist() == theirs.realized_rates.tolist()
    assert (ours.forwards, ours.flops_skipped) == (theirs.forwards, theirs.flops_skipped)


def compare(model, optimizer_of=adamw, steps=4, loss=loss, batch=batch, ahead=0, **tolerance):
    """Steps of both; returns the GraphedStep."""
    eager = Eager(model, optimizer_of, loss)
    step = GraphedStep(model, loss, optimizer_of, *batch(99), ahead=ahead)
    for number in range(steps):
        torch.testing.assert_close(step(*batch(number)), eager(*batch(number)), **tolerance)
        assert_same(step, model, eager, **tolerance)
    return step
