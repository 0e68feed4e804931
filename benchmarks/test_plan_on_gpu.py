"""The plan of a step on the device: a captured graph of DRAWS plans, so that what launches cost the host is left out.

A replay's time divided by DRAWS is the time of one plan; the goal for 40 layers x 64 samples is 10 µs.
"""

import pytest
import torch

from layerdrop_fast import _extension, ops

THREADS = 1
DRAWS = 100

pytestmark = pytest.mark.skipif(
    _extension.cuda_missing is not None or not torch.cuda.is_available(),
    reason=f"needs a GPU; CUDA kernels {_extension.cuda_missing or 'loaded'}",
)


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
@pytest.mark.parametrize(("num_layers", "batch_size"), [(40, 64), (40, None), (1000, 1024)])
def test_a_plan(benchmark, num_layers, batch_size, sampling, advance):
    counters = torch.tensor([1, 2, 3], device="cuda")
    rates = torch.linspace(0, 0.5, num_layers, dtype=torch.float64, device="cuda")
    benchmark.group = f"plan-{num_layers}x{batch_size}-on-gpu"
    benchmark.extra_info["draws"] = DRAWS

    def draw():
        return ops.draw_plan(counters, rates, batch_size, sampling=sampling, advance=advance)

    draw()  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(DRAWS):
            draw()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    benchmark(replay)
