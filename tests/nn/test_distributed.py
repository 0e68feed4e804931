"""Two ranks: what they must agree on, and the gradients that they end with."""

import datetime
import os
import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.nn.residual import stack

B, COUNT = 3, 5
RATES = [0.0, 0.6, 0.8, 0.5, 1.0]


def data(rank):
    return torch.randn(B, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def _worker(rank, function, folder, arguments):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=15)
    distributed.init_process_group("gloo", f"file://{folder}/ranks", timeout, world_size=2, rank=rank)
    function(rank, *arguments)
    distributed.destroy_process_group()
    # Gloo's threads outlive the group and may hold tensors: freeing one while Python shuts down aborts the process.
    os._exit(0)


@pytest.fixture
def run(tmp_path):
    """Calls function(rank, ...) in two processes."""

    def runs(function, *arguments):
        multiprocessing.spawn(_worker, (function, str(tmp_path), arguments), nprocs=2)

    return runs


def one_process(model, plans):
    """Gradients by the mean of the losses of both ranks, by hand over the given plan of each, on full weights."""
    losses = []
    for rank, plan in enumerate(plans):
        x = data(rank)
        for index, layer in enumerate(model.layers):
            keep = plan.keep[index].expand(B)[:, None, None]
            x = torch.where(keep, x + torch.tanh(layer.linear(x)), x) if keep.any() else x
        losses.append(x.square().mean())
    loss = sum(losses) / len(losses)
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def plans(granularity, n, seed=11):
    """What each rank draws in forward n; both draw the same at granularity "batch"."""
    from layerdrop_fast import draw_plan

    streams = [0, 1 << 32] if granularity == "sample" else [0, 0]
    size = B if granularity == "sample" else None
    return [draw_plan(RATES, size, seed=seed, step=n, stream=stream) for stream in streams]


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def steps(rank, granularity, wrap, zeros_for_unused):
    """Three steps; the gradients are those of one process, None or zero where no rank kept a layer."""
    model = stack(COUNT, RATES, granularity=granularity)
    exact = stack(COUNT, RATES)
    wrapped = wrap(model)
    partly = 0
    for n in range(3):
        wrapped.zero_grad(set_to_none=True)
        expected_plans = plans(granularity, n)
        assert torch.equal(
            model.plan(batch_size=B if granularity == "sample" else None).keep, expected_plans[rank].keep
        )
        wrapped(data(rank)).square().mean().backward()
        expected = one_process(exact, expected_plans)
        assert sum(e is None for e in expected) >= 2
        for got, wanted in zip(model.parameters(), expected, strict=True):
            if wanted is None:
                assert got.grad is None or (zeros_for_unused and not full(got.grad).any())
            else:
                torch.testing.assert_close(full(got.grad), wanted)
        kept = [set(plan.layers) for plan in expected_plans]
        partly += len(kept[0] ^ kept[1])
    assert (partly > 0) == (granularity == "sample")


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp_layers(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_stack(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def fsdp_around(model):
    """The stack cannot see that its parameters are sharded."""
    return fully_shard(nn.Sequential(model), mesh=init_device_mesh("cpu", (2,)))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def ddp_of_a_checkpoint(model):
    return ddp(Checkpointed(model))


def all_wrappers(rank, granularity):
    for wrap in (ddp, ddp_of_a_checkpoint, fsdp_layers, fsdp_stack, fsdp_around):
        try:
            steps(rank, granularity, wrap, wrap.__name__.startswith("fsdp") and granularity == "sample")
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(wrap.__name__) from error


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_gradients_are_those_of_one_process(run, granularity):
    run(all_wrappers, granularity)


def refused(rank):
    for wrap in (ddp, fsdp_layers, fsdp_around, nn.Sequential):
        model = stack(COUNT, 0.5, seed=None)
        wrapped = wrap(model)
        with pytest.raises(RuntimeError, match="has drawn a seed of its own, and all ranks must keep the same layers"):
            wrapped(data(rank))
        assert model.counters.forwards == 0
        wrapped.eval()(data(rank))
    ddp(stack(COUNT, 0.5, seed=None, granularity="sample"))(data(rank))


def warned(rank):
    model = DistributedDataParallel(stack(COUNT, 0.5))
    with pytest.warns(UserWarning, match=r"DistributedDataParallel\(model, find_unused_parameters=True\)"):
        model(data(rank))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulating = DistributedDataParallel(stack(COUNT, 0.5))
        with accumulating.no_sync():
            accumulating(data(rank))
        model.eval()(data(rank))
        ddp(stack(COUNT, 0.5))(data(rank))


def refused_then_warned(rank):
    refused(rank)
    warned(rank)


def test_one_seed_for_all_ranks_and_a_warning_where_ddp_would_wait_for_dropped_layers(run):
    run(refused_then_warned)


def test_one_process_needs_nothing():
    model = stack(COUNT, 0.5, seed=None)
    assert model(data(0)).shape == (B, 3, 8)
