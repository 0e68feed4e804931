"""Training steps on few tokens, where launching kernels takes longer than running them: GraphedStep beside eager steps.

Before they are timed, graphed steps are held to eager ones at that size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import graphed_step
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.steps import SIZE, TINY
from layerdrop_fast import GraphedStep
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import WAYS
from layerdrop_fast.triton.timing import Device, Replay, spread

EAGER = {"batch": ("skip", "ours"), "sample": ("ours",)}
CHECKED = 3  # steps
ROUNDS, STEPS = 20, 10  # the steps of a round run without waiting for the device in between
# Relative to the largest element. Of bfloat16 two roundings: too coarse to tell one plan from another, as float32 does.
TOLERANCES = {"float32": graphed_step.TOLERANCE, "bfloat16": 2 * 2.0**-8}
OURS = {"ours": WAYS["ours"][1]}


def run(check: Check) -> dict[str, Any]:
    device, rows = Device(), []
    for granularity in EAGER:
        size = TINY if check.dry else dataclasses.replace(SIZE, samples=4, length=128)
        rows.append(measure(dataclasses.replace(size, granularity=granularity), device, check.dry))
        check.save({"rows": rows})
    return {"rows": rows}


def measure(setting: Setting, device: Device, dry: bool) -> dict[str, Any]:
    """Milliseconds of a step by each way, and how many times faster the graphed one is."""
    rounds, steps = (1, 1) if dry else (ROUNDS, STEPS)
    differences = {dtype: largest_difference(dataclasses.replace(setting, dtype=dtype)) for dtype in TOLERANCES}
    graphed = Contest(setting, OURS)
    x, target = graphed.x.detach(), graphed.target
    step = GraphedStep(graphed.ways["ours"].stack, loss, adamw, x, target)
    contest = Contest(setting, {way: WAYS[way][1] for way in EAGER[setting.granularity]})
    contest.x.requires_grad_(False)  # as the inputs of a graph
    contest.fill_optimizer()
    ways: dict[str, Callable[[], object]] = {way: eager(contest, way, steps) for way in contest.ways}
    ways["graphed"] = lambda: [step(x, target) for _ in range(steps)]
    seconds = device.in_turn({name: Replay(way, None, None) for name, way in ways.items()}, rounds)
    return {
        "size": setting.title(),
        "granularity": setting.granularity,
        "largest differences": differences,
        "captures": step.captures,
        "milliseconds": {name: spread([1e3 * s / steps for s in taken]) for name, taken in seconds.items()},
        "times faster": {
            name: spread([a / b for a, b in zip(taken, seconds["graphed"], strict=True)])
            for name, taken in seconds.items()
            if name != "graphed"
        },
    }


def largest_difference(setting: Setting) -> float:
    """Of graphed steps from eager ones; Failed where it is too large."""
    contest = Contest(setting, OURS)
    x, target = (torch.stack([value.detach()] * CHECKED) for value in (contest.x, contest.target))
    return graphed_step.compare(contest.ways["ours"].stack, x, target, TOLERANCES[setting.dtype])


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """A contest's, as is the optimizer."""
    return nn.functional.mse_loss(model(x), target)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=True)


def eager(contest: Contest, way: str, steps: int) -> Callable[[], None]:
    """Steps that keep as many layers as the plan of step 0, like all plans of the setting."""
    plan = contest.setting.plan(0)

    def run() -> None:
        contest.ways[way].follow(plan)
        for _ in range(steps):
            contest.zero_grad()
            contest.step(way)

    return run
