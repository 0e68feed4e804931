"""Random subsets of layers, balanced ones too."""

import math
from collections import Counter
from itertools import combinations

import pytest

from layerdrop_fast.prune.subsets import balanced_subsets, random_subsets


@pytest.mark.parametrize("draw", [random_subsets, balanced_subsets])
@pytest.mark.parametrize(("layers", "kept"), [(range(1, 8), 3), ([0, 2, 5, 6], 2), (range(5), 5), (range(3), 1)])
def test_subsets_are_different_ascending_and_as_many_as_asked_for(draw, layers, kept):
    everything = set(combinations(layers, kept))
    for count in range(1, len(everything) + 2):
        for seed in range(20):
            found = draw(layers, kept, count, seed)
            assert len(found) == len(set(found)) == min(count, len(everything))
            assert set(found) <= everything


@pytest.mark.parametrize("draw", [random_subsets, balanced_subsets])
def test_subsets_follow_the_seed(draw):
    assert draw(range(9), 4, 10, [0, 1]) == draw(range(9), 4, 10, [0, 1])
    assert draw(range(9), 4, 10, [0, 1]) != draw(range(9), 4, 10, [0, 2])


def test_balanced_subsets_have_each_layer_equally_often():
    """Of 15 layers and 20 subsets of 8, as in the paper's figure: 160 places, 10 or 11 a layer."""
    for seed in range(300):
        times = Counter(layer for subset in balanced_subsets(range(15), 8, 20, seed) for layer in subset)
        assert sorted(times.values()) == [10] * 5 + [11] * 10


def test_every_subset_is_as_likely_whichever_place_it_has():
    """Chi-squared of 20 subsets at each of three places; 43.8 is its 0.1 % point at 19 degrees of freedom."""
    draws = [balanced_subsets(range(6), 3, 3, seed) for seed in range(4000)]
    for place in range(3):
        times = Counter(found[place] for found in draws)
        assert len(times) == math.comb(6, 3)
        assert sum((seen - 200) ** 2 / 200 for seen in times.values()) < 43.8
