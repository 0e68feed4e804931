"""draw_plan and step_key on a GPU: the host planner's bits, graphs, no waiting.

What compares runs on CPU tensors too, so that it is known to work and the device alone is what is tested.
"""

import random

import numpy as np
import pytest
import torch

from layerdrop_fast import _extension, ops
from layerdrop_fast.reference.philox import step_key as reference_step_key
from tests.test_planners_agree import random_request

KERNELS = [
    pytest.mark.cuda,
    pytest.mark.skipif(_extension.cuda_missing is not None, reason=f"CUDA kernels {_extension.cuda_missing}"),
]
CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=KERNELS)])
draw_plan = torch.ops.layerdrop_fast.draw_plan


def counters_on(device, seed, step, stream):
    return torch.tensor([word - 2**64 if word >> 63 else word for word in (seed, step, stream)], device=device)


def assert_host_plan(drawn, request):
    """keep, rows, slot and kept are what the host planner draws for the arguments of draw_keep."""
    keep = _extension.planner.draw_keep(*request)
    rows, kept = _extension.planner.compact_rows(keep)
    expected = [keep, rows, _extension.planner.compact_slot(keep), kept]
    for got, want in zip(drawn, map(torch.from_numpy, expected), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want), request


def assert_op_draws(request, device):
    rates, batch_size, *counters, systematic, min_kept = request
    rates = torch.from_numpy(rates).to(device)
    assert_host_plan(draw_plan(counters_on(device, *counters), rates, batch_size, systematic, min_kept), request)


@CPU_AND_CUDA
def test_random_requests_have_the_bits_of_the_host_planner(device):
    rng = random.Random(20260905)
    for _ in range(500):
        request = random_request(rng)
        assert_op_draws(request, device)
        counters = counters_on("cpu", *request[2:5])
        assert torch.equal(ops.step_key(counters.to(device)).cpu(), reference_step_key(counters))


@CPU_AND_CUDA
@pytest.mark.parametrize("systematic", [False, True])
@pytest.mark.parametrize(
    ("num_layers", "batch_size"), [(40, 64), (1000, 1024), (3, 1025), (2, 5000), (1, 1), (2500, None), (70000, 1)]
)
def test_one_launch_draws_any_size(device, num_layers, batch_size, systematic):
    rates, units = np.linspace(0, 1, num_layers), batch_size or num_layers
    for min_kept in (0, units // 2 + 1):
        assert_op_draws((rates, batch_size, 3, 2**64 - 1, 1, systematic, min_kept), device)


@CPU_AND_CUDA
def test_views_with_gaps(device):
    rates, counters = np.linspace(0, 1, 7), torch.tensor([3, 0, 5, 0, 7, 0], device=device)[::2]
    gaps = torch.from_numpy(np.repeat(rates, 2)).to(device)[::2]
    assert_host_plan(draw_plan(counters, gaps, 9, True, 2), (rates, 9, 3, 5, 7, True, 2))


@CPU_AND_CUDA
def test_opcheck(device):
    counters, rates = counters_on(device, 3, 5, 7), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.layerdrop_fast.step_key.default, (counters,))
    for op in (draw_plan, torch.ops.layerdrop_fast.draw_plan_):
        torch.library.opcheck(op.default, (counters.clone(), rates, 5, True, 1))


def on_cuda(test):
    for mark in KERNELS:
        test = mark(test)
    return test


@on_cuda
@pytest.mark.parametrize("systematic", [False, True])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_captured_graph_draws_the_plan_of_the_next_step_at_each_replay(batch_size, systematic):
    rates, first = np.linspace(0, 0.9, 40), 2**64 - 2
    start = counters_on("cuda", 3, first, 7)
    counters, device_rates = start.clone(), torch.from_numpy(rates).to("cuda")
    sampling = "systematic" if systematic else "bernoulli"

    def draw():
        return ops.draw_plan(counters, device_rates, batch_size, sampling=sampling, min_kept=2, advance=True)

    draw()  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw()
    counters.copy_(start)
    for replay in range(5):
        graph.replay()
        step = (first + replay) % 2**64
        assert_host_plan(drawn, (rates, batch_size, 3, step, 7, systematic, 2))
    assert counters.tolist() == [3, 3, 7]


@on_cuda
def test_nothing_waits_for_the_device():
    counters, rates = counters_on("cuda", 1, 2, 3), torch.rand(40, dtype=torch.float64, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.step_key(counters)
        for advance in (False, True):
            ops.draw_plan(counters, rates, 64, sampling="systematic", min_kept=1, advance=advance)
            ops.draw_plan(counters, rates[:0], advance=advance)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert counters.tolist() == [1, 4, 3]


@on_cuda
def test_a_rate_that_is_none_counts_as_the_nearer_end_and_nan_as_dropped():
    rates = torch.tensor([-1.0, 2.0, float("nan"), float("inf"), -float("inf")], dtype=torch.float64, device="cuda")
    for batch_size in (None, 9):
        keep = ops.draw_plan(counters_on("cuda", 1, 2, 3), rates, batch_size)[0]
        assert keep.all(dim=1).tolist() == [True, False, False, False, True]
        assert keep.any(dim=1).tolist() == [True, False, False, False, True]
