"""The Every Other strategy, against the paper's numbers."""

import numpy as np
import pytest

from layerdrop_fast.prune import every_other


def test_layers_are_plain_integers():
    assert [type(layer) for layer in every_other(np.int64(4), kept=np.int64(2))] == [int, int]


def test_sixteen_to_eight_is_the_papers_list():
    assert every_other(16, kept=8) == every_other(16, p=0.5) == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize(("num_layers", "k"), [(16, 2), (16, 4), (12, 3), (12, 6), (7, 2), (10, 10), (5, 7)])
def test_the_papers_rule_for_p_one_over_k(num_layers, k):
    """Layer d, counted from 1, is dropped where d = 0 (mod k)."""
    dropped = [d - 1 for d in range(1, num_layers + 1) if d % k == 0]
    assert every_other(num_layers, p=1 / k) == [layer for layer in range(num_layers) if layer not in dropped]


def test_other_rates_are_evenly_spaced():
    """12 to 3, the paper's 75 %, is out of reach of its own formula."""
    assert every_other(12, p=0.75) == every_other(12, kept=3) == [0, 4, 8]
    assert every_other(10, p=0.3) == every_other(10, kept=7) == [0, 1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("p", [0.33, 0.332, 1 / 3 - 1e-7, 1 / 3 + 1e-7])
def test_rates_near_one_over_k_are_evenly_spaced_too(p):
    assert every_other(10, p=p) == every_other(10, kept=7) == [0, 1, 2, 4, 5, 7, 8]
    assert every_other(10, p=1 / 3) == every_other(10, p=0.3333333333) == [0, 1, 3, 4, 6, 7, 9]


@pytest.mark.parametrize("num_layers", [1, 2, 7, 16, 40])
def test_every_depth(num_layers):
    for kept in range(1, num_layers + 1):
        layers = every_other(num_layers, kept=kept)
        assert len(layers) == kept
        assert layers == sorted(set(layers))
        gaps = [b - a for a, b in zip(layers, [*layers[1:], num_layers], strict=True)]
        assert all(num_layers // kept <= gap <= -(-num_layers // kept) for gap in gaps)
        assert layers[0] == 0


def test_extremes():
    assert every_other(5, p=0.0) == every_other(5, kept=5) == [0, 1, 2, 3, 4]
    assert every_other(5, p=1.0) == every_other(5, kept=0) == []


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({}, ValueError, "got kept=None and p=None, expected exactly one"),
        (dict(kept=1, p=0.5), ValueError, "got kept=1 and p=0.5, expected exactly one"),
        (dict(kept=5), ValueError, "kept is 5, expected 0 to 4"),
        (dict(kept=-1), ValueError, "kept must be at least 0, got -1"),
        (dict(kept=1.5), TypeError, "kept must be an integer, got 1.5"),
        (dict(p=1.5), ValueError, r"\[0, 1\], got 1.5"),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        every_other(4, **keywords)
