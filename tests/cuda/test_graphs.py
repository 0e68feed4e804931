"""GraphedStep on a GPU: captured once, replays are eager steps, each with a plan of its own, and nothing waits."""

from functools import partial

import pytest
import torch

from layerdrop_fast import GraphedStep, _extension
from tests.graphed import BATCH, Eager, Model, adamw, assert_same, batch, loss, sgd

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_extension.cuda_missing is not None, reason=f"CUDA kernels {_extension.cuda_missing}"),
]
# The sums of matrix products may have another order in a graph.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_replays_equal_eager_steps(granularity, optimizer_of):
    model = Model(device="cuda", granularity=granularity, dropout=0.2)
    inputs = partial(batch, device="cuda")
    eager = Eager(model, optimizer_of)
    step = GraphedStep(model, loss, optimizer_of, *inputs(99))
    assert_same(step, model, eager, rtol=0, atol=0)  # nothing has moved
    plans = []
    for number in range(5):
        plans.append(model.stack.plan(batch_size=BATCH if granularity == "sample" else None).keep.tolist())
        value = step(*inputs(number))
        torch.testing.assert_close(value, eager(*inputs(number)), **CLOSE)
        assert_same(step, model, eager, **CLOSE)
    assert step.captures == 1
    assert any(plan != plans[0] for plan in plans)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_replay_waits_for_nothing(granularity):
    model = Model(device="cuda", granularity=granularity, dropout=0.2)
    inputs = [value.pin_memory() for value in batch(0)]
    step = GraphedStep(model, loss, adamw, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(*inputs)
        model.stack.counters.set_step(7)
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.stack.counters.step == 8
