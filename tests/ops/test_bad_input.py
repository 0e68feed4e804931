"""Each bad input raises an error that names what it got and what was expected, and changes nothing."""

import copy
import re

import pytest
import torch

from layerdrop_fast import ops
from tests.ops.eager import KEY, SITE, rows_of, tensor

X, Y, ROWS = tensor(4, 3, 6), tensor(2, 3, 6), rows_of(0, 2)
GATHER = {"x": X, "rows": ROWS}
SCATTER = {"x": X, "y": Y, "rows": ROWS, "dropout_p": 0.1, "key": KEY, "site": SITE}
BOTH = SCATTER | {"next_rows": rows_of(1)}
NORM_LINEAR = {"xhat": Y, "weight": tensor(5, 6), "bias": tensor(5), "gamma": tensor(6), "beta": tensor(6)}
ACT_LINEAR = {
    "u": Y,
    "weight": tensor(5, 6),
    "bias": tensor(5),
    "rows": ROWS,
    "dropout_p": 0.1,
    "key": KEY,
    "site": SITE,
}
META = torch.device("meta")

STREAM = [
    ({"x": 3}, TypeError, "x: got int, expected a tensor of torch.float64 or torch.float32"),
    ({"x": X.long()}, TypeError, "x: got torch.int64, expected torch.float64 or"),
    ({"x": tensor(4)}, ValueError, "x: got [4], expected [B, ..., D] with at least one channel"),
    ({"x": tensor(4, 0)}, ValueError, "x: got [4, 0], expected [B, ..., D] with at least one channel"),
]
ROWS_OF_STREAM = [
    ({"rows": [0, 2]}, TypeError, "rows: got list, expected a tensor of torch.int32"),
    ({"rows": ROWS.long()}, TypeError, "rows: got torch.int64, expected torch.int32"),
    ({"rows": ROWS.view(2, 1)}, ValueError, "rows: got [2, 1], expected [K]"),
    ({"rows": rows_of(0, 4)}, ValueError, "rows: got 4, expected indices in [0, 4) or -1 for a spare row"),
    ({"rows": rows_of(-2, 0)}, ValueError, "rows: got -2, expected indices in [0, 4) or -1 for a spare row"),
    ({"rows": rows_of(2, 0)}, ValueError, "rows: got 0 after 2, expected ascending indices without duplicates"),
    ({"rows": rows_of(2, -1, 2)}, ValueError, "rows: got 2 after 2, expected ascending indices without duplicates"),
    ({"rows": ROWS.to(META)}, ValueError, "rows: got a tensor on meta, expected cpu"),
]
NORM = [
    ({"norm": "batchnorm"}, ValueError, "norm: got 'batchnorm', expected one of layernorm, rmsnorm"),
    ({"eps": -1.0}, ValueError, "eps: got -1.0, expected a finite number >= 0"),
    ({"eps": float("nan")}, ValueError, "eps: got nan, expected a finite number >= 0"),
]
DROPOUT = [
    ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1, expected a probability in [0, 1]"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5, expected a probability in [0, 1]"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan, expected a probability in [0, 1]"),
    ({"key": None}, TypeError, "key: got NoneType, expected a tensor of torch.int32"),
    ({"key": KEY.long()}, TypeError, "key: got torch.int64, expected torch.int32"),
    ({"key": KEY[:2]}, ValueError, "key: got [2], expected [4]"),
    ({"key": KEY.to(META)}, ValueError, "key: got a tensor on meta, expected cpu"),
    ({"site": None}, TypeError, "site: got NoneType, expected a tensor of torch.int32"),
    ({"site": 7}, TypeError, "site: got int, expected a tensor of torch.int32"),
    ({"site": SITE[None]}, ValueError, "site: got [1], expected []"),
    ({"site": torch.tensor(255, dtype=torch.int32)}, ValueError, "site: got 255, expected one in [256, 2^24)"),
    ({"site": torch.tensor(2**24, dtype=torch.int32)}, ValueError, "site: got 16777216, expected one in [256, 2^24)"),
]
BRANCH = [
    ({"y": Y.int()}, TypeError, "y: got torch.int32, expected torch.float64 or"),
    ({"y": tensor(3, 3, 6)}, ValueError, "y: got [3, 3, 6], expected [2, 3, 6]"),
    ({"y": tensor(2, 6)}, ValueError, "y: got [2, 6], expected [2, 3, 6]"),
    ({"y": Y, "rows": None}, ValueError, "y: got [2, 3, 6], expected [4, 3, 6]"),
    ({"y": Y.to(META)}, ValueError, "y: got a tensor on meta, expected cpu"),
    ({"scale": torch.tensor(1.0, requires_grad=True)}, ValueError, "scale: got a tensor that requires a gradient"),
    ({"scale": float("inf")}, ValueError, "scale: got inf, expected a finite number"),
    ({"scale": torch.tensor(1)}, TypeError, "scale: got torch.int64, expected torch.float32 or torch.float64"),
    ({"scale": torch.ones(2)}, ValueError, "scale: got [2], expected []"),
]
LINEAR = [
    ({"weight": tensor(5, 7)}, ValueError, "weight: got [5, 7], expected [O, 6]"),
    ({"weight": tensor(6)}, ValueError, "weight: got [6], expected [O, 6]"),
    ({"weight": torch.ones(5, 6, dtype=torch.int8)}, TypeError, "weight: got torch.int8, expected torch.float64 or"),
    ({"weight": tensor(5, 6).to(META)}, ValueError, "weight: got a tensor on meta, expected cpu"),
    ({"bias": tensor(6)}, ValueError, "bias: got [6], expected [5]"),
]
AFFINE = [
    ({"xhat": tensor(4)}, ValueError, "xhat: got [4], expected [K, ..., D] with at least one channel"),
    ({"xhat": Y.half().int()}, TypeError, "xhat: got torch.int32, expected torch.float64 or"),
    ({"gamma": tensor(5)}, ValueError, "gamma: got [5], expected [6]"),
    ({"beta": tensor(6, 1)}, ValueError, "beta: got [6, 1], expected [6]"),
    ({"beta": 1.0}, TypeError, "beta: got float, expected a tensor of torch.float64"),
]
ACTIVATION = [
    ({"u": tensor(4)}, ValueError, "u: got [4], expected [K, ..., F] with at least one channel"),
    (
        {"activation": "elu"},
        ValueError,
        "activation: got 'elu', expected one of gelu, gelu_tanh, relu, silu, swiglu, identity",
    ),
    ({"activation": "swiglu"}, ValueError, "weight: got [5, 6], expected [O, 3]"),
    (
        {"activation": "swiglu", "u": tensor(2, 3, 5)},
        ValueError,
        "u: got [2, 3, 5], expected an even number of channels",
    ),
    ({"rows": rows_of(0, 1, 2)}, ValueError, "u: got [2, 3, 6], expected [3, 3, 6]"),
    ({"rows": rows_of(3, 1)}, ValueError, "rows: got 1 after 3, expected ascending indices without duplicates"),
]
CASES = [
    (function, good, *case)
    for function, good, cases in (
        (ops.gather_norm, GATHER, STREAM + ROWS_OF_STREAM + NORM),
        (ops.scatter_residual, SCATTER, STREAM + ROWS_OF_STREAM + BRANCH + DROPOUT),
        (ops.scatter_residual_gather_norm, BOTH, STREAM + ROWS_OF_STREAM + BRANCH + DROPOUT + NORM),
        (
            ops.scatter_residual_gather_norm,
            BOTH,
            [({"next_" + k: v for k, v in bad.items()}, error, "next_" + text) for bad, error, text in ROWS_OF_STREAM],
        ),
        (ops.norm_linear, NORM_LINEAR, LINEAR + AFFINE),
        (ops.act_linear, ACT_LINEAR, LINEAR + ACTIVATION + DROPOUT),
    )
    for case in cases
]


@pytest.mark.parametrize(
    ("function", "good", "bad", "error", "message"), CASES, ids=[f"{c[0].__name__}: {c[4][:60]}" for c in CASES]
)
def test_bad_input(function, good, bad, error, message):
    function(**good)
    given = good | bad
    before = copy.deepcopy(given)
    with pytest.raises(error, match=re.escape(message)):
        function(**given)
    for name, value in given.items():
        if torch.is_tensor(value) and value.device.type == "cpu":
            assert torch.equal(value, before[name])


def test_key_and_site_are_not_needed_without_dropout():
    ops.scatter_residual(X, Y, ROWS)
    ops.act_linear(Y, tensor(5, 6))
