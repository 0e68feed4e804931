"""What deciding costs: a step's plan through the public API, beside the rules of fairseq and transformers.

Nothing is cached: each call draws another step. The rules are the published ones, restated; each is checked for the
share of layers that it keeps before it is timed.
"""

from itertools import count

import numpy as np
import pytest
import torch

from layerdrop_fast import DropSchedule, draw_plan

LAYERS, P = 40, 0.2
THREADS = 1


def ours():
    rates, steps = DropSchedule.of(P, LAYERS)(0), count()
    return lambda: draw_plan(rates, seed=1, step=next(steps)).layers


def ours_with_schedule():
    schedule, steps = DropSchedule.of(P, LAYERS), count()

    def decide():
        step = next(steps)
        return draw_plan(schedule(step), seed=1, step=step).layers

    return decide


def fairseq():
    """One uniform vector a step, compared layer by layer as tensors."""

    def decide():
        uniform = torch.empty(LAYERS).uniform_()
        return [layer for layer in range(LAYERS) if uniform[layer] > P]

    return decide


def transformers():
    """One random tensor a layer."""
    return lambda: [layer for layer in range(LAYERS) if not torch.rand([]) < P]


@pytest.mark.benchmark(group="decisions of a step, 40 layers, batch granularity")
@pytest.mark.parametrize("rule", [ours, ours_with_schedule, fairseq, transformers])
def test_batch_plan(benchmark, rule):
    decide = rule()
    kept = np.mean([len(decide()) for _ in range(400)])
    # 16,000 decisions: five standard errors are 0.016.
    assert abs(kept / LAYERS - (1 - P)) < 0.016
    benchmark(decide)


@pytest.mark.benchmark(group="decisions of a step, 1000 layers x 1024 samples, with rows")
@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_sample_plan(benchmark, sampling):
    rates, steps = np.full(1000, P), count()

    def decide():
        plan = draw_plan(rates, 1024, seed=1, step=next(steps), sampling=sampling)
        return plan, plan.rows(0)

    plan, rows = decide()
    assert len(rows) == plan.kept_counts[0]
    assert abs(plan.realized_rates.mean() - P) < 0.002  # five standard errors of 1,024,000 decisions
    benchmark(decide)
