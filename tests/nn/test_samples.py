"""Which samples of a layer's arguments are kept."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from layerdrop_fast.nn.samples import Samples

X = torch.zeros(5, 3, 8)
ROWS = torch.tensor([1, 2, 4], dtype=torch.int32)
Tables = namedtuple("Tables", ["cos", "sin"])


def taken(*args, batch_dims=None, x=X, rows=ROWS, **kwargs):
    return Samples(x, batch_dims or {}).of_arguments(args, kwargs, rows)


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("shape", [(5,), (5, 1, 3, 3), (5, 3), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("rows", [[], [0], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_tensors_with_one_entry_a_sample(shape, dtype, rows):
    value = numbered(*shape).to(dtype)
    (got,), kwargs = taken(value, rows=torch.tensor(rows, dtype=torch.int32), mask=value)
    assert got.dtype == dtype
    assert torch.equal(got, value[rows])
    assert torch.equal(kwargs["mask"], value[rows])


@pytest.mark.parametrize("value", [torch.tensor(2.0), numbered(3, 5), numbered(1, 5), None, 5, "5", torch.Size([5, 5])])
def test_everything_else_is_handed_on_as_it_is(value):
    (got,), kwargs = taken(value, other=value)
    assert got is value
    assert kwargs["other"] is value


def test_tensors_in_tuples_lists_dicts_and_named_tuples():
    value, table = numbered(5, 2), numbered(3, 4)
    inside = {"a": [value, (table, value)], "b": {"c": Tables(value, table)}, "d": OrderedDict(e=value)}
    (got,), _ = taken(inside)
    assert torch.equal(got["a"][0], value[ROWS])
    assert type(got["a"]) is list
    assert got["a"][1][0] is table
    assert torch.equal(got["a"][1][1], value[ROWS])
    assert type(got["b"]["c"]) is Tables
    assert torch.equal(got["b"]["c"].cos, value[ROWS])
    assert got["b"]["c"].sin is table
    assert type(got["d"]) is OrderedDict
    assert torch.equal(got["d"]["e"], value[ROWS])
    assert inside["d"]["e"] is inside["a"][0] is value


def test_batch_dims_override():
    value, table = numbered(3, 5), numbered(5, 3)
    (first, second), kwargs = taken(value, value, bias=table, late=value, batch_dims={0: 1, "bias": None, "late": -1})
    assert torch.equal(first, value[:, ROWS])
    assert second is value
    assert kwargs["bias"] is table
    assert torch.equal(kwargs["late"], value[:, ROWS])


def test_what_may_be_samples_or_not_is_not_guessed():
    x = torch.zeros(3, 3, 8)
    message = r"argument 'mask': got \[3, 4\] for x \[3, 3, 8\], .* name it in batch_dims, as \{'mask': 0\} or"
    with pytest.raises(ValueError, match=message):
        taken(mask=numbered(3, 4), x=x)
    with pytest.raises(ValueError, match=r"argument 2 after x: got \[3\]"):
        taken(None, numbered(3), x=x)
    rows = torch.tensor([2], dtype=torch.int32)
    assert torch.equal(taken(numbered(3), x=x, rows=rows, batch_dims={0: 0})[0][0], torch.tensor([2]))
    assert taken(numbered(4, 3), x=x)[0][0].shape == (4, 3)


@pytest.mark.parametrize(("dim", "shape"), [(0, (4, 5)), (2, (5, 5)), (-3, (5, 5)), (1, (5, 4)), (0, ())])
def test_a_wrong_batch_dimension(dim, shape):
    message = rf"argument 'bias': got \[{', '.join(map(str, shape))}\], expected 5 samples in dimension {dim}"
    with pytest.raises(ValueError, match=message):
        taken(bias=numbered(*shape), batch_dims={"bias": dim})
