"""What users' layers and arguments can get wrong: told clearly, with tensors and counters as they were."""

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropStack, TransformerStack
from layerdrop_fast.prune import extract
from tests.nn.residual import Block, stack

B = 5
X = torch.randn(B, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRANULARITIES = pytest.mark.parametrize("granularity", ["batch", "sample"])


class Function(nn.Module):
    """A layer that is any function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, mask=None):
        return self.function(x)


def of_functions(function, granularity="batch", rate=0.0, **keywords):
    """A layer as it should be, then two of ``function``."""
    layers = [Function(torch.tanh), *(Function(function) for _ in range(2))]
    return LayerDropStack(layers, rate, granularity=granularity, seed=1, **keywords)


def writes(x):
    return x.add_(1.0)


def returns_none(x):
    return None


def writes_and_returns_another(x):
    y = x + 1
    x[0] = 7.0
    return y


@GRANULARITIES
@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: x[:, :2], ValueError, r"layer 1 returned \[\d, 2, 8\] for \[\d, 3, 8\], expected the same shape"),
        (lambda x: x[:1].expand(9, 3, 8), ValueError, r"layer 1 returned \[9, 3, 8\] for \[\d, 3, 8\], expected the"),
        (returns_none, TypeError, "layer 1 returned NoneType, expected a tensor, or a tuple that starts so"),
        (lambda x: [x], TypeError, "layer 1 returned list, expected a tensor"),
        (lambda x: (None, x), TypeError, "layer 1 returned NoneType, expected a tensor"),
        (lambda x: (), TypeError, "layer 1 returned tuple, expected a tensor"),
        (writes, RuntimeError, "layer 1 wrote into its input, .* expected x \\+ f\\(x\\) as a new tensor"),
        (writes_and_returns_another, RuntimeError, "layer 1 wrote into its input"),
    ],
)
def test_layers_that_are_no_residual_layers(function, error, message, granularity, rate):
    rates = [rate, 0.0, 0.0] if granularity == "batch" else [0.0, rate, 0.0]
    model = of_functions(function, granularity, rates)
    x = X.clone()
    for training in (True, False):
        with pytest.raises(error, match=message):
            model.train(training)(x)
    assert torch.equal(x, X)
    assert model.counters.forwards == model.stats().forwards == 0


@GRANULARITIES
def test_a_first_layer_that_writes_leaves_the_callers_tensor(granularity):
    model = LayerDropStack([Function(writes)], 0.0, granularity=granularity)
    x = X.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="layer 0 wrote into its input"):
            model(x)
        assert torch.equal(x, X)


@GRANULARITIES
@pytest.mark.parametrize(
    "function", [lambda x: x, lambda x: x[:], lambda x: x.view(-1).view(x.shape), lambda x: (x, 1)]
)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_layers_that_return_their_input(function, granularity, rate):
    model = LayerDropStack([Function(function)], rate, granularity=granularity, seed=0, scale="inverse")
    x = X.clone()
    for training in (True, True, True, False):
        out = model.train(training)(x)
        assert torch.equal(out, X)
        out.zero_()
        assert torch.equal(x, X)
    x.requires_grad_()
    model(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_what_is_known_of_a_layer_does_not_outlive_its_place():
    """Layer 1 has never run when it becomes layer 0."""
    model = LayerDropStack([nn.Tanh(), Function(writes)], [0.0, 1.0])
    model(X)
    small, x = extract(model, [1]).eval(), X.clone()
    with pytest.raises(RuntimeError, match="layer 0 wrote into its input"):
        small(x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("value", [None, 3, [1.0], "x"])
def test_a_stream_that_is_no_tensor(value):
    with pytest.raises(TypeError, match=f"x: got {type(value).__name__}, expected a tensor"):
        stack()(value)


def test_no_samples():
    model = stack(granularity="sample")
    for x, shape in ((X[:0], r"\[0, 3, 8\]"), (X.sum(), r"\[\]")):
        with pytest.raises(ValueError, match=f'x: got {shape}, expected at least one sample at granularity "sample"'):
            model(x)
    assert model.counters.forwards == 0
    assert model.eval()(X[:0]).shape == X[:0].shape
    assert stack()(X[:0]).shape == X[:0].shape


def test_arguments_that_cannot_be_told_apart():
    """Also while all samples are kept."""
    model = of_functions(torch.tanh, "sample", 0.0)
    square = X.expand(3, B, 3, 8)[:, 0]
    with pytest.raises(ValueError, match=r"argument 'mask': got \[3, 2\] for x \[3, 3, 8\], which may have one entry"):
        model(square, mask=torch.zeros(3, 2))
    assert model.counters.forwards == 0
    model.batch_dims["mask"] = 0
    assert model(square, mask=torch.zeros(3, 2)).shape == square.shape
    with pytest.raises(ValueError, match=r"got \[4, 2\], expected 3 samples in dimension 0, which batch_dims names"):
        model(square, mask=torch.zeros(4, 2))
    assert model.counters.forwards == 1


@pytest.mark.parametrize("scale", ["none", "inverse", "realized"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(9),
        torch.randn(9, 3, dtype=torch.complex128),
        torch.randn(9, 3, 0),
        torch.randn(9, 2, 2, 2).bfloat16(),
    ],
)
def test_streams_of_any_rank_and_dtype(x, scale):
    model = LayerDropStack([nn.Tanh()], 0.5, granularity="sample", seed=4, scale=scale)
    keep = model.plan(batch_size=9).keep[0]
    assert 0 < keep.sum() < 9
    x = x.requires_grad_()
    factor = {"none": 1.0, "inverse": 2.0, "realized": 9 / keep.sum().item()}[scale]
    out = model(x)
    assert torch.equal(out[~keep], x[~keep])
    exact = x + factor * (x.tanh() - x)
    tolerance = dict(rtol=2**-6, atol=2**-6) if x.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[keep], exact[keep], **tolerance)
    ours, theirs = (
        torch.autograd.grad(y.abs().sum(), x)[0]
        for y in (out, torch.where(keep.view(-1, *[1] * (x.dim() - 1)), exact, x))
    )
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_a_layer_of_another_dtype_keeps_that_of_the_stream(scale):
    model = LayerDropStack([Function(lambda x: x.bfloat16() * 3)], 0.5, granularity="sample", seed=4, scale=scale)
    keep = model.plan(batch_size=9).keep[0]
    x = torch.ones(9, 2, requires_grad=True)
    out = model(x)
    assert out.dtype == torch.float32
    expected = 3.0 if scale == "none" else 5.0
    assert torch.equal(out, torch.where(keep[:, None], expected, 1.0).expand(9, 2))
    out.sum().backward()
    assert torch.equal(x.grad, out)


def test_results_that_cannot_be_put_back():
    model = LayerDropStack([Function(torch.tanh)], 0.5, granularity="sample", seed=4)
    with pytest.raises(
        TypeError, match=r"layer 0 returned torch.float32, which cannot be put back into x of torch.int64"
    ):
        model(torch.ones(9, 3, dtype=torch.int64))
    assert model.counters.forwards == 0


@GRANULARITIES
def test_inference_mode(granularity):
    model = stack(granularity=granularity)
    for training in (True, False):
        with torch.inference_mode():
            assert model.train(training)(X * 1).shape == X.shape
            assert model(X).shape == X.shape


@GRANULARITIES
def test_a_layer_that_fails_changes_nothing(granularity):
    model = stack(granularity=granularity, max_kept=2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(B, 3, 5, dtype=torch.float64))
    assert model.counters.forwards == model.stats().forwards == 0


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(granularity="samples"), ValueError, r"granularity is 'samples', expected one of \('batch', 'sample'\)"),
        (dict(max_kept=0), ValueError, "max_kept must be at least 1, got 0"),
        (dict(max_kept=1.5), TypeError, "max_kept must be an integer, got 1.5"),
        (dict(schedule=[0.1, 0.2]), ValueError, "got 2 drop rates, expected 6"),
        (dict(batch_dims={"mask": 1.5}), TypeError, "batch_dims\\['mask'\\] must be an integer, got 1.5"),
        (dict(batch_dims={1.5: 0}), TypeError, "batch_dims names 1.5, expected keywords or numbers of arguments"),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        stack(kind=Block, **keywords)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_positions_are_not_dropped_for_samples(kind):
    """torch's layers take [S, B, D] unless told otherwise."""
    layers = [kind(8, 2, 16, batch_first=True), kind(8, 2, 16)]
    with pytest.raises(ValueError, match=r"layer 1, a Transformer\w+, takes \[S, B, D\] .*expected \[B, S, D\]"):
        LayerDropStack(layers, granularity="sample")
    LayerDropStack(layers[:1], granularity="sample")
    LayerDropStack(layers)  # whole batches


@pytest.mark.parametrize("make", [LayerDropStack, TransformerStack.from_layers])
def test_an_encoder_is_no_list_of_layers(make):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(TypeError, match=r"layers: got a TransformerEncoder, expected its list, \.layers"):
        make(encoder)
    make(encoder.layers)
