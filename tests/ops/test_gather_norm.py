import pytest
import torch

from layerdrop_fast import ops
from tests.ops import eager
from tests.ops.eager import DTYPES, Saved, compare, rows_of, same_bits, tensor, with_nan_payloads

NORMS = ("layernorm", "rmsnorm")
SUBSETS = {"all": None, "some": [0, 2, 3], "one": [4], "every": [0, 1, 2, 3, 4], "none": []}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("subset", SUBSETS)
def test_gradcheck(norm, subset):
    rows = None if subset == "all" else rows_of(*SUBSETS[subset])
    x = tensor(5, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.gather_norm(x, rows, norm=norm), x)


SHAPES = [(5, 63), (1, 1000), (5, 3, 63), (5, 2, 3, 7)]
# Of a single channel RMSNorm leaves the sign: its exact gradient is eps, below any rounding of xhat.
CASES = [("layernorm", (5, 1)), *[(norm, shape) for norm in NORMS for shape in SHAPES]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_no_worse_than_eager(norm, shape, dtype):
    x = tensor(*shape, dtype=dtype) + 0.5
    for rows in (None, rows_of(*range(0, shape[0], 2))):
        compare(
            lambda x, rows=rows: ops.gather_norm(x, rows, norm=norm),
            lambda x, rows=rows: eager.gather_norm(x, rows, norm),
            {"x": x},
        )


def test_eps_is_used():
    x = 1e-3 * tensor(2, 8)
    compare(
        lambda x: ops.gather_norm(x, norm="rmsnorm", eps=1e-2),
        lambda x: eager.gather_norm(x, norm="rmsnorm", eps=1e-2),
        {"x": x},
    )


@pytest.mark.parametrize("norm", NORMS)
def test_non_contiguous(norm):
    x = tensor(7, 63, 5).transpose(0, 2)
    rows = rows_of(9, 1, 9, 4)[1::2]
    assert not x.is_contiguous()
    assert not rows.is_contiguous()
    compare(lambda x: ops.gather_norm(x, rows, norm=norm), lambda x: eager.gather_norm(x, rows, norm), {"x": x})
    assert ops.gather_norm(x, None, norm=norm).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_are_not_read(dtype):
    clean = tensor(5, 3, 63, dtype=dtype)
    poisoned = with_nan_payloads(clean, [1, 4]).requires_grad_()
    rows = rows_of(0, 2, 3)
    xhat = ops.gather_norm(poisoned, rows)
    assert same_bits(xhat, ops.gather_norm(clean, rows))
    (grad,) = torch.autograd.grad(xhat.square().sum() + xhat.sum(), poisoned)
    assert grad.isfinite().all()
    assert not grad[[1, 4]].any()


def test_spare_rows_are_zero_and_leave_no_gradient():
    x = tensor(4, 3, 8).requires_grad_()
    xhat, rstd = torch.ops.layerdrop_fast.gather_norm(x.detach(), rows_of(1, 3, -1, -1), False, 1e-5)
    assert not xhat[2:].any()
    assert not rstd[2:].any()
    torch.testing.assert_close(xhat[:2], eager.gather_norm(x.detach(), rows_of(1, 3)))
    grads = [
        torch.autograd.grad(ops.gather_norm(x, rows).pow(3).sum() + 5 * ops.gather_norm(x, rows)[2:].sum(), x)[0]
        for rows in (rows_of(1, 3), rows_of(1, 3, -1, -1))
    ]
    assert torch.equal(*grads)


def test_no_rows():
    x = tensor(4, 3, 8).requires_grad_()
    xhat = ops.gather_norm(x, rows_of())
    assert xhat.shape == (0, 3, 8)
    (grad,) = torch.autograd.grad(xhat.sum(), x)
    assert not grad.any()


def test_saves_xhat_and_rstd_only():
    x = tensor(4, 3, 8).requires_grad_()
    rows = rows_of(0, 3)
    with Saved() as saved:
        xhat = ops.gather_norm(x, rows)
    assert len(saved.beyond(x)) == len(saved.tensors)
    (rstd,) = saved.beyond(xhat, rows)
    assert rstd.shape == (2, 3)


def test_no_gradient_no_graph():
    assert not ops.gather_norm(tensor(2, 8)).requires_grad
    with torch.no_grad():
        assert not ops.gather_norm(tensor(2, 8).requires_grad_()).requires_grad


def test_torch_func():
    x, rows = tensor(4, 8), rows_of(1, 2)
    got = torch.func.grad(lambda x: ops.gather_norm(x, rows).pow(3).sum())(x)
    expected = torch.func.grad(lambda x: eager.gather_norm(x, rows).pow(3).sum())(x)
    torch.testing.assert_close(got, expected)
