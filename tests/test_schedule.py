"""Drop rates over depth and time, against their formulas."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from layerdrop_fast import (
    DropSchedule,
    LayerDropStack,
    TransformerStack,
    alternating,
    constant,
    decreasing,
    increasing,
    linear,
    optimal_drop_rate,
    per_layer,
    progressive,
    uniform,
    warmup,
)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (uniform(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (linear(0.8), [0.0, 0.2, 0.4, 0.6, 0.8]),
        (alternating(0.6), [0.0, 0.6, 0.0, 0.6, 0.0]),
        (per_layer([0, 1, 0.5, 0.25, 0.1]), [0.0, 1.0, 0.5, 0.25, 0.1]),
    ],
)
def test_depth_profiles(depth, expected):
    rates = DropSchedule(5, depth)(0)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, expected, rtol=1e-15, atol=0)


def test_a_single_layer():
    assert DropSchedule(1, linear(0.4))(0).tolist() == [0.4]
    assert DropSchedule(1, alternating(0.4))(0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("time", "steps", "expected"),
    [
        (constant(), [0, 10**9], [1, 1]),
        (decreasing(5), [0, 1, 2, 3, 4, 5, 10**9], [1, 0.75, 0.5, 0.25, 0, 0, 0]),
        (increasing(5), [0, 1, 2, 3, 4, 5, 10**9], [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (warmup(4), [0, 1, 2, 3, 4, 10**9], [0.25, 0.5, 0.75, 1, 1, 1]),
        (decreasing(1), [0, 1, 7], [1, 1, 1]),
        (increasing(1), [0, 1, 7], [1, 1, 1]),
        (warmup(1), [0, 1, 7], [1, 1, 1]),
        (
            progressive(0.5, 0.001),
            [0, 1000, 10**9],
            [0, 1 - (0.5 * math.exp(-1) + 0.5), 0.5],
        ),
    ],
)
def test_time_multipliers(time, steps, expected):
    schedule = DropSchedule(2, per_layer([0.5, 1.0]), time)
    for step, multiplier in zip(steps, expected, strict=True):
        np.testing.assert_allclose(schedule(step), [0.5 * multiplier, multiplier], rtol=1e-15, atol=0)


def test_progressive_is_the_published_keep_rate_over_depth():
    """PLD keeps layer l of L with 1 - l/L (1 - theta(t)); with L + 1 layers counted from 0, linear(1) is l/L."""
    schedule = DropSchedule(7, linear(1.0), progressive(0.4, 0.01))
    theta = (1 - 0.4) * math.exp(-0.01 * 30) + 0.4
    np.testing.assert_allclose(1 - schedule(30), [1 - layer / 6 * (1 - theta) for layer in range(7)], rtol=1e-14)


def test_what_schedule_keywords_accept():
    for given in (0.25, [0.25, 0.25], (0.25, 0.25), np.array([0.25, 0.25]), torch.tensor([0.25, 0.25])):
        assert DropSchedule.of(given, 2)(3).tolist() == [0.25, 0.25]
    schedule = DropSchedule(2, linear(0.5))
    assert DropSchedule.of(schedule, 2) is schedule


def test_schedules_are_values():
    schedule = DropSchedule(4, linear(0.5), decreasing(10))
    assert repr(schedule) == "DropSchedule(num_layers=4, depth=linear(p_max=0.5), time=decreasing(total=10))"
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert twin(3).tolist() == schedule(3).tolist()
    schedule(3)[:] = 7.0  # the caller's own copy
    assert schedule(3).max() <= 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: uniform(1.5), ValueError, r"p must lie in \[0, 1\], got 1.5"),
        (lambda: uniform(-0.1), ValueError, r"\[0, 1\], got -0.1"),
        (lambda: linear(math.nan), ValueError, r"p_max must lie in \[0, 1\], got nan"),
        (lambda: alternating("0.2"), TypeError, r"p_max must be a number, got '0.2' of type str"),
        (lambda: per_layer([0.1, 2.0]), ValueError, r"layer 1 must lie in \[0, 1\], got 2.0"),
        (lambda: DropSchedule(3, per_layer([0.1])), ValueError, r"got 1 drop rates, expected 3"),
        (lambda: DropSchedule(0, uniform(0.1)), ValueError, r"num_layers must be at least 1, got 0"),
        (lambda: DropSchedule(2.0, uniform(0.1)), TypeError, r"num_layers must be an integer, got 2.0 of type float"),
        (lambda: DropSchedule(2, 0.1), TypeError, r"depth must be a Depth such as uniform\(0.2\), got 0.1"),
        (lambda: DropSchedule(2, uniform(0.1), 100), TypeError, r"time must be a Time such as decreasing\(1000\), got"),
        (lambda: DropSchedule(2, uniform(0.1))(-1), ValueError, r"step must be at least 0, got -1"),
        (lambda: DropSchedule.of(DropSchedule(2, uniform(0.1)), 3), ValueError, r"is for 2 layers, expected 3"),
        (lambda: DropSchedule.of(None, 3), TypeError, r"drop rate must be a number, got None"),
        (
            lambda: DropSchedule.of([[0.1, 0.2]], 1),
            TypeError,
            r"layer 0 must be a number, got \[0.1, 0.2\] of type list",
        ),
        (lambda: uniform(np.zeros(2)), TypeError, r"p must be a single number, got array\(\[0., 0.\]\)"),
        (lambda: decreasing(0), ValueError, r"total must be at least 1, got 0"),
        (lambda: warmup(0), ValueError, r"steps must be at least 1, got 0"),
        (lambda: progressive(1.5), ValueError, r"theta must lie in \[0, 1\], got 1.5"),
        (lambda: progressive(0.5, -1.0), ValueError, r"gamma must be finite and at least 0, got -1.0"),
        (lambda: optimal_drop_rate(4, 5), ValueError, r"kept must lie in \[0, 4\], got 5"),
        (lambda: optimal_drop_rate(0, 0), ValueError, r"num_groups must be at least 1, got 0"),
    ],
)
def test_errors_name_both_sides(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_optimal_drop_rate():
    """The paper's own example sizes: 16 to 8 and 12 to 6 layers want 0.5, 12 to 3 wants 0.75."""
    assert optimal_drop_rate(16, 8) == 0.5
    assert optimal_drop_rate(12, 6) == 0.5
    assert optimal_drop_rate(12, 3) == 0.75
    assert optimal_drop_rate(12, 12) == 0.0


def test_a_profile_is_a_schedule_that_does_not_change():
    assert DropSchedule.of(linear(0.4), 5) == DropSchedule(5, linear(0.4))
    assert LayerDropStack([nn.Identity()] * 3, linear(0.4)).schedule == DropSchedule(3, linear(0.4))
    assert TransformerStack(3, 8, 2, 8, schedule={"head": linear(0.4)}).parts.schedules["head"].depth == linear(0.4)
