import pytest
import torch

from layerdrop_fast import ops
from tests.ops import eager
from tests.ops.eager import DTYPES, KEY, SCALE, SITE, Saved, compare, rows_of, same_bits, tensor, with_nan_payloads

SUBSETS = {"all": None, "some": [0, 2, 3], "one": [4], "every": [0, 1, 2, 3, 4], "none": []}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("subset", SUBSETS)
def test_gradcheck(subset, dropout_p):
    rows = None if subset == "all" else rows_of(*SUBSETS[subset])
    kept = 5 if rows is None else len(rows)
    x, y = tensor(5, 2, 4).requires_grad_(), tensor(kept, 2, 4, seed=1).requires_grad_()

    def function(x, y):
        return ops.scatter_residual(x, y, rows, scale=1.25, dropout_p=dropout_p, key=KEY, site=SITE)

    assert torch.autograd.gradcheck(function, (x, y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (1, 1000), (5, 3, 63), (5, 2, 3, 7)])
def test_no_worse_than_eager(dtype, shape):
    for rows in (None, rows_of(*range(0, shape[0], 2))):
        x = tensor(*shape, dtype=dtype)
        inputs = {"x": x, "y": tensor(*(x if rows is None else x[rows]).shape, dtype=dtype, seed=1)}
        for p in (0.0, 0.3):
            compare(
                lambda x, y, rows=rows, p=p: ops.scatter_residual(
                    x, y, rows, scale=SCALE, dropout_p=p, key=KEY, site=SITE
                ),
                lambda x, y, rows=rows, p=p: eager.scatter_residual(x, y, rows, 1.25, p),
                inputs,
            )


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_branch_of_another_dtype(stream, branch):
    rows = rows_of(1, 3)
    compare(
        lambda x, y: ops.scatter_residual(x, y, rows, scale=1.25, dropout_p=0.3, key=KEY, site=SITE),
        lambda x, y: eager.scatter_residual(x, y, rows, 1.25, 0.3),
        {"x": tensor(4, 3, 63, dtype=stream), "y": tensor(2, 3, 63, dtype=branch, seed=1)},
    )


def test_float32_stream_keeps_more_than_a_bfloat16_branch_can():
    x, y = torch.full((1, 8), 1.0), torch.full((1, 8), 2.0**-12, dtype=torch.bfloat16)
    assert torch.equal(ops.scatter_residual(x, y), x + 2.0**-12)


def test_scale_as_number_and_as_tensor():
    x, y = tensor(4, 8), tensor(4, 8, seed=1)
    assert torch.equal(ops.scatter_residual(x, y, scale=1.25), ops.scatter_residual(x, y, scale=SCALE))
    assert torch.equal(ops.scatter_residual(x, y, scale=0.0), x)
    assert torch.equal(ops.scatter_residual(x, y), x + y)


def test_everything_dropped_out_adds_nothing():
    x, y = tensor(4, 8).requires_grad_(), tensor(4, 8, seed=1).requires_grad_()
    out = ops.scatter_residual(x, y, dropout_p=1.0, key=KEY, site=SITE)
    assert torch.equal(out, x)
    grads = torch.autograd.grad(out.sum(), (x, y))
    assert torch.equal(grads[0], torch.ones_like(x))
    assert not grads[1].any()


def test_non_contiguous():
    rows = rows_of(9, 1, 9, 4)[1::2]
    inputs = {"x": tensor(7, 63, 5).transpose(0, 2), "y": tensor(63, 7, 2, seed=1).permute(2, 0, 1)}
    compare(
        lambda x, y: ops.scatter_residual(x, y, rows, scale=1.25, dropout_p=0.3, key=KEY, site=SITE),
        lambda x, y: eager.scatter_residual(x, y, rows, 1.25, 0.3),
        inputs,
    )
    assert ops.scatter_residual(inputs["x"], inputs["y"], rows).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_pass_bit_for_bit(dtype):
    dropped, rows = [1, 4], rows_of(0, 2, 3)
    x, y = tensor(5, 3, 63, dtype=dtype), tensor(3, 3, 63, dtype=dtype, seed=1).requires_grad_()
    x[dropped, 0, 1] = -0.0
    poisoned = with_nan_payloads(x, [1]).requires_grad_()
    out = ops.scatter_residual(poisoned, y, rows, scale=1.25, dropout_p=0.3, key=KEY, site=SITE)
    assert same_bits(out[dropped], poisoned[dropped])
    assert out[[0, 2, 3]].isfinite().all()
    assert not same_bits(out[[0, 2, 3]], poisoned[[0, 2, 3]])

    grad_out = with_nan_payloads(tensor(5, 3, 63, dtype=dtype, seed=2), [1])
    grad_x, grad_y = torch.autograd.grad(out, (poisoned, y), grad_out)
    assert same_bits(grad_x, grad_out)
    assert grad_y.isfinite().all()
    assert grad_y.any()


def test_spare_rows_add_nothing_and_get_no_gradient():
    x, y = tensor(4, 3, 8).requires_grad_(), tensor(2, 3, 8, seed=1).requires_grad_()
    spare = torch.cat([y.detach(), torch.full((2, 3, 8), torch.nan, dtype=y.dtype)]).requires_grad_()
    outs, grads = [], []
    for rows, branch in ((rows_of(1, 3), y), (rows_of(1, 3, -1, -1), spare)):
        outs.append(ops.scatter_residual(x, branch, rows, scale=1.25, dropout_p=0.3, key=KEY, site=SITE))
        grads.append(torch.autograd.grad(outs[-1].pow(2).sum(), (x, branch)))
    assert torch.equal(*outs)
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1][:2])
    assert not grads[1][1][2:].any()


def test_no_rows_is_a_differentiable_identity():
    x, y = with_nan_payloads(tensor(4, 3, 8), [2]).requires_grad_(), tensor(0, 3, 8).requires_grad_()
    out = ops.scatter_residual(x, y, rows_of())
    assert same_bits(out, x)
    assert out.data_ptr() != x.data_ptr()
    grad_out = tensor(4, 3, 8, seed=3)
    grad_x, grad_y = torch.autograd.grad(out, (x, y), grad_out)
    assert same_bits(grad_x, grad_out)
    assert grad_y.shape == (0, 3, 8)


def test_inputs_are_not_written():
    x, y, rows = tensor(4, 8), tensor(2, 8, seed=1), rows_of(0, 2)
    before = x.clone(), y.clone(), rows.clone(), KEY.clone()
    ops.scatter_residual(x, y, rows, dropout_p=0.5, key=KEY, site=SITE)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, rows, KEY), strict=True))


def test_saves_no_activation():
    x, y, rows = tensor(4, 8).requires_grad_(), tensor(2, 8).requires_grad_(), rows_of(0, 2)
    with Saved() as saved:
        ops.scatter_residual(x, y, rows, scale=SCALE, dropout_p=0.5, key=KEY, site=SITE)
    assert saved.tensors
    assert not saved.beyond(rows, SCALE, KEY, SITE)


def test_masks_of_a_subset_are_the_subset_of_the_mask():
    x, y, rows = torch.zeros(6, 3, 63), torch.ones(6, 3, 63), rows_of(1, 2, 5)

    def function(y, rows, site=SITE):
        return ops.scatter_residual(x, y, rows, dropout_p=0.4, key=KEY, site=site)

    full = function(y, None)
    assert torch.equal(function(y[rows], rows)[rows], full[rows])
    assert 0.5 < full.count_nonzero() / full.numel() < 0.7
    torch.testing.assert_close(full.unique(), torch.tensor([0, 1 / 0.6]))
    assert not torch.equal(full, function(y, None, torch.tensor(261, dtype=torch.int32)))


def test_backward_regenerates_the_mask_of_forward():
    y = torch.ones(6, 3, 63, requires_grad=True)
    out = ops.scatter_residual(torch.zeros(6, 3, 63), y, scale=0.5, dropout_p=0.4, key=KEY, site=SITE)
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert torch.equal(grad, out)


@pytest.mark.parametrize(("x_needs", "y_needs"), [(True, False), (False, True), (True, True)])
def test_no_work_for_what_needs_no_gradient(x_needs, y_needs, backward_calls):
    x, y = tensor(4, 8).requires_grad_(x_needs), tensor(4, 8).requires_grad_(y_needs)
    out = ops.scatter_residual(x, y)
    calls = backward_calls(out)
    assert ("layerdrop_fast.scatter_residual_bwd" in calls) == y_needs
    assert (x.grad is not None, y.grad is not None) == (x_needs, y_needs)


def test_torch_func():
    x, y, rows = tensor(4, 8), tensor(2, 8, seed=1), rows_of(1, 2)
    got = torch.func.grad(lambda y: ops.scatter_residual(x, y, rows, scale=1.25).pow(3).sum())(y)
    expected = torch.func.grad(lambda y: eager.scatter_residual(x, y, rows, 1.25).pow(3).sum())(y)
    torch.testing.assert_close(got, expected)
