import pytest
import torch

from layerdrop_fast import ops
from tests.ops import eager
from tests.ops.eager import DTYPES, KEY, SCALE, SITE, Saved, compare, rows_of, same_bits, tensor, with_nan_payloads

DROPOUT = {"scale": 1.25, "dropout_p": 0.3, "key": KEY, "site": SITE}
# Rows of this branch and of the next.
PAIRS = {
    "all to all": (None, None),
    "all to some": (None, [1, 4]),
    "some to all": ([1, 4], None),
    "overlapping": ([0, 2, 3], [2, 4]),
    "disjoint": ([0, 1], [3, 4]),
    "none to some": ([], [1, 4]),
    "some to none": ([0, 3], []),
}


def rows_pair(name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rows, next_rows = (None if side is None else rows_of(*side) for side in PAIRS[name])
    return rows, next_rows


def inputs(rows: torch.Tensor | None, *shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    x = tensor(*shape, dtype=dtype)
    return {"x": x, "y": tensor(*(x if rows is None else x[rows]).shape, dtype=dtype, seed=1)}


def in_two_steps(x, y, rows, next_rows, norm="layernorm"):
    x_out = eager.scatter_residual(x, y, rows, 1.25, 0.3)
    return x_out, eager.gather_norm(x_out, next_rows, norm)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradcheck(pair, norm):
    rows, next_rows = rows_pair(pair)
    leaves = [value.requires_grad_() for value in inputs(rows, 5, 2, 4).values()]

    def function(x, y):
        return ops.scatter_residual_gather_norm(x, y, rows, next_rows, norm=norm, **DROPOUT)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1000), (5, 3, 63), (5, 2, 3, 7)])
def test_no_worse_than_eager(shape, dtype, norm):
    for pair in ("all to all", "all to some", "overlapping"):
        rows, next_rows = rows_pair(pair)
        compare(
            lambda x, y, r=rows, n=next_rows: ops.scatter_residual_gather_norm(x, y, r, n, norm=norm, **DROPOUT),
            lambda x, y, r=rows, n=next_rows: in_two_steps(x, y, r, n, norm),
            inputs(rows, *shape, dtype=dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_two_ops_in_one(dtype):
    """The norm sees the stream as rounded to its dtype, so one pass and two give the same bits."""
    rows, next_rows = rows_pair("overlapping")
    x, y = inputs(rows, 5, 3, 63, dtype=dtype).values()
    x_out, xhat = ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT)
    assert same_bits(x_out, ops.scatter_residual(x, y, rows, **DROPOUT))
    assert same_bits(xhat, ops.gather_norm(x_out, next_rows))


def test_same_rows_twice():
    rows = rows_of(0, 3)
    compare(
        lambda x, y: ops.scatter_residual_gather_norm(x, y, rows, rows, **DROPOUT),
        lambda x, y: in_two_steps(x, y, rows, rows),
        inputs(rows, 5, 3, 8),
    )


def test_branch_of_another_dtype():
    rows, next_rows = rows_pair("overlapping")
    compare(
        lambda x, y: ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT),
        lambda x, y: in_two_steps(x, y, rows, next_rows),
        {"x": tensor(5, 3, 63, dtype=torch.float32), "y": tensor(3, 3, 63, dtype=torch.bfloat16, seed=1)},
    )


def test_non_contiguous():
    rows, next_rows = rows_of(1, 4), rows_of(9, 0, 9, 4)[1::2]
    compare(
        lambda x, y: ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT),
        lambda x, y: in_two_steps(x, y, rows, next_rows),
        {"x": tensor(7, 63, 5).transpose(0, 2), "y": tensor(63, 7, 2, seed=1).permute(2, 0, 1)},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_pass_bit_for_bit(dtype):
    rows, next_rows = rows_of(0, 2, 3), rows_of(2, 4)
    x = with_nan_payloads(tensor(5, 3, 63, dtype=dtype), [1]).requires_grad_()
    y = tensor(3, 3, 63, dtype=dtype, seed=1).requires_grad_()
    x_out, xhat = ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT)
    assert same_bits(x_out[[1, 4]], x[[1, 4]])
    assert xhat.isfinite().all()

    grad_x_out = with_nan_payloads(tensor(5, 3, 63, dtype=dtype, seed=2), [1])
    grad_x, grad_y = torch.autograd.grad((x_out, xhat), (x, y), (grad_x_out, tensor(2, 3, 63, dtype=dtype, seed=3)))
    outside_next = [0, 1, 3]
    assert same_bits(grad_x[outside_next], grad_x_out[outside_next])
    assert grad_x[[2, 4]].isfinite().all()
    assert grad_y.isfinite().all()


def test_spare_rows():
    x, y = inputs(rows_of(0, 3), 5, 3, 8).values()
    spare_y = torch.cat([y, torch.full((1, 3, 8), torch.nan, dtype=y.dtype)])
    results = []
    for rows, next_rows, branch in (
        (rows_of(0, 3), rows_of(3, 4), y),
        (rows_of(0, 3, -1), rows_of(3, 4, -1, -1), spare_y),
    ):
        leaves = (x.clone().requires_grad_(), branch.clone().requires_grad_())
        x_out, xhat = ops.scatter_residual_gather_norm(*leaves, rows, next_rows, **DROPOUT)
        grads = torch.autograd.grad((x_out, xhat), leaves, (x_out.detach(), torch.ones_like(xhat) + xhat.detach() ** 2))
        results.append((x_out, xhat, *grads))
    exact, spare = results
    assert torch.equal(spare[0], exact[0])
    assert torch.equal(spare[1], torch.cat([exact[1], torch.zeros(2, 3, 8, dtype=x.dtype)]))
    assert torch.equal(spare[2], exact[2])
    assert torch.equal(spare[3], torch.cat([exact[3], torch.zeros(1, 3, 8, dtype=x.dtype)]))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    rows, next_rows = rows_pair("overlapping")
    compare(
        lambda x, y: ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT)[used],
        lambda x, y: in_two_steps(x, y, rows, next_rows)[used],
        inputs(rows, 5, 3, 8),
    )


def test_saves_xhat_and_rstd_only():
    rows, next_rows = rows_pair("overlapping")
    x, y = (value.requires_grad_() for value in inputs(rows, 5, 3, 8).values())
    with Saved() as saved:
        x_out, xhat = ops.scatter_residual_gather_norm(
            x, y, rows, next_rows, scale=SCALE, dropout_p=0.3, key=KEY, site=SITE
        )
    assert len(saved.beyond(x, y, x_out)) == len(saved.tensors)
    (rstd,) = saved.beyond(xhat, rows, next_rows, SCALE, KEY, SITE)
    assert rstd.shape == (2, 3)


@pytest.mark.parametrize(("x_needs", "y_needs"), [(True, False), (False, True)])
def test_one_input_needs_no_gradient(x_needs, y_needs):
    rows, next_rows = rows_pair("overlapping")
    both = [value.requires_grad_() for value in inputs(rows, 5, 3, 8).values()]
    one = [both[0].detach().requires_grad_(x_needs), both[1].detach().requires_grad_(y_needs)]
    for x, y in (both, one):
        x_out, xhat = ops.scatter_residual_gather_norm(x, y, rows, next_rows, **DROPOUT)
        (x_out.pow(2).sum() + xhat.pow(3).sum()).backward()
    for full, partial, needed in zip(both, one, (x_needs, y_needs), strict=True):
        assert (partial.grad is None) != needed
        assert partial.grad is None or torch.equal(partial.grad, full.grad)
