"""The raw ops: registrations, shapes on every path, and torch.library.opcheck."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerdrop_fast import _library, ops
from tests.ops.eager import DTYPES, KEY, SCALE, SITE, rows_of, tensor

OPS = torch.ops.layerdrop_fast
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES = {2: (4, 6), 3: (4, 3, 6), 4: (4, 3, 2, 6)}


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype, rows, next_rows, p: float) -> tuple:
    """Valid arguments of an op; ``shape`` is that of the stream."""
    kept = shape[0] if rows is None else len(rows)
    following = shape[0] if next_rows is None else len(next_rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = tensor(*shape, dtype=dtype), tensor(kept, *shape[1:], dtype=dtype, seed=1)
    xhat, rstd = tensor(following, *shape[1:], dtype=dtype, seed=2), tensor(following, *shape[1:-1], dtype=wide).abs()
    dropout = (p, KEY, SITE) if p else (0.0, None, None)
    scale = SCALE.to(wide) if p else None
    return {
        "gather_norm": (x, rows, p > 0, 1e-5),
        "gather_norm_bwd": (xhat, xhat, rstd, next_rows, shape[0], p > 0),
        "scatter_residual": (x, y, rows, scale, *dropout),
        "scatter_residual_bwd": (x, rows, scale, *dropout, torch.bfloat16),
        "scatter_residual_gather_norm": (x, y, rows, next_rows, scale, *dropout, p > 0, 1e-5),
        "scatter_residual_gather_norm_bwd": (
            *(x, xhat, xhat, rstd, rows, next_rows, scale),
            *(*dropout, p > 0, torch.float32),
        ),
        "act": (y, rows, "swiglu" if p else "gelu", *dropout),
        "act_bwd": (y, y[..., :3] if p else y, rows, "swiglu" if p else "gelu", *dropout),
    }[name]


NAMES = [
    "gather_norm",
    "gather_norm_bwd",
    "scatter_residual",
    "scatter_residual_bwd",
    "scatter_residual_gather_norm",
    "scatter_residual_gather_norm_bwd",
    "act",
    "act_bwd",
]


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, rank):
    for dtype in DTYPES:
        # Tracing is slow and does not depend on the dtype.
        checks = ALL_CHECKS if dtype == torch.float32 else ALL_CHECKS[:3]
        torch.library.opcheck(
            getattr(OPS, name),
            arguments(name, SHAPES[rank], dtype, rows_of(0, 2, 3), rows_of(1), 0.3),
            test_utils=checks,
        )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_all_no_and_spare_rows_and_strides(name):
    for rows, next_rows in ((None, None), (rows_of(), rows_of()), (rows_of(1, -1), rows_of(0, 3, -1))):
        given = arguments(name, (4, 3, 6), torch.float32, rows, next_rows, 0.0)
        torch.library.opcheck(getattr(OPS, name), given, test_utils=ALL_CHECKS[:3])
        strided = tuple(
            a.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(a) and a.dim() > 1 else a for a in given
        )
        torch.library.opcheck(getattr(OPS, name), strided, test_utils=ALL_CHECKS[:3])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_new_and_contiguous(name):
    for rows, p in itertools.product((None, rows_of(0, 2)), (0.0, 0.3)):
        given = arguments(name, (4, 3, 6), torch.float32, rows, rows, p)
        outputs = getattr(OPS, name)(*given)
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            assert out.is_contiguous()
            assert out.untyped_storage().nbytes() == out.nbytes
            assert all(out.data_ptr() != a.data_ptr() for a in given if torch.is_tensor(a))


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name):
    given = arguments(name, (4, 3, 6), torch.bfloat16, rows_of(0, 2), rows_of(1, 2, 3), 0.3)
    real = getattr(OPS, name)(*given)
    meta = getattr(OPS, name)(*(a.to("meta") if torch.is_tensor(a) else a for a in given))
    for r, m in zip(*(out if isinstance(out, tuple) else (out,) for out in (real, meta)), strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


SCHEMA_NAMES = _library.op_names()


def test_every_schema_stands_once_and_is_tested_here():
    assert len(set(SCHEMA_NAMES)) == len(SCHEMA_NAMES)
    assert set(SCHEMA_NAMES) == {*NAMES, "draw_plan", "step_key"}  # these two: test_draw_plan.py


@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_reference_serves_every_device(name):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"layerdrop_fast::{name}", "CompositeExplicitAutograd")


def test_every_schema_parameter_states_its_shape_or_range():
    lines = [line.strip() for line in _library.SCHEMAS.splitlines()]
    assert not [line for line in lines if line.startswith(("Tensor", "float", "SymInt")) and "#" not in line]


def test_public_functions_take_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, rows = mode.from_tensor(torch.randn(4, 3, 6)), mode.from_tensor(rows_of(1, 1, 9))  # not looked at
        xhat = ops.gather_norm(x, rows)
        u = ops.norm_linear(xhat, torch.empty(8, 6))
        y = ops.act_linear(u, torch.empty(6, 8), rows=rows)
        x_out, xhat = ops.scatter_residual_gather_norm(x, y, rows, None)
        assert (y.shape, x_out.shape, xhat.shape) == ((3, 3, 6), (4, 3, 6), (4, 3, 6))
        assert ops.scatter_residual(x, y, rows).shape == (4, 3, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.gather_norm(x),
        lambda x: ops.scatter_residual(x, x.square()),
        lambda x: ops.scatter_residual_gather_norm(x, x.square())[1],
        lambda x: ops.norm_linear(x, tensor(5, 6)),
        lambda x: ops.act_linear(x, tensor(5, 6)),
    ],
)
def test_double_backward_is_refused(function):
    """Not silently wrong: the gradients are ops without gradients of their own."""
    x = tensor(4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
