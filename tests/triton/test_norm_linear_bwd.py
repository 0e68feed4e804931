"""norm_linear_bwd's kernel, by the tests of the op."""

import pytest
import torch

from layerdrop_fast import triton as kernels
from tests.ops import test_norm_linear_bwd as shared
from tests.ops.eager import DTYPES, same_bits
from tests.ops.test_norm_linear_bwd import test_agrees_with_the_reference, test_no_outputs_and_any_strides
from tests.triton.conftest import ON_GPU


def op(*arguments):
    if not ON_GPU:
        return kernels.KERNELS["norm_linear_bwd"](*arguments)
    given = (value.cuda() if torch.is_tensor(value) else value for value in arguments)
    return [value.cpu() for value in torch.ops.layerdrop_fast.norm_linear_bwd(*given)]


@pytest.fixture(autouse=True)
def kernel(ops_are_the_triton_kernels, request, monkeypatch):
    monkeypatch.setattr(shared, "op", op)
    if "few" in request.node.callspec.id:
        monkeypatch.setattr(shared, "SIZES", ((5, 17), (130, 16), (65, 1030)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_each_time(dtype):
    """No atomics: the order of the sums is fixed."""
    given = shared.arguments(200, 70, dtype)
    expected = op(*given)
    assert all(all(map(same_bits, op(*given), expected)) for _ in range(3))
