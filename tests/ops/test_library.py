"""The raw ops: registrations, shapes on every path, and torch.library.opcheck."""

import copy
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerdrop_fast import _library, ops
from tests.ops.eager import DTYPES, LAYOUTS, NAMES, Case, has_cpu_kernel, listed, op, parameters, rows_of, tensor

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES = {2: (4, 6), 3: (4, 3, 6), 4: (4, 3, 2, 6)}
WITH_DROPOUT = {"p": 0.3, "scale": 1.25, "rms": True, "activation": "swiglu"}
SOME = {"rows": (0, 2, 3), "next_rows": (1,)}


def in_place(name: str) -> bool:
    return name.endswith("_")


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, rank):
    for dtype in DTYPES:
        # Tracing is slow and does not depend on the dtype.
        checks = ALL_CHECKS if dtype == torch.float32 else ALL_CHECKS[:3]
        case = Case(SHAPES[rank], dtype, torch.bfloat16, **SOME, **WITH_DROPOUT)
        torch.library.opcheck(op(name), case.arguments(name), test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_all_no_and_spare_rows_and_strides(name):
    for rows, next_rows in ((None, None), ((), ()), ((1, -1), (0, 3, -1))):
        given = Case((4, 3, 6), rows=rows, next_rows=next_rows).arguments(name)
        torch.library.opcheck(op(name), given, test_utils=ALL_CHECKS[:3])
        strided = tuple(
            LAYOUTS["sequence first"](value) if torch.is_tensor(value) and not (in_place(name) and i == 0) else value
            for i, value in enumerate(given)
        )
        torch.library.opcheck(op(name), strided, test_utils=ALL_CHECKS[:3])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_new_and_contiguous(name):
    for rows, dropout in itertools.product((None, (0, 2)), ({}, WITH_DROPOUT)):
        given = Case((4, 3, 6), rows=rows, next_rows=rows, **dropout).arguments(name)
        for out in listed(op(name)(*given)):
            assert out.is_contiguous()
            assert out.untyped_storage().nbytes() == out.nbytes
            assert all(out.data_ptr() != a.data_ptr() for a in given if torch.is_tensor(a))


@pytest.mark.parametrize("name", NAMES)
def test_schema_says_what_is_written(name):
    arguments = op(name)._schema.arguments
    assert [a.is_write for a in arguments] == [in_place(name), *[False] * (len(arguments) - 1)]
    assert not any(out.alias_info for out in op(name)._schema.returns)

    case = Case((4, 3, 6), rows=(0, 2), next_rows=(1, 2), **WITH_DROPOUT)
    given, before = case.arguments(name), case.arguments(name)
    op(name)(*given)
    written = [not torch.equal(a, b) for a, b in zip(given, before, strict=True) if torch.is_tensor(a)]
    assert written == [in_place(name), *[False] * (len(written) - 1)]


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name):
    given = Case((4, 3, 6), torch.bfloat16, rows=(0, 2), next_rows=(1, 2, 3), **WITH_DROPOUT).arguments(name)
    real = listed(op(name)(*given))
    meta = listed(op(name)(*(a.to("meta") if torch.is_tensor(a) else a for a in given)))
    for r, m in zip(real, meta, strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


def test_an_op_in_place_takes_and_returns_what_its_functional_twin_does_but_for_the_stream():
    for name in filter(in_place, NAMES):
        functional = name.removesuffix("_")
        assert len(op(name)._schema.returns) == len(op(functional)._schema.returns) - 1
        assert parameters(name)[1:] == parameters(functional)[1:]


SCHEMA_NAMES = _library.op_names()


def test_every_schema_stands_once_and_is_tested_here():
    assert len(set(SCHEMA_NAMES)) == len(SCHEMA_NAMES)
    plan = {"draw_plan", "draw_plan_", "step_key"}  # test_draw_plan.py; norm_linear_bwd: test_norm_linear.py
    assert set(SCHEMA_NAMES) == {*NAMES, *plan, "norm_linear_bwd"}


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


# What no kernel may take for sizes or addresses: the public functions refuse it, but the raw ops can be called too.
def rows_instead(*bad: tuple[int, ...]) -> dict:
    return {str(rows): lambda _, rows=rows: rows_of(*rows) for rows in bad}


BAD_ROWS = {
    "dtype": lambda rows: rows.long(),
    "dimensions": lambda rows: rows[:, None],
    **rows_instead((-2, 1), (-(2**31), 1), (2, 1), (1, 1)),
}
BEYOND_THE_BATCH = rows_instead((0, 4), (0, 2**31 - 1))
MISCOUNTED = rows_instead((0, 1, 2), (0,))
STREAM = {"dtype": lambda v: v.int(), "one dimension": lambda v: v.flatten(), "none": lambda v: v.flatten()[0]}
BRANCH = STREAM | {
    "samples": lambda v: v[:1],
    "positions": lambda v: v[:, 1:],
    "channels": lambda v: v[..., 1:],
    "dimensions": lambda v: v[:, 0],
}
SINGLE = {"None": lambda v: None, "dtype": lambda v: v.long(), "too few": lambda v: v.flatten()[1:]}
BAD = {
    **dict.fromkeys(("x", "grad_out", "grad_x_out", "grad_x"), STREAM),
    **dict.fromkeys(("y", "xhat", "grad_xhat", "grad_a"), BRANCH),
    "u": STREAM | {"samples": BRANCH["samples"], "channels": BRANCH["channels"]},  # odd, for swiglu
    "rstd": {"dtype": lambda v: v.int(), "precision": lambda v: v.half(), "too few": lambda v: v[:1]},
    "scale": {"dtype": lambda v: v.int(), "precision": lambda v: v.double(), "none": lambda v: v[None][:0]},
    "key": SINGLE,
    "site": SINGLE | {str(site): lambda v, site=site: torch.full_like(v, site) for site in (-1, 255, 2**24)},
    "batch_size": {"negative": lambda v: -1, "too small": lambda v: 1},
    "dtype": {"integer": lambda v: torch.int32},
    "activation": {"unknown": lambda v: "elu"},
}


def bad_values(name: str, parameter: str) -> dict:
    if parameter not in ("rows", "next_rows"):
        return BAD.get(parameter, {})
    if name.startswith("act"):  # its rows are those of no tensor
        return BAD_ROWS | MISCOUNTED
    of_another_argument = {
        "gather_norm": None,
        "scatter_residual_bwd": None,
        "scatter_residual_gather_norm_bwd": "next_rows",
        "scatter_residual_gather_norm_bwd_": "next_rows",
    }.get(name, "rows")
    counts = MISCOUNTED | {"None": lambda _: None} if parameter == of_another_argument else {}
    return BAD_ROWS | BEYOND_THE_BATCH | counts


@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_what_would_lead_them_beyond_memory(name):
    if not has_cpu_kernel(name):
        pytest.skip("the reference leaves it to torch")
    case = Case((4, 3, 6), rows=(0, 2), next_rows=(0, 3), **WITH_DROPOUT)
    accepted = []
    for i, parameter in enumerate(parameters(name)):
        for what, spoil in bad_values(name, parameter).items():
            good = case.arguments(name)
            given = (*good[:i], spoil(good[i]), *good[i + 1 :])
            before = copy.deepcopy(given)
            try:
                op(name)(*given)
                accepted.append((parameter, what))
            except RuntimeError:
                assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True) if torch.is_tensor(a)), what
    assert accepted == []


@pytest.mark.parametrize("name", [*filter(in_place, NAMES)])
def test_kernels_in_place_refuse_a_stream_that_is_not_their_own(name):
    if not has_cpu_kernel(name):
        pytest.skip("the reference copies")
    case = Case((4, 3, 6), rows=(0, 2), next_rows=(0, 2), p=0.3)
    stream, *others = case.arguments(name)
    for layout in ("sequence first", "channels first", "every other channel", "every other sample", "wider rows"):
        strided = LAYOUTS[layout](stream)
        with pytest.raises(RuntimeError, match="contiguous"):
            op(name)(strided, *others)
        assert torch.equal(strided, stream)
    for dim in range(3):
        expanded = stream.narrow(dim, 0, 1).expand(stream.shape)
        before = expanded.clone()
        with pytest.raises(RuntimeError, match="contiguous"):
            op(name)(expanded, *others)
        assert torch.equal(expanded, before)
    for i, value in enumerate(others):
        if torch.is_tensor(value) and value.dim() > 1:  # a branch, or rstd
            whole = stream if value.dim() == 3 else stream[..., 0]
            for part in (whole[:2], whole[2:], whole[1::2], stream.flatten()[5:][: value.numel()].view(value.shape)):
                given = (*others[:i], part, *others[i + 1 :])
                before = stream.clone()
                with pytest.raises(RuntimeError, match="shares memory with the stream"):
                    op(name)(stream, *given)
                assert torch.equal(stream, before)
