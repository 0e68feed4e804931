"""Blocks of a weight: what they must be."""

import pytest
import torch

from layerdrop_fast import ops
from layerdrop_fast.ops import Blocks

W = torch.randn(6, 8)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ((torch.tensor([0]), 2), TypeError, r"blocks: got tuple, expected Blocks\(kept, size\)"),
        (Blocks([0], 2), TypeError, r"blocks.kept: got list, expected a tensor of torch.int64"),
        (Blocks(torch.tensor([0], dtype=torch.int32), 2), TypeError, "blocks.kept: got torch.int32"),
        (Blocks(torch.tensor([0]), 2.0), TypeError, "blocks: got size 2.0 for a weight"),
        (
            Blocks(torch.tensor([0]), 4),
            ValueError,
            r"blocks: got \[1\] of size 4, expected",
        ),
        (Blocks(torch.tensor([[0]]), 2), ValueError, r"blocks: got \[1, 1\] of size 2"),
        (Blocks(torch.tensor([3]), 2), ValueError, r"blocks.kept: got \[3\], expected ascending numbers from 0 to 2"),
        (Blocks(torch.tensor([-1]), 2), ValueError, r"blocks.kept: got \[-1\]"),
        (Blocks(torch.tensor([1, 0]), 2), ValueError, r"blocks.kept: got \[1, 0\]"),
        (Blocks(torch.tensor([1, 1]), 2), ValueError, r"blocks.kept: got \[1, 1\]"),
    ],
)
def test_bad_blocks_are_named(blocks, error, message):
    with pytest.raises(error, match=message):
        ops.norm_linear(torch.randn(3, 8), W, blocks=blocks)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2"])
def test_bad_scales_are_named(scale):
    with pytest.raises((TypeError, ValueError), match=f"scale: got .*{scale}.*, expected a finite number"):
        ops.act_linear(torch.randn(3, 8), W, scale=scale)


@pytest.mark.parametrize("kept", [[], [1], [0, 2], [0, 1, 2]])
def test_results_are_those_of_the_rows_and_columns(kept):
    blocks = Blocks(torch.tensor(kept, dtype=torch.int64), 2)
    rows = [2 * block + place for block in kept for place in range(2)]
    x, weight, bias = torch.randn(3, 8).double(), W.double().requires_grad_(), torch.randn(6).double().requires_grad_()
    got = ops.norm_linear(x, weight, bias, blocks=blocks)
    expected = x @ weight[rows].t() + bias[rows]
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(y, (weight, bias), upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
    if not kept:
        return  # a branch that keeps nothing does not run
    u, columns = torch.randn(3, 2 * len(kept)).double(), W.t().contiguous().double().requires_grad_()
    got = ops.act_linear(u, columns, activation="relu", blocks=blocks, scale=0.5)
    expected = 0.5 * u.relu() @ columns[:, rows].t()
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(y, columns, upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
