"""The stream in place against the functional ops: the same bits, and nobody else's tensor written."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import ops
from layerdrop_fast.ops import owned_stream
from tests.ops.eager import KEY, Saved, rows_of, same_bits, tensor, with_nan_payloads

BATCH = 5
# Sample 1 is in none of them.
ROWS = ((0, 2, 3), (), (0, 2, 3, 4), (-1, 0, -1, 3, -1), (-1,), (2, 4))
ALL_AND_SOME = (None, (0, 2, 3), None, None, (), (1, -1), (0, 1, 2, 3, 4))
CHAINS = {"some": ROWS, "all": ALL_AND_SOME, "one branch": ((0, 3),), "a branch of nothing": ((),)}
DTYPES = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]


def branch(xhat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (xhat.to(weight.dtype) * weight).tanh()


def branch_beside(xhat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Its gradient is that of its weight alone."""
    return branch(xhat.detach(), weight)


def dropout(index: int) -> dict:
    site = torch.tensor(256 + index, dtype=torch.int32)
    return {"scale": 1 + index / 4, "dropout_p": 0.1 * index, "key": KEY, "site": site}


def functional(x, weights, plan, norm="layernorm", branch=branch):
    rows = [None if r is None else rows_of(*r) for r in plan]
    x, xhat = ops.scatter_residual_gather_norm(x, x[:0], rows_of(), rows[0], norm=norm)
    for i, weight in enumerate(weights[:-1]):
        y = branch(xhat, weight)
        x, xhat = ops.scatter_residual_gather_norm(x, y, rows[i], rows[i + 1], norm=norm, **dropout(i))
    return ops.scatter_residual(x, branch(xhat, weights[-1]), rows[-1], **dropout(len(plan) - 1))


def in_place(x, weights, plan, norm="layernorm", branch=branch):
    rows = [None if r is None else rows_of(*r) for r in plan]
    stream, xhat = owned_stream.enter(x, rows[0], norm=norm)
    for i, weight in enumerate(weights[:-1]):
        y = branch(xhat, weight)
        stream, xhat = owned_stream.scatter_residual_gather_norm_(
            stream, y, rows[i], rows[i + 1], norm=norm, **dropout(i)
        )
    y = branch(xhat, weights[-1])
    return owned_stream.scatter_residual_(stream, y, rows[-1], **dropout(len(plan) - 1))


def leaves(plan, *, shape=(BATCH, 3, 17), dtype=torch.float64, branch_dtype=None, x_needs=True, y_needs=True):
    x = tensor(*shape, dtype=dtype).requires_grad_(x_needs)
    weights = [
        tensor(shape[-1], dtype=branch_dtype or dtype, seed=i + 1).requires_grad_(y_needs) for i in range(len(plan))
    ]
    return x, weights


def gradients(out, x, weights, grad=None, **keywords):
    wanted = [leaf for leaf in (x, *weights) if leaf.requires_grad]
    grad = tensor(*out.shape, dtype=out.dtype, seed=70) if grad is None else grad
    return torch.autograd.grad(out, wanted, grad, **keywords)


def assert_same_bits(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert same_bits(g.contiguous(), e.contiguous())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("dtype", "branch_dtype"), DTYPES)
@pytest.mark.parametrize("plan", CHAINS)
def test_same_bits_as_the_functional_ops(plan, dtype, branch_dtype, norm):
    plan = CHAINS[plan]
    for shape in ((BATCH, 17), (BATCH, 3, 17), (BATCH, 2, 3, 8)):
        x, weights = leaves(plan, shape=shape, dtype=dtype, branch_dtype=branch_dtype)
        out, expected = in_place(x, weights, plan, norm), functional(x, weights, plan, norm)
        assert same_bits(out, expected)
        wanted = gradients(expected, x, weights)
        # The second of two backwards finds nothing changed by the first.
        assert_same_bits(gradients(out, x, weights, retain_graph=True), wanted)
        assert_same_bits(gradients(out, x, weights), wanted)
        assert any(grad.any() for grad in wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nobody_elses_tensor_is_written(dtype):
    x, weights = leaves(ALL_AND_SOME, dtype=dtype)
    grad = tensor(*x.shape, dtype=dtype, seed=70)
    before, grad_before = x.detach().clone(), grad.clone()
    out = in_place(x, weights, ALL_AND_SOME)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    result = out.detach().clone()
    gradients(out, x, weights, grad)
    assert same_bits(x, before)
    assert same_bits(grad, grad_before)
    assert same_bits(out, result)


def test_a_gradient_that_others_use_too():
    """The gradient of the sum goes to the chain and to x by the same tensor."""
    x, weights = leaves(ALL_AND_SOME)
    got = gradients(x + in_place(x, weights, ALL_AND_SOME), x, weights)
    assert_same_bits(got, gradients(x + functional(x, weights, ALL_AND_SOME), x, weights))


def test_expanded_gradient():
    x, weights = leaves(ROWS)
    got, expected = (gradients(chain(x, weights, ROWS).sum(), x, weights) for chain in (in_place, functional))
    assert_same_bits(got, expected)


def test_strided_input():
    x, weights = tensor(17, 3, BATCH).permute(2, 1, 0).requires_grad_(), leaves(ROWS)[1]
    out, expected = in_place(x, weights, ROWS), functional(x, weights, ROWS)
    assert same_bits(out, expected)
    assert_same_bits(gradients(out, x, weights), gradients(expected, x, weights))


@pytest.mark.parametrize("plan", [ROWS[:1], ((0, 2), None, (1, -1))])
def test_gradcheck(plan):
    x, weights = leaves(plan, shape=(BATCH, 4))
    assert torch.autograd.gradcheck(lambda x, *weights: in_place(x, weights, plan), (x, *weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_dropped_from_every_branch_passes_bit_for_bit(dtype):
    clean, weights = leaves(ROWS, dtype=dtype)
    x = with_nan_payloads(clean.detach(), [1]).requires_grad_()
    grad = with_nan_payloads(tensor(*x.shape, dtype=dtype, seed=70), [1])
    out, others = in_place(x, weights, ROWS), [0, 2, 3, 4]
    assert same_bits(out[1], x[1])
    assert same_bits(out[others], in_place(clean, weights, ROWS)[others])
    grad_x, *grad_weights = gradients(out, x, weights, grad)
    assert same_bits(grad_x[1], grad[1])
    for each in (grad_x[others], *grad_weights):
        assert each.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_an_activation_checkpoint(use_reentrant):
    x, weights = leaves(ALL_AND_SOME)

    def chain(x, *weights):
        return in_place(x, weights, ALL_AND_SOME)

    out = checkpoint(chain, x, *weights, use_reentrant=use_reentrant)
    expected = functional(x, weights, ALL_AND_SOME)
    assert same_bits(out, expected)
    found = []
    for result in (out, expected):  # a reentrant checkpoint has no torch.autograd.grad
        for leaf in (x, *weights):
            leaf.grad = None
        result.backward(tensor(*x.shape, seed=70))
        found.append([leaf.grad for leaf in (x, *weights)])
    assert_same_bits(*found)


def test_a_gradient_from_elsewhere_is_not_written():
    """Of a copy of the stream, and of a stream in the middle; both are handed on by autograd as they came."""
    for copy in (torch.clone, lambda stream: stream.transpose(0, 1).clone(), lambda stream: stream):
        x = tensor(4, 3, 8).requires_grad_()
        stream, xhat = owned_stream.enter(x)
        copied = copy(stream)
        grads = tensor(*copied.shape, seed=1), tensor(*xhat.shape, seed=2)
        before = grads[0].clone()
        (grad_x,) = torch.autograd.grad([copied, xhat], x, grads, retain_graph=True)
        assert same_bits(grads[0], before)
        kept = grad_x.clone()
        # Nor one that backward returned before.
        torch.autograd.grad([stream, xhat], x, [grad_x, grads[1]])
        assert same_bits(grad_x, kept)


def test_backward_makes_one_gradient_and_writes_it(backward_calls):
    x, weights = leaves(ALL_AND_SOME)
    calls = backward_calls(in_place(x, weights, ALL_AND_SOME))
    assert calls.count("layerdrop_fast.scatter_residual_gather_norm_bwd") == 1
    assert calls.count("layerdrop_fast.scatter_residual_gather_norm_bwd_") == len(ALL_AND_SOME) - 1


def test_everything_dropped_is_a_differentiable_identity():
    x = with_nan_payloads(tensor(4, 3, 8), [2]).requires_grad_()
    grad = with_nan_payloads(tensor(4, 3, 8, seed=1), [1])
    out, xhat = owned_stream.enter(x, rows_of())
    assert xhat.shape == (0, 3, 8)
    assert same_bits(out, x)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert same_bits(grad_x, grad)
    assert grad_x.data_ptr() != grad.data_ptr()


class GradientsOfBranches(TorchDispatchMode):
    """How many rows of grad_y the ops return in a with block."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "layerdrop_fast":
            self.rows += len(out[-1] if isinstance(out, tuple) else out)  # grad_y comes last
        return out


@pytest.mark.parametrize(("x_needs", "y_needs"), [(True, False), (False, True), (True, True), (False, False)])
def test_no_work_for_what_needs_no_gradient(x_needs, y_needs):
    x, weights = leaves(ALL_AND_SOME, x_needs=x_needs, y_needs=y_needs)
    chains = [chain(x, weights, ALL_AND_SOME, branch=branch_beside) for chain in (in_place, functional)]
    assert same_bits(*chains)
    assert [out.requires_grad for out in chains] == [x_needs or y_needs] * 2
    if x_needs or y_needs:
        assert_same_bits(*(gradients(out, x, weights, retain_graph=True) for out in chains))
        grad = torch.ones_like(x)
        with GradientsOfBranches() as returned:
            gradients(chains[0], x, weights, grad)
        assert returned.rows == (sum(BATCH if rows is None else len(rows) for rows in ALL_AND_SOME) if y_needs else 0)


def test_a_stream_without_gradient_gets_one_from_its_branches():
    x, weights = leaves(ALL_AND_SOME, x_needs=False)
    got, expected = (gradients(chain(x, weights, ALL_AND_SOME), x, weights) for chain in (in_place, functional))
    assert_same_bits(got, expected)
    assert got[0].any()


@pytest.mark.parametrize("plan", CHAINS)
def test_saves_what_the_functional_ops_save(plan):
    plan, found = CHAINS[plan], []
    x, weights = leaves(plan)
    for chain in (in_place, functional):
        with Saved() as saved:
            chain(x, weights, plan)
        distinct = {value.untyped_storage().data_ptr(): value for value in saved.beyond(x) if value.numel()}
        found.append(sorted((str(value.dtype), value.shape) for value in distinct.values()))
    assert found[0]
    assert found[0] == found[1]


def test_keeps_neither_inputs_nor_branches_alive():
    x, weight = tensor(BATCH, 17).requires_grad_(), tensor(17, seed=1).requires_grad_()
    given = [x * 1, weight * tensor(2, 17)]
    out = in_place_around(*given)
    gone = [weakref.ref(value) for value in given]
    given.clear()
    assert [value() for value in gone] == [None, None]
    out.sum().backward()


def in_place_around(x, y):
    """``y`` twice, as what the branches of samples 0 and 2 give."""
    rows = rows_of(0, 2)
    stream, _ = owned_stream.enter(x, rows)
    stream, _ = owned_stream.scatter_residual_gather_norm_(stream, y, rows, rows, **dropout(1))
    return owned_stream.scatter_residual_(stream, y, rows, **dropout(1))


BAD = [
    (lambda s: s.transpose(1, 2), lambda s: tensor(4, 6, 3), None, ValueError, r"stream: got strides .* contiguous"),
    (lambda s: s[:1].expand(4, 3, 6), lambda s: tensor(4, 3, 6), None, ValueError, r"stream: got strides"),
    (lambda s: s, lambda s: s, None, ValueError, r"y: got a tensor in the stream's own memory"),
    (lambda s: s, lambda s: s[:2], rows_of(2, 3), ValueError, r"y: got a tensor in the stream's own memory"),
    (lambda s: s, lambda s: tensor(2, 3, 6), None, ValueError, r"y: got \[2, 3, 6\], expected \[4, 3, 6\]"),
    (lambda s: s, lambda s: tensor(1, 3, 6), rows_of(4), ValueError, r"rows: got 4, expected indices in \[0, 4\)"),
    (lambda s: s, lambda s: tensor(4, 3, 6).int(), None, TypeError, r"y: got torch.int32"),
]


@pytest.mark.parametrize(("stream", "y", "rows", "error", "message"), BAD)
def test_a_refused_stream_stays_as_it_was(stream, y, rows, error, message):
    x = tensor(4, 3, 6)
    own, _ = owned_stream.enter(x)
    version = own._version
    for function in (owned_stream.scatter_residual_, owned_stream.scatter_residual_gather_norm_):
        with pytest.raises(error, match=message):
            function(stream(own), y(own), rows)
    assert torch.equal(own, x)
    assert own._version == version


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"scale": float("inf")}, ValueError, "scale: got inf"),
        ({"dropout_p": 0.1}, TypeError, "key: got NoneType"),
        ({"next_rows": rows_of(4)}, ValueError, "next_rows: got 4"),
        ({"norm": "batchnorm"}, ValueError, "norm: got 'batchnorm'"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
    ],
)
def test_refused_keywords_leave_the_stream_as_it_was(bad, error, message):
    x, y = tensor(4, 3, 6), tensor(4, 3, 6, seed=1)
    own, _ = owned_stream.enter(x)
    with pytest.raises(error, match=message):
        owned_stream.scatter_residual_gather_norm_(own, y, **bad)
    if {"scale", "dropout_p"} & {*bad}:
        with pytest.raises(error, match=message):
            owned_stream.scatter_residual_(own, y, **bad)
    assert torch.equal(own, x)


def test_is_not_compiled():
    x, y = tensor(4, 3, 6), tensor(4, 3, 6, seed=1)
    torch._dynamo.reset()
    for function in (owned_stream.scatter_residual_, owned_stream.scatter_residual_gather_norm_):
        with pytest.raises(RuntimeError, match="cannot be compiled: use the functional ops there"):
            torch.compile(function, backend="eager", fullgraph=True)(x, y)
        assert torch.equal(x, tensor(4, 3, 6))


def test_dynamo_leaves_it_to_eager_where_it_may():
    x, weights = leaves(ROWS)
    torch._dynamo.reset()
    out, expected = torch.compile(in_place, backend="eager")(x, weights, ROWS), functional(x, weights, ROWS)
    assert same_bits(out, expected)
    assert_same_bits(gradients(out, x, weights), gradients(expected, x, weights))


def test_what_saved_the_stream_before_it_changed_refuses_backward():
    x, y = tensor(4, 6).requires_grad_(), tensor(4, 6, seed=1)
    for function in (owned_stream.scatter_residual_, owned_stream.scatter_residual_gather_norm_):
        stream, _ = owned_stream.enter(x)
        square = stream.square()
        function(stream, y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


def test_double_backward_is_refused():
    x, weights = leaves(ROWS)
    grad_x, *_ = gradients(in_place(x, weights, ROWS), x, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_arguments_that_cannot_be_saved_are_refused_before_the_stream_is_written():
    x = tensor(4, 3, 8).requires_grad_()
    stream, xhat = owned_stream.enter(x)
    with torch.inference_mode():
        rows = rows_of(0, 2)
    before = stream.detach().clone()
    for call in (owned_stream.scatter_residual_, owned_stream.scatter_residual_gather_norm_):
        with pytest.raises(ValueError, match="got a tensor of inference mode"):
            call(stream, xhat[:2], rows)
    assert same_bits(stream, before)
