"""What the CPU kernels keep to (the contract in _library.py), op by op against the reference.

Without the extension the ops are the reference, and these tests check that it agrees with itself.
"""

import itertools
import subprocess
import sys

import pytest
import torch

from layerdrop_fast._extension import missing, planner
from layerdrop_fast.reference.philox import random_bits
from tests.ops.eager import (
    ACTIVATIONS,
    DTYPES,
    KEY,
    KINDS,
    LAYOUTS,
    NAMES,
    REFERENCE,
    RESULTS,
    SITE,
    Case,
    as_bits,
    assert_agrees,
    has_cpu_kernel,
    op,
    parameters,
    results,
    rows_of,
    same_bits,
    tensor,
    with_nan_payloads,
)

WIDTHS = (1, 15, 16, 17, 63, 64, 255, 257, 1000, 4099)
ACTIVATION_WIDTHS = (1, 16, 63, 257, 1100)
MIDDLES = ((), (1,), (3,), (2, 2), (0,))
# Of 5 samples; -1 is a spare row.
SUBSETS = (
    None,
    (),
    (0, 2, 3),
    (4,),
    (0, 1, 2, 3, 4),
    (-1, 1, 3),
    (1, -1, 3),
    (1, 3, -1, -1),
    (-1,),
    (-1, 0, -1, 1, 2, 4, -1),
)
# At 1e-12 the threshold of the mask rounds to 2^32, which 32 bits do not hold.
DROPOUT = [{}, {"scale": 1.25}, {"p": 0.3}, {"p": 0.3, "scale": 1.25}, {"p": 1.0, "scale": 1.25}, {"p": 1e-12}]
USUAL = {"rows": (0, 2, -1, 3), "next_rows": (0, -1, 3, 4), "p": 0.3, "scale": 1.25}
IN_PLACE = [name for name in NAMES if name.endswith("_")]
INSTRUCTION_SETS = planner.instruction_sets() if missing is None else []

each_op = pytest.mark.parametrize("name", NAMES)
each_op_in_place = pytest.mark.parametrize("name", IN_PLACE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def all_same(got, expected) -> bool:
    return all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def use_instruction_set():
    if len(INSTRUCTION_SETS) < 2:
        pytest.skip("there is one set of instructions at most")
    yield planner.use_instruction_set
    planner.use_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_dtype
@each_op
def test_sizes(name, dtype):
    for width, middle in itertools.product(WIDTHS, MIDDLES):
        if width < 1000 or middle in ((), (3,)):
            for rms in (False, True) if "norm" in name else (False,):
                assert_agrees(name, Case((5, *middle, width), dtype, **USUAL, rms=rms))


@each_dtype
@each_op
def test_rows_and_dropout(name, dtype):
    pairs = [*zip(SUBSETS, SUBSETS, strict=True), *zip(SUBSETS, SUBSETS[1:] + SUBSETS[:1], strict=True)]
    for rows, next_rows in pairs if "next_rows" in parameters(name) else pairs[: len(SUBSETS)]:
        for dropout in DROPOUT if "dropout_p" in parameters(name) else DROPOUT[:1]:
            assert_agrees(name, Case(dtype=dtype, rows=rows, next_rows=next_rows, **dropout))


@each_op
def test_one_sample_and_none(name):
    for shape in ((1, 17), (1, 3, 17), (0, 17), (0, 3, 17)):
        for rows in (None, (), (0,), (0, -1)) if shape[0] else (None, (), (-1,)):
            assert_agrees(name, Case(shape, rows=rows, next_rows=rows, p=0.3))


@each_dtype
@pytest.mark.parametrize("name", [name for name in NAMES if {"y", "grad_a", "dtype"} & {*parameters(name)}])
def test_branch_of_another_dtype(name, dtype):
    for branch, width in itertools.product(DTYPES, (17, 64)):
        assert_agrees(name, Case((5, 3, width), dtype, branch, **USUAL))
        assert_agrees(name, Case((5, 3, width), dtype, branch, activation="swiglu"))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for width, dropout in itertools.product(ACTIVATION_WIDTHS, DROPOUT[:3]):
        case = Case((4, 3, width), dtype, rows=(1, 3, -1), activation=activation, **dropout)
        assert_agrees("act", case)
        assert_agrees("act_bwd", case)
        _, a = op("act_bwd")(*case.arguments("act_bwd"))
        assert same_bits(a, op("act")(*case.arguments("act")))


@each_dtype
def test_a_mean_far_from_zero(dtype):
    """A variance taken as mean(x^2) - mean(x)^2 has hardly a correct digit here."""
    x = (tensor(40, 257) + 300).to(dtype)
    assert_agrees("gather_norm", Case(tuple(x.shape), dtype), (x, None, False, 1e-5))


@pytest.mark.parametrize("rms", [False, True])
def test_a_spare_row_is_0_without_eps_too(rms):
    """Though 1 / sqrt(0) is not."""
    case = Case(rows=(0, -1), next_rows=(0, -1), rms=rms, eps=0.0)
    for name in ("gather_norm", "scatter_residual_gather_norm", "scatter_residual_gather_norm_"):
        assert_agrees(name, case)


@each_dtype
def test_one_pass_gives_the_bits_of_two(dtype):
    for rows, next_rows in itertools.product(SUBSETS, SUBSETS):
        case = Case((5, 3, 63), dtype, rows=rows, next_rows=next_rows, p=0.3, scale=1.25)
        x_out = op("scatter_residual")(*case.arguments("scatter_residual"))
        two = (x_out, *op("gather_norm")(x_out, *case.arguments("gather_norm")[1:]))
        assert all_same(op("scatter_residual_gather_norm")(*case.arguments("scatter_residual_gather_norm")), two)


@each_dtype
@each_op_in_place
def test_in_place_gives_the_bits_of_out_of_place(name, dtype):
    functional = name.removesuffix("_")
    for rows, next_rows in itertools.product(SUBSETS, SUBSETS):
        given = Case((5, 3, 63), dtype, rows=rows, next_rows=next_rows, p=0.3, scale=1.25).arguments(name)
        assert all_same(results(name, op(name), given), results(functional, op(functional), given))


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, subnormals, ties between neighbours, what overflows, infinities; NaNs that rounding may take elsewhere."""
    values = [0.0, torch.inf]
    for info in map(torch.finfo, DTYPES):
        values += [1 + k * info.eps / 4 for k in range(9)]
        values += [info.tiny * k for k in (1, info.eps / 2, info.eps, 1.5 * info.eps)]
        values += [info.max * k for k in (0.5, 1, 1 + info.eps / 4)]
    numbers = torch.tensor([*values, *(-value for value in values)], dtype=torch.float64).to(dtype)
    infinite = as_bits(torch.tensor([torch.inf], dtype=dtype))
    nans = infinite + 1, torch.full_like(infinite, torch.iinfo(infinite.dtype).max)
    return torch.cat([numbers, *(nan.view(dtype) for nan in nans)])


@each_dtype
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS or [None])
def test_special_values_are_rounded_as_in_the_reference(instructions, dtype, request):
    if len(INSTRUCTION_SETS) > 1:
        request.getfixturevalue("use_instruction_set")(instructions)
    for branch in DTYPES:
        x, y = special_values(dtype), special_values(branch)
        x, y = x[:, None].expand(-1, len(y)), y.expand(len(x), -1)
        scale = torch.tensor(0.75, dtype=torch.promote_types(dtype, torch.float32))
        for name, *given in (
            ("scatter_residual", x, y, None, None, 0.0, None, None),
            ("scatter_residual", x, y, None, scale, 0.0, None, None),
            ("scatter_residual_bwd", x, None, None, 0.0, None, None, branch),
            ("act", x, None, "relu", 0.0, None, None),
            ("act_bwd", x, y, None, "relu", 0.0, None, None),
        ):
            for got, expected in zip(*(results(name, f, given) for f in (op(name), REFERENCE[name])), strict=True):
                nan = expected.isnan()
                assert torch.equal(got.isnan(), nan)
                assert same_bits(got.masked_fill(nan, 0), expected.masked_fill(nan, 0))


def assert_strides_do_not_matter(name, strided, contiguous):
    if has_cpu_kernel(name):
        assert all_same(strided, contiguous)
    else:  # the order in which torch sums channels depends on strides
        torch.testing.assert_close(strided, contiguous)


@each_dtype
@each_op
def test_any_strides(name, dtype):
    for shape, activation in (((5, 3, 16), "relu"), ((5, 19), "swiglu"), ((5, 2, 2, 9), "gelu")):
        contiguous = Case(shape, dtype, torch.float32, **USUAL, activation=activation).arguments(name)
        expected = results(name, op(name), contiguous)
        for layout in LAYOUTS.values():
            given = [layout(value) if torch.is_tensor(value) else value for value in contiguous]
            if name in IN_PLACE:
                given[0] = contiguous[0]
            assert_strides_do_not_matter(name, results(name, op(name), tuple(given)), expected)


@each_op
def test_expanded(name):
    """The gradient of a sum has one number in memory."""
    given = Case(**USUAL).arguments(name)
    for i, value in enumerate(given):
        if torch.is_tensor(value) and value.dim() > 1 and not (i == 0 and name in IN_PLACE):
            for dims in ([0], [1], [value.dim() - 1], range(value.dim())):
                one = value[tuple(slice(1) if dim in dims else slice(None) for dim in range(value.dim()))]
                expanded = one.expand(value.shape)
                got, expected = (
                    results(name, op(name), (*given[:i], each, *given[i + 1 :]))
                    for each in (expanded, expanded.contiguous())
                )
                assert_strides_do_not_matter(name, got, expected)


def unread(case: Case, kind: str) -> list[int]:
    return [1] if kind == "B" else [place for place, row in enumerate(case.leading(kind)) if row == -1]


@each_dtype
@each_op
def test_what_is_dropped_or_spare_is_not_read(name, dtype):
    """A dropped sample, where it is part of the result, passes bit for bit."""
    case = Case((5, 3, 33), dtype, **USUAL)
    clean = case.arguments(name)
    given = tuple(
        with_nan_payloads(value, unread(case, KINDS[parameter])) if parameter in KINDS else value
        for parameter, value in zip(parameters(name), clean, strict=True)
    )
    expected = results(name, op(name), clean)
    if RESULTS[name][0] == "B" and name != "gather_norm_bwd":
        expected[0][1] = given[0][1]
    assert all_same(results(name, op(name), given), expected)


PROTECTED = """
import ctypes, mmap, sys, torch
from tests.ops.eager import Case, op
protect, page = ctypes.CDLL(None).mprotect, mmap.PAGESIZE
stream = torch.frombuffer(mmap.mmap(-1, 5 * page), dtype=torch.float32).view(5, -1)
for name in sys.argv[1:]:
    print(name, flush=True)
    given = Case(tuple(stream.shape), rows=(0, 2), next_rows=(0, 2), p=0.3).arguments(name)
    for allowed in (0, mmap.PROT_READ | mmap.PROT_WRITE):
        for sample in (1, 3, 4):
            assert protect(ctypes.c_void_p(stream[sample].data_ptr()), page, allowed) == 0
        if not allowed:
            op(name)(stream, *given[1:])
"""


def test_memory_of_dropped_samples_is_not_touched():
    names = ["gather_norm", "scatter_residual_bwd", *IN_PLACE]
    if not all(map(has_cpu_kernel, names)):
        pytest.skip("the reference copies the stream")
    done = subprocess.run([sys.executable, "-c", PROTECTED, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout.split()[-1]} touched them: {done.stderr}"


@each_dtype
@each_op_in_place
def test_in_place_writes_nothing_round_the_stream(name, dtype):
    for offset, shape in itertools.product((0, 1, 7), ((5, 17), (5, 3, 64), (1, 1))):
        rows = tuple(range(0, shape[0], 2))
        given = Case(shape, dtype, rows=rows, next_rows=rows, p=0.3).arguments(name)
        size = given[0].numel()
        memory = with_nan_payloads(torch.zeros(1, offset + size + 40, dtype=dtype), [0])[0]
        before = memory.clone()
        stream = memory[offset : offset + size].view(shape).copy_(given[0])
        op(name)(stream, *given[1:])
        assert same_bits(stream, results(name, op(name), given)[0])
        assert same_bits(memory[:offset], before[:offset])
        assert same_bits(memory[offset + size :], before[offset + size :])


@each_op
def test_arguments_are_not_written(name):
    for rows, dropout in itertools.product((None, (), (0, 2, -1)), DROPOUT[:3]):
        case = Case((5, 3, 17), rows=rows, next_rows=rows, **dropout)
        given, before = case.arguments(name), case.arguments(name)
        op(name)(*given)
        for after, value in list(zip(given, before, strict=True))[name in IN_PLACE :]:
            assert not torch.is_tensor(value) or torch.equal(after, value)


def test_what_is_dropped_out_may_be_anything():
    """A mask selects; it does not multiply."""
    zeros, ones = torch.zeros(5, 3, 17), torch.ones(5, 3, 17)
    for p in (0.3, 1.0):
        out = op("scatter_residual")(zeros, ones, None, None, p, KEY, SITE)
        y = ones.masked_fill(out == 0, torch.nan)
        assert y.isnan().any()
        assert same_bits(op("scatter_residual")(zeros, y, None, None, p, KEY, SITE), out)
        assert same_bits(op("scatter_residual_bwd")(y, None, None, p, KEY, SITE, y.dtype), out)
        assert same_bits(op("act")(y, None, "relu", p, KEY, SITE), out)


@each_dtype
def test_an_element_is_kept_iff_its_word_is_below_the_threshold(dtype):
    """Of 1,000 words, at thresholds of each of some words and of its successor."""
    ones = torch.ones(1, 1000, dtype=dtype)
    words = random_bits(KEY, SITE, torch.arange(1000))
    for threshold in (int(words[i]) + more for i in (0, 16, 999) for more in (0, 1)):
        kept = op("act")(ones, None, "relu", 1 - threshold / 2**32, KEY, SITE)[0] != 0
        assert torch.equal(kept, words < threshold)


def test_elements_are_numbered_beyond_32_bits():
    """A sample has 1920 elements here: sample 2236963 begins beyond 2^32, sample 2^31 - 2 beyond 2^41."""
    ones = torch.ones(3, 2, 960)
    for samples in ((1, 2_236_962, 2_236_963), (2**21, 2**30, 2**31 - 2)):
        rows = rows_of(*samples)
        expected = REFERENCE["act"](ones, rows, "relu", 0.4, KEY, SITE)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(expected, 2))
        assert same_bits(op("act")(ones, rows, "relu", 0.4, KEY, SITE), expected)
        assert same_bits(op("act_bwd")(ones, ones, rows, "relu", 0.4, KEY, SITE)[0], expected)
        if samples[-1] < 2**22:
            grad_out = ones[:1].expand(samples[-1] + 1, -1, -1)
            assert same_bits(op("scatter_residual_bwd")(grad_out, rows, None, 0.4, KEY, SITE, ones.dtype), expected)


@pytest.mark.parametrize("shape", [(6, 50, 300), (64, 2048)])
@each_op
def test_same_bits_with_any_number_of_threads(name, shape, set_threads):
    half = tuple(range(shape[0] // 2))
    for rows, next_rows, dtype in ((half, None, torch.float32), (None, half, torch.bfloat16), (half,) * 2 + DTYPES[:1]):
        given = Case(shape, dtype, rows=rows, next_rows=next_rows, p=0.3, activation="gelu").arguments(name)
        set_threads(1)
        expected = results(name, op(name), given)
        for threads in (2, 3, 8):
            set_threads(threads)
            assert all_same(results(name, op(name), given), expected)


@each_dtype
@each_op
def test_same_bits_with_every_instruction_set(name, dtype, use_instruction_set):
    activations = ACTIVATIONS if name.startswith("act") else ["relu"]
    for shape, activation, branch in itertools.product(((5, 3, 63), (5, 1100)), activations, DTYPES):
        given = Case(shape, dtype, branch, **USUAL, activation=activation).arguments(name)
        use_instruction_set(INSTRUCTION_SETS[0])
        expected = results(name, op(name), given)
        for instructions in INSTRUCTION_SETS[1:]:
            use_instruction_set(instructions)
            assert all_same(results(name, op(name), given), expected)
