"""What the C++ kernels keep to, the Triton kernels keep to: the same tests, and those of what is theirs alone."""

import pytest
import torch

from layerdrop_fast.triton import launch
from tests.ops.eager import KEY, NAMES, REFERENCE, SITE, Case, assert_agrees, results, rows_of, same_bits, tensor
from tests.ops.test_kernels import (
    test_a_mean_far_from_zero,
    test_a_spare_row_is_0_without_eps_too,
    test_activations,
    test_an_element_is_kept_iff_its_word_is_below_the_threshold,
    test_any_strides,
    test_arguments_are_not_written,
    test_branch_of_another_dtype,
    test_expanded,
    test_in_place_gives_the_bits_of_out_of_place,
    test_in_place_writes_nothing_round_the_stream,
    test_one_pass_gives_the_bits_of_two,
    test_one_sample_and_none,
    test_rows_and_dropout,
    test_sizes,
    test_what_is_dropped_or_spare_is_not_read,
    test_what_is_dropped_out_may_be_anything,
)
from tests.ops.test_library import BAD, BAD_ROWS
from tests.triton.conftest import ON_GPU, PARAMETERS, op

FLOAT32 = torch.float32
# Rows of channels wider than what stays in registers, and of one channel more than a multiple of four.
WIDE = (16384 + 64, 16384 + 65)


@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_registers_do_not_hold(name, width):
    for dtype, rms in ((FLOAT32, False), (torch.bfloat16, True)):
        usual = {"rows": (0, -1), "next_rows": (0, 1), "p": 0.3, "scale": 1.25}
        assert_agrees(name, Case((2, 2, width), dtype, **usual, rms=rms))


@pytest.mark.parametrize("name", ["scatter_residual_gather_norm", "scatter_residual_gather_norm_bwd_"])
def test_the_widest_rows(name):
    assert_agrees(name, Case((2, 1, 65536), torch.bfloat16, rows=(1,), next_rows=(0,), p=0.3))


def test_a_wide_row_with_a_mean_far_from_zero():
    x = tensor(2, WIDE[0]) + 300
    assert_agrees("gather_norm", Case(tuple(x.shape)), (x.float(), None, False, 1e-5))


@pytest.fixture(params=["looked up", "looked through"])
def looks(request, monkeypatch):
    """How programs find a sample's place: beyond some number of samples, in a tensor of their own."""
    if request.param == "looked up":
        monkeypatch.setattr(launch, "MOST_SCANNED", 3)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_to_a_sample_s_place(name, looks):
    some, others = (0, 1, -1, 18, 20), (-1, 2, 3, 18, -1)
    for rows, next_rows in ((some, others), (others, some), (some, some), (None, some), (some, None)):
        assert_agrees(name, Case((21, 3), rows=rows, next_rows=next_rows, p=0.3))


def test_elements_are_numbered_beyond_32_bits():
    """A sample has 1920 elements here: sample 2236963 begins beyond 2^32, sample 2^31 - 2 beyond 2^41."""
    ones = torch.ones(3, 2, 960)
    for samples in ((1, 2_236_962, 2_236_963), (2**21, 2**30, 2**31 - 2)):
        rows = rows_of(*samples)
        expected = REFERENCE["act"](ones, rows, "relu", 0.4, KEY, SITE)
        assert same_bits(op("act")(ones, rows, "relu", 0.4, KEY, SITE), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "rows" in PARAMETERS[name] and not name.startswith("act")])
def test_a_row_outside_the_batch_is_a_spare_row(name, looks):
    """On a device nobody looks at rows beforehand: a wrong one leads to no other memory."""
    pairs = (1, -1), (1, 4), (1, 2**31 - 1)
    right, *wrong = (Case((4, 3, 16), rows=rows, next_rows=rows, p=0.3) for rows in pairs)
    expected = results(name, op(name), right.arguments(name))
    for case in wrong:
        assert all(map(same_bits, results(name, op(name), case.arguments(name)), expected))


SENTINEL = 77.0
MARGIN = 512  # elements on either side


@pytest.fixture
def sentinels(monkeypatch):
    """New tensors lie between numbers that nobody may write; a function that says whether these still stand there."""
    memories, original = [], torch.Tensor.new_empty

    def guarded(shape, dtype, device):
        count = torch.Size(shape).numel()
        memory = torch.full((count + 2 * MARGIN,), SENTINEL, dtype=dtype, device=device)
        memories.append(memory)
        return memory[MARGIN : MARGIN + count].view(shape)

    def new_empty(like, *shape, dtype=None, **others):
        if others:  # the interpreter's
            return original(like, *shape, dtype=dtype, **others)
        return guarded(shape, dtype or like.dtype, like.device)

    def empty_like(like, memory_format):
        return guarded(like.shape, like.dtype, like.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)

    def stand():
        margins = [margin for memory in memories for margin in (memory[:MARGIN], memory[-MARGIN:])]
        return bool(margins) and all((margin == SENTINEL).all() for margin in margins)

    return stand


@pytest.mark.skipif(ON_GPU, reason="there compute-sanitizer looks")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("scatter_residual_",)])
def test_nothing_is_written_round_the_results(name, sentinels):
    for shape, dtype in (((5, 3, 17), FLOAT32), ((5, 3, 64), torch.bfloat16), ((3, 5, 1030), FLOAT32)):
        for activation in ("relu", "swiglu")[: 2 if name.startswith("act") else 1]:
            rows = (0, 2, -1, -1)[: shape[0]]
            case = Case(shape, dtype, rows=rows, next_rows=rows, p=0.3, activation=activation)
            results(name, op(name), case.arguments(name))
            assert sentinels()


BAD_ROWS_OF_A_DEVICE = {what: BAD_ROWS[what] for what in ("dtype", "dimensions")}
# Values that nobody looks at on a device.
UNSEEN = {"site": ("-1", "255", str(2**24)), "batch_size": ("too small",)}


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_refuses_what_would_lead_beyond_memory(name):
    case = Case((4, 3, 6), rows=(0, 2), next_rows=(0, 3), p=0.3, scale=1.25, activation="swiglu")
    accepted = []
    for i, parameter in enumerate(PARAMETERS[name]):
        spoilt = BAD_ROWS_OF_A_DEVICE if "rows" in parameter else BAD.get(parameter, {})
        for what, spoil in spoilt.items():
            given = list(case.arguments(name))
            given[i] = spoil(given[i])
            try:
                op(name)(*given)
            except RuntimeError:
                continue
            accepted.append((parameter, what))
    assert [refusal for refusal in accepted if refusal[1] not in UNSEEN.get(refusal[0], ())] == []


@pytest.mark.skipif(ON_GPU, reason="op copies its arguments to the device")
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_")])
def test_a_launcher_in_place_refuses_a_stream_that_is_not_its_own(name):
    stream, *others = Case((4, 3, 6), rows=(0, 2), next_rows=(0, 2), p=0.3).arguments(name)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(name)(stream.transpose(0, 1).contiguous().transpose(0, 1), *others)
    for i, value in enumerate(others):
        if torch.is_tensor(value) and value.dim() > 1:
            part = (stream if value.dim() == 3 else stream[..., 0])[1:3]
            with pytest.raises(RuntimeError, match="shares memory with the stream"):
                op(name)(stream, *others[:i], part, *others[i + 1 :])
