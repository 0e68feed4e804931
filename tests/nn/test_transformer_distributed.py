"""A TransformerStack on two ranks: the gradients of one process, under DistributedDataParallel and FSDP."""

import pytest
import torch

from layerdrop_fast import set_step
from layerdrop_fast.reference.transformer_stack import transformer_stack
from tests.nn.test_distributed import ddp, fsdp_around, fsdp_layers, full, run  # noqa: F401
from tests.nn.transformer import expected_scales, key_of, stack, tensor

BATCH, LENGTH, WIDTH = 3, 4, 12
KEYWORDS = {"dropout": 0.2, "schedule": [0.0, 0.8, 0.5, 1.0], "scale": "inverse", "seed": 4}


def one_process(model, plans):
    """Gradients of the mean of both ranks' losses, by the pure-PyTorch stack."""
    losses = []
    for rank, plan in enumerate(plans):
        keep = plan.keep.repeat_interleave(2, dim=0).expand(-1, BATCH)
        scales = expected_scales(model, plan, BATCH).nan_to_num(posinf=0.0)
        key = key_of(model, plan, rank)
        x = tensor(BATCH, LENGTH, WIDTH, seed=rank)
        losses.append(transformer_stack(model, x, keep=keep, scales=scales, key=key)[-1].square().mean())
    return torch.autograd.grad(sum(losses) / 2, list(model.parameters()), allow_unused=True)


def plans_of_ranks(model, step):
    if model.granularity == "batch":
        return [model.plan(step)] * 2
    from layerdrop_fast import draw_plan

    rates = model.schedule(step)
    return [draw_plan(rates, BATCH, seed=4, step=step, stream=rank << 32) for rank in range(2)]


def steps(rank, granularity):
    for wrap in (ddp, fsdp_layers, fsdp_around):
        model, exact = (stack(granularity=granularity, **KEYWORDS) for _ in range(2))
        wrapped = wrap(model)
        for step in range(3):
            set_step(model, step)
            wrapped.zero_grad(set_to_none=True)
            plans = plans_of_ranks(exact, step)
            wrapped(tensor(BATCH, LENGTH, WIDTH, seed=rank)).square().mean().backward()
            for got, expected in zip(model.parameters(), one_process(exact, plans), strict=True):
                if expected is None:
                    assert got.grad is None or (granularity == "sample" and not full(got.grad).any())
                else:
                    torch.testing.assert_close(full(got.grad), expected)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_gradients_are_those_of_one_process(run, granularity):  # noqa: F811
    run(steps, granularity)
