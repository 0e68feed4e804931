"""draw_plan: known answers, agreement of the two planners, shapes, errors."""

import numpy as np
import pytest
import torch

from layerdrop_fast import DropSchedule, _extension, draw_plan, linear
from layerdrop_fast.reference import planner as reference
from layerdrop_fast.reference.philox import MASK32, philox4x32

needs_extension = pytest.mark.skipif(_extension.missing is not None, reason=f"C++ extension {_extension.missing}")


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def planner(request, monkeypatch):
    """Every test of draw_plan runs on both planners."""
    if request.param == "compiled" and _extension.missing is not None:
        pytest.skip(f"C++ extension {_extension.missing}")
    chosen = _extension.planner if request.param == "compiled" else reference
    monkeypatch.setattr("layerdrop_fast.plan.planner", chosen)


def philox(counter, key):
    words = philox4x32(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    return tuple(map(int, words))


# Random123's known answers for Philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


@needs_extension
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers_in_cpp(counter, key, expected):
    assert _extension.planner.philox4x32(counter, key) == expected


def test_a_decision_is_the_documented_word():
    """keep[l, b] iff the word of element layer * B + b at site 0 is below the threshold; by hand, from Philox alone."""
    seed, step, stream, batch_size = 2**40 + 17, 5, 3 << 32 | 1, 3
    k = philox((step, 0, stream & MASK32, stream >> 32), (seed & MASK32, seed >> 32))
    rates = [0.0, 0.3, 0.5, 0.9, 1.0]
    expected = [
        [
            philox(((layer * batch_size + b) // 4, 0, k[2], k[3]), k[:2])[(layer * batch_size + b) % 4]
            < round((1 - rate) * 2**32)
            for b in range(batch_size)
        ]
        for layer, rate in enumerate(rates)
    ]
    assert draw_plan(rates, batch_size, seed=seed, step=step, stream=stream).keep.tolist() == expected


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_a_unit_whose_word_equals_its_threshold_is_dropped(sampling):
    """kept iff u < t, exactly: with t = u the marginal would be one in 2**32 too high. A unit alone in its group."""
    site = {"bernoulli": 0, "systematic": 2}[sampling]  # at B = 1 systematic sampling compares the start
    for step in range(50):
        k = philox((step, 0, 0, 0), (7, 0))
        word = philox((0, site, k[2], k[3]), k[:2])[0]
        for threshold, kept in ((word, False), (word + 1, True)):
            rate = 1 - threshold / 2**32  # exact in float64
            assert draw_plan([rate], 1, seed=7, step=step, sampling=sampling).kept_counts == [kept]


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_the_parts_of_a_plan_agree(sampling):
    plan = draw_plan([0.0, 0.3, 0.5, 1.0], 9, seed=1, step=2, sampling=sampling)
    keep = plan.keep
    assert keep.shape == (4, 9)
    assert keep.dtype == torch.bool
    assert plan.layers == [layer for layer in range(4) if keep[layer].any()]
    assert plan.kept.dtype == torch.int64
    assert plan.kept.tolist() == plan.kept_counts == keep.sum(1).tolist()
    np.testing.assert_allclose(plan.realized_rates, 1 - keep.double().mean(1).numpy(), rtol=1e-15)
    assert plan.slot.dtype == torch.int32
    for layer in range(4):
        rows = plan.rows(layer)
        assert rows.dtype == torch.int32
        assert rows.tolist() == keep[layer].nonzero().flatten().tolist()
        for place, row in enumerate(rows.tolist()):
            assert plan.slot[layer, row] == place
        assert (plan.slot[layer][~keep[layer]] == -1).all()
    assert plan.kept_counts[0] == 9
    assert plan.kept_counts[3] == 0


def test_batch_granularity():
    plan = draw_plan([0.5] * 40, seed=1, step=2)
    assert plan.keep.shape == (40, 1)
    assert plan.layers == plan.keep[:, 0].nonzero().flatten().tolist()
    assert 0 < len(plan.layers) < 40
    assert plan.rows(plan.layers[0]).tolist() == [0]


def test_a_plan_depends_on_its_integers_alone():
    state = torch.get_rng_state()
    rates = DropSchedule(40, linear(0.8))(0)
    plan = draw_plan(rates, seed=1, step=2, stream=3).layers
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert draw_plan(torch.from_numpy(rates), seed=1, step=2, stream=3).layers == plan
    assert draw_plan(rates.tolist(), seed=1, step=2, stream=3).layers == plan
    others = [dict(seed=2, step=2, stream=3), dict(seed=1, step=3, stream=3), dict(seed=1, step=2, stream=4)]
    assert all(draw_plan(rates, **integers).layers != plan for integers in others)


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
@pytest.mark.parametrize("batch_size", [None, 6])
def test_min_kept_adds_and_never_takes(sampling, batch_size):
    rates = [0.7] * 8
    for step in range(200):
        free = draw_plan(rates, batch_size, seed=3, step=step, sampling=sampling)
        held = draw_plan(rates, batch_size, seed=3, step=step, sampling=sampling, min_kept=3)
        assert (free.keep <= held.keep).all()
        groups = zip(*[k if batch_size else k.T for k in (free.keep, held.keep)], strict=True)
        for before, after in groups:
            assert after.sum() == max(3, before.sum())


def test_min_kept_keeps_those_that_came_nearest():
    """With rates 0.5 and 1 the word of the second must be much smaller to win; equal rates: the smallest word wins."""
    for step in range(100):
        plan = draw_plan([1.0] * 5, seed=0, step=step, min_kept=2)
        key = philox((step, 0, 0, 0), (0, 0))
        words = [w for block in (0, 1) for w in philox((block, 0, *key[2:]), key[:2])][:5]
        assert plan.layers == sorted(sorted(range(5), key=words.__getitem__)[:2])


def test_extreme_rates_are_certain():
    for sampling in ("bernoulli", "systematic"):
        for step in range(100):
            plan = draw_plan([0.0, 1.0], 5, seed=9, step=step, sampling=sampling)
            assert plan.kept_counts == [5, 0]


def test_a_plan_cannot_be_changed_through_its_tensors():
    plan = draw_plan([0.0] * 3, seed=1, step=1)
    plan.keep.zero_()
    assert plan.layers == [0, 1, 2]
    assert draw_plan(torch.zeros(3, requires_grad=True), seed=1, step=1).layers == [0, 1, 2]


def test_no_layers():
    for sampling in ("bernoulli", "systematic"):
        plan = draw_plan([], 4, seed=1, step=1, sampling=sampling)
        assert plan.layers == []
        assert plan.keep.shape == (0, 4)


def test_to_moves_and_keeps():
    plan = draw_plan([0.5] * 4, 3, seed=1, step=1)
    moved = plan.to("meta")
    assert moved.keep.device.type == "meta"
    assert moved.layers == plan.layers
    assert (moved.seed, moved.step, moved.stream, moved.sampling) == (1, 1, 0, "bernoulli")


BAD = [
    (dict(rates=[0.5, 1.5]), ValueError, r"layer 1 is 1.5, expected a number in \[0, 1\]"),
    (dict(rates=[float("nan")]), ValueError, r"layer 0 is nan, expected"),
    (dict(rates=[[0.5]]), ValueError, r"shape \[1, 1\], expected \[num_layers\]"),
    (dict(rates=0.5), ValueError, r"shape \[\], expected \[num_layers\]"),
    (dict(rates=["a"]), TypeError, r"rates must be a vector of numbers, got \['a'\]"),
    (dict(rates=torch.empty(3, device="meta")), TypeError, r"on meta, expected numbers on the host"),
    (dict(seed=-1), ValueError, r"seed is -1, expected an integer in \[0, 2\*\*64\)"),
    (dict(step=2**64), ValueError, r"step is 18446744073709551616, expected"),
    (dict(stream=0.5), TypeError, r"stream must be an integer, got 0.5 of type float"),
    (dict(sampling="poisson"), ValueError, r"sampling is 'poisson', expected one of \('bernoulli', 'systematic'\)"),
    (dict(batch_size=0), ValueError, r"batch_size is 0, expected 1 to 2\*\*31 - 1, or None"),
    (dict(batch_size=2.0), TypeError, r"batch_size must be an integer, got 2.0 of type float"),
    (dict(batch_size=2**31), ValueError, r"batch_size is 2147483648, expected 1 to 2\*\*31 - 1"),
    (dict(min_kept=3), ValueError, r"min_kept is 3, expected 0 to 2"),
    (dict(min_kept=-1), ValueError, r"min_kept is -1, expected 0 to 2"),
    (dict(min_kept=5, batch_size=4), ValueError, r"min_kept is 5, expected 0 to 4"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_errors_name_both_sides(changed, error, message):
    arguments = dict(rates=[0.5, 0.5], seed=0, step=0) | changed
    with pytest.raises(error, match=message):
        draw_plan(arguments.pop("rates"), **arguments)
