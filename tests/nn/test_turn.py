"""How a forward is cut into pieces of bounded memory."""

import math
import random
from itertools import pairwise

import pytest

from layerdrop_fast.nn.turn import Kept, pieces


def cut(sizes, bound):
    """The row counts of each piece, and which are recomputed."""
    found = pieces([Kept(unit, None, rows, 1.0) for unit, rows in enumerate(sizes)], bound)
    assert [unit.unit for piece in found for unit in piece.kept] == list(range(len(sizes)))
    return [[unit.num_rows for unit in piece.kept] for piece in found], [piece.recomputed for piece in found]


@pytest.mark.parametrize(
    ("sizes", "bound", "expected"),
    [
        ([1, 1, 1], None, [[1, 1, 1]]),
        ([1, 1, 1], 3, [[1, 1, 1]]),
        ([1, 1, 1, 1], 3, [[1], [1, 1, 1]]),
        ([1, 1, 1, 1, 1], 2, [[1], [1, 1], [1, 1]]),
        ([2, 3, 1, 4, 2], 5, [[2, 3], [1, 4], [2]]),
        ([4, 4, 0, 4], 5, [[4], [4], [0, 4]]),
        ([9, 1, 9], 5, [[9], [1], [9]]),
        ([9], 5, [[9]]),
        ([], 5, [[]]),
        ([0, 0], 0, [[0, 0]]),
    ],
)
def test_pieces(sizes, bound, expected):
    assert cut(sizes, bound) == (expected, [True] * (len(expected) - 1) + [False])


@pytest.mark.parametrize("bound", [1, 3, 7, 20])
def test_pieces_fit_and_are_no_more_than_needed(bound):
    sizes = [(7 * unit) % 5 for unit in range(50)]
    found, recomputed = cut(sizes, bound)
    assert all(sum(piece) <= bound or len(piece) == 1 for piece in found)
    # None has room for the unit before it.
    assert all(sum(after) + before[-1] > bound for before, after in pairwise(found))
    assert sum(recomputed) == len(found) - 1


@pytest.mark.parametrize("max_kept", [1, 2, 3, 5])
def test_copies_of_the_stream_are_those_of_layers_that_all_samples_keep(max_kept):
    """At most ceil((kept - m) / m), of layers that any sample keeps: each piece has room for m of them."""
    batch, generator = 8, random.Random(0)
    for _ in range(300):
        sizes = [generator.randint(1, batch) for _ in range(generator.randint(1, 20))]
        _, recomputed = cut(sizes, max_kept * batch)
        assert sum(recomputed) <= max(0, math.ceil((len(sizes) - max_kept) / max_kept))
