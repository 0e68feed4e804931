import pytest
import torch
import torch.nn.functional as F

from layerdrop_fast import ops
from tests.ops import eager
from tests.ops.eager import DTYPES, Saved, compare, rows_of, tensor
from tests.tolerances import assert_no_worse_than_eager

PARAMETERS = {
    "all": ("bias", "gamma", "beta"),
    "no bias": ("gamma", "beta"),
    "gamma": ("bias", "gamma"),
    "beta": ("bias", "beta"),
    "none": (),
}


def inputs(shape, names=PARAMETERS["all"], dtype=torch.float64, out=5):
    channels = shape[-1]
    every = {
        "xhat": F.layer_norm(tensor(*shape), shape[-1:]),
        "weight": tensor(out, channels, seed=1) / channels**0.5,
        "bias": tensor(out, seed=2),
        "gamma": 1 + 0.3 * tensor(channels, seed=3),
        "beta": tensor(channels, seed=4),
    }
    return {name: every[name].to(dtype) for name in ("xhat", "weight", *names)}


@pytest.mark.parametrize("names", PARAMETERS)
def test_gradcheck(names):
    leaves = {name: value.requires_grad_() for name, value in inputs((2, 3, 4), PARAMETERS[names]).items()}

    def function(*values):
        return ops.norm_linear(**dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("names", PARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 63), (2, 3, 63), (1, 1, 1000), (2, 3, 2, 8)])
def test_no_worse_than_eager(shape, dtype, names):
    compare(ops.norm_linear, eager.norm_linear, inputs(shape, PARAMETERS[names], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_norm_no_worse_than_layer_norm_and_linear(dtype):
    rows = rows_of(0, 2)
    values = inputs((3, 40, 63), dtype=dtype) | {"x": tensor(3, 40, 63, dtype=dtype, seed=7)}
    del values["xhat"]

    def ours(x, weight, bias, gamma, beta):
        return ops.norm_linear(ops.gather_norm(x, rows), weight, bias, gamma=gamma, beta=beta)

    def plain(x, weight, bias, gamma, beta):
        return F.linear(F.layer_norm(x[rows], (63,), gamma, beta), weight, bias)

    compare(ours, plain, values)


def test_non_contiguous():
    values = inputs((2, 3, 8))
    values["xhat"] = tensor(8, 3, 2).transpose(0, 2)
    values["weight"] = tensor(8, 5).t()
    compare(ops.norm_linear, eager.norm_linear, values)


def test_no_rows():
    leaves = {name: value.requires_grad_() for name, value in inputs((0, 3, 8)).items()}
    out = ops.norm_linear(**leaves)
    assert out.shape == (0, 3, 5)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(not grad.any() and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves.values(), strict=True))


def test_saves_xhat_and_parameters_only():
    leaves = {name: value.requires_grad_() for name, value in inputs((2, 3, 8)).items()}
    with Saved() as saved:
        ops.norm_linear(**leaves)
    assert saved.tensors
    assert not saved.beyond(*leaves.values())


def test_shares_xhat_with_the_norm():
    x, values = tensor(4, 3, 8).requires_grad_(), inputs((4, 3, 8))
    with Saved() as saved:
        xhat = ops.gather_norm(x)
        ops.norm_linear(xhat, values["weight"], gamma=values["gamma"])
    (rstd,) = saved.beyond(xhat, values["weight"], values["gamma"])
    assert rstd.shape == (4, 3)


@pytest.mark.parametrize("needed", ["xhat", "weight", "bias", "gamma", "beta"])
def test_no_work_for_what_needs_no_gradient(needed, backward_calls):
    values = {name: value.requires_grad_(name == needed) for name, value in inputs((2, 3, 8)).items()}
    calls = backward_calls(ops.norm_linear(**values))
    products = sum(calls.count(f"aten.{name}") for name in ("mm", "bmm", "mv"))
    assert products == {"xhat": 1, "weight": 1, "bias": 0, "gamma": 1, "beta": 1}[needed]
    assert [name for name, value in values.items() if value.grad is not None] == [needed]

    full = {name: value.detach().requires_grad_() for name, value in values.items()}
    ops.norm_linear(**full).sum().backward()
    torch.testing.assert_close(values[needed].grad, full[needed].grad)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(stream, enabled):
    """As layer_norm and linear under autocast: the product in bfloat16, parameters' gradients in float32."""
    values = inputs((3, 40, 63), dtype=torch.float32) | {"x": tensor(3, 40, 63, seed=7).to(stream)}
    del values["xhat"]

    def ours(x, weight, bias, gamma, beta):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return ops.norm_linear(ops.gather_norm(x), weight, bias, gamma=gamma, beta=beta)

    def plain(x, weight, bias, gamma, beta):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return F.linear(F.layer_norm(x.float(), (63,), gamma, beta), weight, bias)

    def exact(x, weight, bias, gamma, beta):
        return F.linear(F.layer_norm(x, (63,), gamma, beta), weight, bias)

    got, expected = eager.run(ours, values), eager.run(plain, values)
    yardstick = eager.run(exact, {name: value.double() for name, value in values.items()})
    assert got["output 0"].dtype == (torch.bfloat16 if enabled else torch.float32)
    assert got["gradient of weight"].dtype == torch.float32
    for what, value in yardstick.items():
        if stream == torch.float32 or enabled:
            assert_no_worse_than_eager(got[what], expected[what], value, what)


@pytest.mark.parametrize("parameters", ["weight", "all but bias"])
def test_float32_stream_with_bfloat16_weights(parameters):
    """Without autocast the product runs in the weight's dtype, as sharded training with cast parameters needs it."""
    values = inputs((3, 4, 63), dtype=torch.float32)
    for name in ("weight", "gamma", "beta") if parameters == "all but bias" else ("weight",):
        values[name] = values[name].bfloat16()
    got = eager.run(ops.norm_linear, values)
    assert got["output 0"].dtype == torch.bfloat16
    for name, value in values.items():
        assert got[f"gradient of {name}"].dtype == value.dtype


def test_torch_func():
    values = inputs((2, 3, 8))
    got = torch.func.grad(lambda v: ops.norm_linear(**v).pow(3).sum())(values)
    expected = torch.func.grad(lambda v: eager.norm_linear(**v).pow(3).sum())(values)
    torch.testing.assert_close(got, expected)
