import pytest
import torch
import torch.nn.functional as F

from layerdrop_fast import ops
from tests.ops import eager
from tests.ops.eager import ACTIVATIONS, DTYPES, KEY, SITE, Saved, compare, rows_of, tensor
from tests.tolerances import assert_no_worse_than_eager

DROPOUT = {"dropout_p": 0.3, "key": KEY, "site": SITE}


def inputs(*shape: int, activation: str = "gelu", dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """``shape`` is that of act(u)."""
    width = shape[-1] * (2 if activation == "swiglu" else 1)
    return {
        "u": 2 * tensor(*shape[:-1], width, dtype=dtype),
        "weight": (tensor(5, shape[-1], seed=1) / shape[-1] ** 0.5).to(dtype),
        "bias": tensor(5, seed=2, dtype=dtype),
    }


@pytest.mark.parametrize("rows", [None, [1, 4]])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, dropout_p, rows):
    leaves = [value.requires_grad_() for value in inputs(2, 3, 4, activation=activation).values()]
    rows = None if rows is None else rows_of(*rows)

    def function(*values):
        return ops.act_linear(*values, activation=activation, rows=rows, dropout_p=dropout_p, key=KEY, site=SITE)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 63), (2, 3, 63), (1, 1, 1000), (2, 3, 2, 1)])
def test_no_worse_than_eager(shape, dtype, activation):
    values = inputs(*shape, activation=activation, dtype=dtype)
    rows = rows_of(*range(1, 2 * shape[0], 2))
    compare(
        lambda **v: ops.act_linear(**v, activation=activation),
        lambda **v: eager.act_linear(**v, activation=activation),
        values,
    )
    compare(
        lambda **v: ops.act_linear(**v, activation=activation, rows=rows, **DROPOUT),
        lambda **v: eager.act_linear(**v, activation=activation, rows=rows, dropout_p=0.3),
        values,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes_far_from_zero(activation):
    u = torch.tensor([-1e4, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 1e4], dtype=torch.float64)
    u = torch.stack([u, u.flip(0) / 3]).reshape(1, -1) if activation == "swiglu" else u[None]
    for dtype in (torch.float64, torch.float32):
        leaf = u.to(dtype).requires_grad_()
        expected = ACTIVATIONS[activation](leaf)
        ones = torch.ones_like(expected)
        grad_u, a = torch.ops.layerdrop_fast.act_bwd(leaf.detach(), ones, None, activation, 0.0, None, None)
        torch.testing.assert_close(a, expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_u, torch.autograd.grad(expected, leaf, ones)[0], rtol=1e-6, atol=1e-6)


def test_float32_values_and_slopes_have_their_digits():
    """A sum of rounded terms cannot do better than some units in the last place of 1; a tail has relative precision."""
    near, tail = torch.linspace(-6, 6, 100_001), torch.linspace(-88, -10, 10_001)
    for activation in ("gelu", "gelu_tanh", "silu"):
        for u, relative in ((near, False), (tail, True)):
            if relative and activation != "silu":  # the others are 0 there
                continue
            leaf = u.double().requires_grad_()
            exact = ACTIVATIONS[activation](leaf)
            (slope,) = torch.autograd.grad(exact.sum(), leaf)
            got = torch.ops.layerdrop_fast.act_bwd(u[None], torch.ones_like(u)[None], None, activation, 0.0, None, None)
            for ours, wanted in zip(got, (slope, exact.detach()), strict=True):
                difference = (ours[0] - wanted).abs() / (wanted.abs() if relative else wanted.abs().clamp(min=1))
                assert difference.max() < 2**-21


def test_non_contiguous():
    values = inputs(2, 3, 8)
    values["u"] = tensor(8, 3, 2).transpose(0, 2)
    values["weight"] = tensor(8, 5).t()
    rows = rows_of(9, 1, 9, 4)[1::2]
    compare(
        lambda **v: ops.act_linear(**v, rows=rows, **DROPOUT),
        lambda **v: eager.act_linear(**v, rows=rows, dropout_p=0.3),
        values,
    )


def test_no_rows():
    leaves = {name: value.requires_grad_() for name, value in inputs(0, 3, 8).items()}
    out = ops.act_linear(**leaves, rows=rows_of(), **DROPOUT)
    assert out.shape == (0, 3, 5)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(not grad.any() and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves.values(), strict=True))


def test_spare_rows_are_zero():
    u = tensor(3, 2, 8)
    u[2] = torch.nan
    for activation in ("gelu", "relu"):
        arguments = (rows_of(1, 4, -1), activation, 0.3, KEY, SITE)
        a = torch.ops.layerdrop_fast.act(u, *arguments)
        assert not a[2].any()
        assert a[:2].any()
        grad_u, again = torch.ops.layerdrop_fast.act_bwd(u, torch.ones_like(a), *arguments)
        assert torch.equal(a, again)
        assert not grad_u[2].any()


def test_backward_rebuilds_what_forward_had():
    for activation in ACTIVATIONS:
        u = inputs(2, 3, 63, activation=activation)["u"]
        arguments = (rows_of(1, 4), activation, 0.3, KEY, SITE)
        a = torch.ops.layerdrop_fast.act(u, *arguments)
        _, again = torch.ops.layerdrop_fast.act_bwd(u, torch.ones_like(a), *arguments)
        assert torch.equal(a, again)


def test_masks_of_a_subset_are_the_subset_of_the_mask():
    u, rows = torch.ones(6, 3, 63), rows_of(1, 2, 5)
    full = torch.ops.layerdrop_fast.act(u, None, "relu", 0.4, KEY, SITE)
    subset = torch.ops.layerdrop_fast.act(u[rows], rows, "relu", 0.4, KEY, SITE)
    assert torch.equal(subset, full[rows])
    torch.testing.assert_close(full.unique(), torch.tensor([0, 1 / 0.6]))


def test_mask_is_that_of_scatter_residual():
    values = torch.ones(2, 3, 63)
    a = torch.ops.layerdrop_fast.act(values, rows_of(1, 4), "relu", 0.4, KEY, SITE)
    out = ops.scatter_residual(torch.zeros(5, 3, 63), values, rows_of(1, 4), dropout_p=0.4, key=KEY, site=SITE)
    assert torch.equal(out[[1, 4]], a)


def test_saves_u_and_weight_only():
    leaves = {name: value.requires_grad_() for name, value in inputs(2, 3, 8).items()}
    rows = rows_of(0, 1)
    with Saved() as saved:
        ops.act_linear(**leaves, rows=rows, **DROPOUT)
    assert saved.tensors
    assert not saved.beyond(leaves["u"], leaves["weight"], rows, KEY, SITE)


@pytest.mark.parametrize("needed", ["u", "weight", "bias"])
def test_no_work_for_what_needs_no_gradient(needed, backward_calls):
    values = {name: value.requires_grad_(name == needed) for name, value in inputs(2, 3, 8).items()}
    calls = backward_calls(ops.act_linear(**values))
    assert calls.count("aten.mm") + calls.count("aten.bmm") == {"u": 1, "weight": 1, "bias": 0}[needed]
    ours = [name for name in calls if name.startswith("layerdrop_fast")]
    assert ours == {"u": ["layerdrop_fast.act_bwd"], "weight": ["layerdrop_fast.act"], "bias": []}[needed]
    assert [name for name, value in values.items() if value.grad is not None] == [needed]

    full = {name: value.detach().requires_grad_() for name, value in values.items()}
    ops.act_linear(**full).sum().backward()
    torch.testing.assert_close(values[needed].grad, full[needed].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    values = inputs(2, 20, 63, dtype=torch.float32)
    values["u"] = values["u"].to(dtype)

    def plain(u, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.gelu(u), weight, bias)

    def ours(u, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.act_linear(u, weight, bias)

    exact = eager.run(eager.act_linear, {name: value.double() for name, value in values.items()})
    got, expected = eager.run(ours, values), eager.run(plain, values)
    assert got["output 0"].dtype == torch.bfloat16
    for what, value in exact.items():
        assert_no_worse_than_eager(got[what], expected[what], value, what)


def test_float32_input_with_bfloat16_weight():
    values = inputs(2, 3, 8, dtype=torch.float32)
    values["weight"] = values["weight"].bfloat16()
    got = eager.run(ops.act_linear, values)
    assert got["output 0"].dtype == torch.bfloat16
    for name, value in values.items():
        assert got[f"gradient of {name}"].dtype == value.dtype


def test_torch_func():
    values = inputs(2, 3, 8)
    got = torch.func.grad(lambda v: ops.act_linear(**v).pow(3).sum())(values)
    expected = torch.func.grad(lambda v: eager.act_linear(**v).pow(3).sum())(values)
    torch.testing.assert_close(got, expected)
