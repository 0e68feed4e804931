"""GraphedStep beside eager steps of a copy of the model: the same losses and weights, with fresh decisions."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.check import Check, Failed
from benchmarks.gpu_check.step import CHANNELS, VARIANTS, WIDTH, P
from layerdrop_fast import GraphedStep, TransformerStack

STEPS = 3
TOLERANCE = 1e-4  # of float32 sums in another order, relative to the largest element


def run(check: Check) -> dict[str, Any]:
    done = {}
    for granularity in ("batch", "sample"):
        done[granularity] = compare(*small(check, granularity))
        check.save({"steps": done})
    return {
        "largest difference": done,
        "steps": STEPS,
        "captured": "a CUDA graph" if check.device.is_gpu else "nothing: called on the CPU",
    }


def small(check: Check, granularity: str) -> tuple[TransformerStack, Tensor, Tensor]:
    """A stack, and inputs and targets of some steps."""
    layers, batch, length = (3, 3, 1) if check.dry else (6, 8, 5)
    torch.manual_seed(0)
    # Of the sizes of step.py, whose kernels are there already.
    dtype, norm, activation = VARIANTS[1]
    keywords = {"norm": norm, "activation": activation, "dtype": dtype, "device": check.device.device}
    keywords |= {"schedule": 0.45, "sampling": "systematic", "granularity": granularity, "seed": 5}
    stack = TransformerStack(layers, CHANNELS, 2, WIDTH, P, activation_dropout=P, **keywords)
    x, target = (torch.randn(STEPS, batch, length, CHANNELS, device=check.device.device) for _ in range(2))
    return stack, x, target


def compare(stack: TransformerStack, x: Tensor, target: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference, relative to the largest element, of losses and weights."""
    granularity, batch, other = stack.granularity, x.shape[1], copy.deepcopy(stack)
    step = GraphedStep(stack, loss, adamw, x[0], target[0])
    largest, plans = 0.0, set()
    optimizer = adamw(list(other.parameters()))
    for number in range(len(x)):
        plans.add(str(stack.plan(batch_size=None if granularity == "batch" else batch).keep.tolist()))
        expected = eager(other, optimizer, x[number], target[number])
        pairs = [(step(x[number], target[number]), expected), *zip(stack.parameters(), other.parameters(), strict=True)]
        for got, want in pairs:
            largest = max(largest, float((got - want).detach().abs().max() / want.detach().abs().max()))
        if not largest <= tolerance:
            raise Failed(f"granularity {granularity}, step {number}: differs from eager by {largest:.2g}")
    if len(plans) < 2:
        raise Failed("the plans of all steps are equal")
    if stack.counters.forwards != other.counters.forwards:
        raise Failed(f"counters: got {stack.counters.forwards}, expected {other.counters.forwards}")
    return largest


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x, is_causal=True) - target).square().mean()


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # A large epsilon, so that a gradient of rounding errors moves nothing.
    return torch.optim.AdamW(parameters, 1e-3, eps=1e-3, fused=True, capturable=True)


def eager(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    value = loss(model, x, target)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()
