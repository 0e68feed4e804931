"""DataDriven on two ranks: one set of rates, from the losses of both."""

import math

import pytest
import torch
from torch import distributed

from layerdrop_fast import LayerDropStack
from layerdrop_fast.prune import DataDriven
from tests.nn.test_distributed import run  # noqa: F401
from tests.prune.test_data_driven import Branch


def _all(x):
    found = [torch.zeros_like(x) for _ in range(2)]
    distributed.all_gather(found, x)
    return found


def rates_agree(rank, granularity):
    torch.manual_seed(rank)  # ranks draw other small networks
    stack = LayerDropStack([Branch() for _ in range(4)], 0.5, granularity=granularity, seed=2)
    driven = DataDriven(stack, 0.5, every=3, width=6)
    optimizer = torch.optim.Adam(driven.parameters(), lr=0.1)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(rank))
    seen = []
    for _ in range(9):
        losses = stack(x).square().mean(1) * (1 + rank)
        loss = losses if granularity == "sample" else losses.mean()
        seen.append(loss.detach().double().sum())
        driven.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    for buffer in (driven.rates, driven.activations, driven.regression.normal):
        one, other = _all(buffer)
        assert torch.equal(one, other)
    assert driven.rates.std() > 0
    # Three gradients of three steps each, the mean of both ranks.
    weights = [math.exp(-3 * age / 500) for age in (2, 1, 0)]
    samples = 5 if granularity == "sample" else 1
    assert driven.regression.normal[0, 0].item() == pytest.approx(3 * samples * sum(weights))
    mine = sum(weights[step // 3] * loss for step, loss in enumerate(seen))
    assert driven.regression.normal[0, -1].item() == pytest.approx(torch.stack(_all(mine)).mean().item())


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_ranks_have_the_same_rates(run, granularity):  # noqa: F811
    run(rates_agree, granularity)
