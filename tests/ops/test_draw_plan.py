"""The ops draw_plan and step_key: registration, shapes, errors."""

import pytest
import torch

from layerdrop_fast import draw_plan, ops

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
        ((COUNTERS, RATES), {"min_kept": 4}, ValueError, r"min_kept: got 4, expected 0 to 3"),
    ],
)
def test_errors_name_both_sides(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ops.draw_plan(*arguments, **keywords)
