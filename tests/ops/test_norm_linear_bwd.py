"""The raw op norm_linear_bwd, on the CPU and, from tests/triton, as its Triton kernel."""

import itertools

import pytest
import torch

from layerdrop_fast._extension import missing, planner
from layerdrop_fast.reference import norm_linear as reference
from layerdrop_fast.reference.rows import accumulator
from tests.ops.eager import DTYPES, LAYOUTS, same_bits, tensor
from tests.tolerances import assert_no_worse_than_eager

SIZES = ((5, 17), (1, 1), (64, 64), (65, 63), (130, 16), (130, 1030), (3, 512))
GIVEN = {"all": (1, 1, 1), "gamma and total": (1, 1, 0), "gamma": (0, 1, 0), "beta": (1, 0, 1), "none": (0, 0, 0)}


def op(*arguments):
    return torch.ops.layerdrop_fast.norm_linear_bwd(*arguments)


def arguments(outputs, channels, dtype=torch.float32, weight=None, given=GIVEN["all"]):
    total, gamma, beta = given
    weight = weight or dtype
    return (
        tensor(outputs, channels, dtype=dtype),
        tensor(outputs, dtype=accumulator(dtype), seed=1) if total else None,
        tensor(outputs, channels, dtype=weight, seed=2),
        tensor(channels, dtype=weight, seed=3) if gamma else None,
        tensor(channels, dtype=weight, seed=4) if beta else None,
    )


def assert_agrees(op, given):
    exact = reference.norm_linear_bwd(*(None if value is None else value.double() for value in given))
    expected = reference.norm_linear_bwd(*given)
    for what, got, eager, yardstick in zip(("weight", "gamma", "beta"), op(*given), expected, exact, strict=True):
        assert got.is_contiguous()
        assert_no_worse_than_eager(got, eager, yardstick, f"gradient of {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", GIVEN)
def test_agrees_with_the_reference(given, dtype):
    for (outputs, channels), weight in itertools.product(SIZES, (None, torch.float32, torch.bfloat16)):
        assert_agrees(op, arguments(outputs, channels, dtype, weight, GIVEN[given]))


@pytest.mark.parametrize("shape", [(0, 5), (7, 5)])
def test_no_outputs_and_any_strides(shape):
    given = arguments(*shape)
    expected = op(*given)
    for layout in LAYOUTS.values():
        got = op(*(None if value is None else layout(value) for value in given))
        assert all(map(same_bits, got, expected))


def test_outputs_are_new_and_arguments_not_written():
    given, before = arguments(6, 33), arguments(6, 33)
    out = op(*given)
    assert not {value.data_ptr() for value in out} & {value.data_ptr() for value in given}
    assert all(map(torch.equal, given, before))


@pytest.mark.skipif(missing is not None, reason="no C++ extension")
def test_same_bits_with_every_instruction_set_and_any_number_of_threads():
    threads, instruction_sets = torch.get_num_threads(), planner.instruction_sets()
    for dtype in DTYPES:
        given = arguments(70, 1100, dtype)
        expected = op(*given)
        try:
            for count, instructions in itertools.product((1, 2, 3), instruction_sets):
                torch.set_num_threads(count)
                planner.use_instruction_set(instructions)
                assert all(map(same_bits, op(*given), expected)), (dtype, count, instructions)
        finally:
            torch.set_num_threads(threads)
            planner.use_instruction_set(instruction_sets[0])


@pytest.mark.parametrize("given", GIVEN)
def test_opcheck(given):
    for dtype in DTYPES:
        raw = torch.ops.layerdrop_fast.norm_linear_bwd.default
        torch.library.opcheck(raw, arguments(4, 6, dtype, torch.bfloat16, GIVEN[given]))


REFUSED = {
    "total without beta's need": lambda p, t, w, g, b: (p, None, w, g, b),
    "short total": lambda p, t, w, g, b: (p, t[1:], w, g, b),
    "dtype of total": lambda p, t, w, g, b: (p, t.double(), w, g, b),
    "another weight": lambda p, t, w, g, b: (p, t, w[1:], g, b),
    "narrow weight": lambda p, t, w, g, b: (p, t, w[:, 1:], g, b),
    "short gamma": lambda p, t, w, g, b: (p, t, w, g[1:], b),
    "long beta": lambda p, t, w, g, b: (p, t, w, g, b.repeat(2)),
    "integers": lambda p, t, w, g, b: (p.int(), t, w, g, b),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_would_lead_beyond_memory(what):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("layerdrop_fast::norm_linear_bwd", "CPU"):
        pytest.skip("the reference leaves it to torch")
    with pytest.raises(RuntimeError):
        op(*REFUSED[what](*arguments(4, 6)))
