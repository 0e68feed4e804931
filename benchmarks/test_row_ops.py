"""One pass a branch beside the eager composition, and dropout masks from counters beside ``bernoulli_``.

The row work of eight branches, forward and backward: add the branch to the kept half of the samples, drop out,
normalise for the next branch; a copy of the stream and the first norm come before them. There are no matrix products:
every branch's output is an input, every normalised row has a gradient of its own. Before anything is timed the ways are
checked against each other. They take turns; the figures, and how long a copy of as many bytes takes, stand in
``extra_info``.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.activation import Act
from benchmarks.side_by_side import compare
from layerdrop_fast import ops
from layerdrop_fast.ops import owned_stream

B, S, D, BRANCHES = 16, 128, 1024, 8
ROWS = torch.arange(0, B, 2, dtype=torch.int32)
INDEX = ROWS.long()
KEY = ops.step_key(torch.tensor([1, 2, 3]))
SITES = torch.arange(256, 256 + BRANCHES, dtype=torch.int32)

THREADS = 2

Streams = tuple[Tensor, list[Tensor]]  # the stream at the end, and what each branch would read


def eager(x: Tensor, branches: list[Tensor], p: float) -> Streams:
    normalised = [F.layer_norm(x.index_select(0, INDEX), (D,))]
    for y in branches:
        x = x.index_add(0, INDEX, F.dropout(y, p) if p else y)
        normalised.append(F.layer_norm(x.index_select(0, INDEX), (D,)))
    return x, normalised


def eager_in_place(x: Tensor, branches: list[Tensor], p: float) -> Streams:
    x = x.clone()
    normalised = [F.layer_norm(x.index_select(0, INDEX), (D,))]
    for y in branches:
        x.index_add_(0, INDEX, F.dropout(y, p) if p else y)
        normalised.append(F.layer_norm(x.index_select(0, INDEX), (D,)))
    return x, normalised


def functional(x: Tensor, branches: list[Tensor], p: float) -> Streams:
    normalised = [ops.gather_norm(x, ROWS)]
    for site, y in zip(SITES, branches, strict=True):
        x, xhat = ops.scatter_residual_gather_norm(x, y, ROWS, ROWS, dropout_p=p, key=KEY, site=site)
        normalised.append(xhat)
    return x, normalised


def in_place(x: Tensor, branches: list[Tensor], p: float) -> Streams:
    stream, xhat = owned_stream.enter(x, ROWS)
    normalised = [xhat]
    for site, y in zip(SITES, branches, strict=True):
        stream, xhat = owned_stream.scatter_residual_gather_norm_(
            stream, y, ROWS, ROWS, dropout_p=p, key=KEY, site=site
        )
        normalised.append(xhat)
    return stream, normalised


WAYS = {"ours": in_place, "ours, functional": functional, "eager": eager, "eager, in place": eager_in_place}


def error(a: Tensor, b: Tensor) -> float:
    """The distance of a and b, relative to b and to the precision of their dtype."""
    difference = (a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()
    return float(difference) / torch.finfo(b.dtype).eps


class Branches:
    """Inputs, and the gradients that reach the outputs."""

    def __init__(self, dtype: torch.dtype, positions: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(samples: int) -> Tensor:
            return torch.randn(samples, positions, D, generator=generator).to(dtype)

        self.x = normal(B).requires_grad_()
        self.branches = [normal(len(ROWS)).requires_grad_() for _ in range(BRANCHES)]
        self.grads = [normal(B), *(normal(len(ROWS)) for _ in range(BRANCHES + 1))]

    def run(self, way: Callable[..., Streams], p: float) -> tuple[list[Tensor], list[Tensor]]:
        x, normalised = way(self.x, self.branches, p)
        outputs = [x, *normalised]
        return outputs, list(torch.autograd.grad(outputs, [self.x, *self.branches], self.grads))

    def check(self) -> None:
        """All ways agree without dropout, and ours with each other with it."""
        for p, others in ((0.0, WAYS), (0.1, {"ours, functional": functional})):
            expected = self.run(eager if p == 0 else in_place, p)
            for name, way in others.items():
                for found, wanted in zip(self.run(way, p), expected, strict=True):
                    for a, b in zip(found, wanted, strict=True):
                        assert error(a, b) < 4, name

    def bytes_moved(self) -> int:
        """Of the branches alone: 4 passes over their kept rows forward, 5 backward."""
        return 9 * BRANCHES * self.branches[0].nbytes


@pytest.mark.parametrize("p", [0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_work(benchmark, dtype, p):
    branches = Branches(dtype, 2 if benchmark.disabled else S)
    branches.check()
    benchmark.group = f"{BRANCHES} branches' row work, [{B}, {S}, {D}], half kept, {dtype}, dropout {p}"
    compare(
        benchmark,
        {name: lambda way=way: branches.run(way, p) for name, way in WAYS.items()},
        branches.bytes_moved(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation(benchmark, dtype):
    """gelu and dropout in an FFN of 4D, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    u, grad = (torch.randn(len(ROWS), S, 4 * D, generator=generator).to(dtype) for _ in range(2))
    u.requires_grad_()

    def ours(p=0.1):
        return torch.autograd.grad(Act.apply(u, ROWS, "gelu", p, KEY, SITES[0]), u, grad)[0]

    def eager_gelu(p=0.1):
        return torch.autograd.grad(F.dropout(F.gelu(u), p), u, grad)[0]

    assert error(Act.apply(u, None, "gelu", 0.0, None, None), F.gelu(u)) < 1
    assert error(ours(0.0), eager_gelu(0.0)) < 4
    assert abs(float((ours() == 0).float().mean()) - 0.1) < 0.001  # 4,194,304 elements: six standard errors
    benchmark.group = f"gelu and dropout, [{len(ROWS)}, {S}, {4 * D}], forward and backward, {dtype}"
    # Forward reads u and writes a; backward reads u and the gradient, writes another and a.
    compare(benchmark, {"ours": ours, "eager": eager_gelu}, 6 * u.nbytes)


def test_dropout_mask(benchmark):
    """A million elements: ours reads them, draws and applies the mask and writes them; bernoulli_ only draws it."""
    values = torch.ones(1, 1024, 1024)
    mask = torch.empty_like(values)

    def ours():
        return torch.ops.layerdrop_fast.act(values, None, "relu", 0.1, KEY, SITES[0])

    assert abs(float((ours() == 0).float().mean()) - 0.1) < 0.002  # six standard errors
    benchmark.group = "dropout of 1,048,576 float32"
    ways = {"ours": ours, "bernoulli_": lambda: mask.bernoulli_(0.9), "F.dropout": lambda: F.dropout(values, 0.1)}
    compare(benchmark, ways, 2 * values.nbytes)
