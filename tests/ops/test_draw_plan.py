"""The ops draw_plan and step_key: registration, shapes, errors."""

import pytest
import torch

from layerdrop_fast import _extension, draw_plan, ops
from layerdrop_fast.reference.draw_plan import draw_plan_ as reference_draw_plan_

COUNTERS = torch.tensor([3, 5, 7])
RATES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_the_op_is_the_host_plan(batch_size, sampling):
    plan = draw_plan(RATES, batch_size, seed=3, step=5, stream=7, sampling=sampling, min_kept=1)
    keep, rows, slot, kept = ops.draw_plan(COUNTERS, RATES, batch_size, sampling=sampling, min_kept=1)
    assert torch.equal(keep, plan.keep)
    assert torch.equal(slot, plan.slot)
    assert torch.equal(kept, plan.kept)
    for layer in range(3):
        assert torch.equal(rows[layer, : kept[layer]], plan.rows(layer))
        assert (rows[layer, kept[layer] :] == -1).all()


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_opcheck(batch_size):
    torch.library.opcheck(torch.ops.layerdrop_fast.step_key.default, (COUNTERS,))
    for systematic in (False, True):
        arguments = (COUNTERS, RATES, batch_size, systematic, 1)
        torch.library.opcheck(torch.ops.layerdrop_fast.draw_plan.default, arguments)
        torch.library.opcheck(torch.ops.layerdrop_fast.draw_plan_.default, (COUNTERS.clone(), *arguments[1:]))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("words", [[3, 5, 7], [-1, -1, -1], [0, 2**63 - 1, 0]])
def test_advance_draws_the_plans_of_steps_that_follow_each_other(words, reference):
    counters, step = torch.tensor(words), words[1]
    arguments = (RATES, 5, True, 1)
    for _ in range(3):
        expected = torch.ops.layerdrop_fast.draw_plan(torch.tensor([words[0], step, words[2]]), *arguments)
        if reference:
            drawn = reference_draw_plan_(counters, *arguments)
        else:
            drawn = ops.draw_plan(counters, RATES, 5, sampling="systematic", min_kept=1, advance=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, expected, strict=True))
        step = (step + 1 + 2**63) % 2**64 - 2**63
        assert counters.tolist() == [words[0], step, words[2]]


@pytest.mark.parametrize("advance", [False, True])
def test_no_layers_are_a_plan(advance):
    counters = COUNTERS.clone()
    for batch_size in (None, 4):
        drawn = ops.draw_plan(counters, RATES[:0], batch_size, advance=advance)
        assert [tuple(out.shape) for out in drawn] == [(0, batch_size or 1)] * 3 + [(0,)]
    assert counters[1] == COUNTERS[1] + 2 * advance


def test_an_error_advances_nothing():
    counters = COUNTERS.clone()
    for rates in (RATES + 0.5, RATES.float()):
        with pytest.raises((TypeError, ValueError)):
            ops.draw_plan(counters, rates, advance=True)
    assert torch.equal(counters, COUNTERS)


@pytest.mark.skipif(_extension.missing is not None, reason="torch checks what the reference reads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COUNTERS[:2], RATES, None, False, 0), "3 elements"),
        ((COUNTERS, RATES.float(), None, False, 0), "float64 vector"),
        ((COUNTERS, RATES + 0.5, None, False, 0), r"drop rates must lie in \[0, 1\]"),
        ((COUNTERS, RATES, 0, False, 0), r"batch_size must lie in \[1, 2\^31\), got 0"),
        ((COUNTERS, RATES, 2**31, False, 0), "got 2147483648"),
        ((COUNTERS, RATES, 4, False, 5), r"min_kept must lie in \[0, 4\], got 5"),
        ((torch.arange(6)[::2], RATES, None, False, 0), "contiguous"),
    ],
)
def test_kernels_refuse_what_would_lead_them_beyond_memory(arguments, message):
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.layerdrop_fast.draw_plan_(*arguments)
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((COUNTERS.int(), RATES), {}, TypeError, r"counters: got torch.int32, expected torch.int64"),
        ((COUNTERS[:2], RATES), {}, ValueError, r"counters: got \[2\], expected \[3\]"),
        ((COUNTERS, RATES.float()), {}, TypeError, r"rates: got torch.float32, expected torch.float64"),
        ((COUNTERS, RATES[None]), {}, ValueError, r"rates: got \[1, 3\], expected \[L\]"),
        ((COUNTERS, RATES + 0.5), {}, ValueError, r"rates: got 1.4 for layer 2, expected a number in \[0, 1\]"),
        ((COUNTERS, RATES.to("meta")), {}, ValueError, r"rates: got a tensor on meta, expected cpu"),
        ((COUNTERS, RATES, 0), {}, ValueError, r"batch_size: got 0, expected 1 to"),
        ((COUNTERS, RATES), {"sampling": "x"}, ValueError, r"sampling: got 'x', expected one of bernoulli, systematic"),
        ((torch.arange(6)[::2], RATES), {"advance": True}, ValueError, r"counters: got strides \[2\] for \[3\]"),
        ((COUNTERS, RATES), {"min_kept": 4}, ValueError, r"min_kept: got 4, expected 0 to 3"),
    ],
)
def test_errors_name_both_sides(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.draw_plan(*arguments, **keywords)
