"""Activation memory: what autograd holds, counted once."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from layerdrop_fast.memory import saved_bytes

FLOAT = 4


def leaf(*shape, **options):
    return torch.randn(*shape, requires_grad=True, **options)


def test_a_product_saves_both_factors():
    assert saved_bytes(torch.mul, leaf(3, 5), leaf(3, 5)) == 2 * 15 * FLOAT


def test_a_tensor_saved_twice_counts_once():
    x = leaf(7)
    assert saved_bytes(lambda: (x * x).sum() + (x * x).sum()) == 7 * FLOAT


def test_views_count_as_the_one_storage_that_they_keep_alive():
    storage = torch.randn(10, 6)
    part, transposed = storage[:2], storage.t()
    weight = leaf(1)
    assert saved_bytes(lambda: (part * weight).sum() + (transposed * weight).sum(), exclude=[weight]) == 60 * FLOAT


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_left_out_their_transposes_too(bias):
    linear = nn.Linear(4, 6, bias=bias)
    assert saved_bytes(linear, leaf(3, 4)) == 3 * 4 * FLOAT  # the input, for the weight's gradient


def test_a_weight_that_was_computed_is_an_activation():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    # weight_norm also saves a norm a row of the weight.
    assert saved_bytes(linear, leaf(3, 4)) == (3 * 4 + 4 * 6 + 6) * FLOAT


def test_excluded_tensors_and_their_views_are_left_out():
    x, y = leaf(3, 5), leaf(3, 5)
    assert saved_bytes(torch.mul, x, y, exclude=[x]) == 15 * FLOAT
    assert saved_bytes(torch.mul, x, y, exclude=(t for t in (x.t(), y))) == 0


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2)])
def test_bytes_follow_the_dtype(dtype, size):
    assert saved_bytes(torch.exp, leaf(9, dtype=dtype)) == 9 * size


def test_nothing_is_saved_where_nothing_needs_a_gradient():
    assert saved_bytes(torch.exp, torch.randn(9)) == 0
    with torch.no_grad():
        assert saved_bytes(torch.exp, leaf(9)) == 0


def test_a_graph_that_is_already_gone_does_not_count():
    x = leaf(11)

    def probes_first():
        torch.exp(x).sin()
        return x.exp()

    assert saved_bytes(probes_first) == 11 * FLOAT


def test_the_graph_is_freed_afterwards():
    kept = []

    def function(x):
        y = x.exp()
        kept.append(weakref.ref(y))
        return y.sin().tanh()

    gc.disable()  # a cycle would be freed by it, too late for the memory of a step
    try:
        saved_bytes(function, leaf(5))
        assert kept[0]() is None
    finally:
        gc.enable()


def test_storages_freed_and_reused_on_the_way_are_told_apart():
    x = leaf(1000)

    def function():
        return [x.exp() for _ in range(20)]

    assert saved_bytes(function) == 20 * 1000 * FLOAT


def test_a_checkpoint_counts_as_its_input():
    layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    x = leaf(5, 8)
    assert saved_bytes(layers, x) == (5 * 8 + 5 * 32 + 5 * 32) * FLOAT
    assert saved_bytes(checkpoint, layers, x, use_reentrant=True, preserve_rng_state=False) == 5 * 8 * FLOAT


def test_keywords_reach_the_function():
    x = leaf(4, 6)
    assert saved_bytes(torch.softmax, x, dim=1) == 24 * FLOAT
    assert saved_bytes(torch.softmax, input=x, dim=1) == 24 * FLOAT


def test_the_step_around_it_is_left_as_it_was():
    x = leaf(3)
    before = x.exp()
    saved_bytes(torch.exp, x)
    before.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="callable, got 3"):
        saved_bytes(3)
    with pytest.raises(TypeError, match="exclude must hold tensors, got 'x'"):
        saved_bytes(torch.exp, leaf(3), exclude=["x"])


class _Eager(torch.autograd.Function):
    """Runs eagerly in a compiled region too."""

    @staticmethod
    def forward(ctx, x):
        torch._dynamo.graph_break()
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def test_in_a_compiled_region_the_counting_itself_is_not_compiled():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: _Eager.apply(x + 1) * 2, backend=counter)
    x = leaf(5, 8)
    compiled(x).sum().backward()
    graphs = counter.frame_count
    assert graphs > 1
    assert saved_bytes(compiled, x) == 5 * 8 * 4
    assert counter.frame_count == graphs
    torch._dynamo.reset()
