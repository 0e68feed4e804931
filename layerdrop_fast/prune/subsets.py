"""Subsets of layers, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, repeat
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Subset: TypeAlias = tuple[int, ...]
TRIES = 50  # at a balanced subset that is a new one


def random_subsets(layers: Sequence[int], kept: int, count: int, seed: int | list[int]) -> list[Subset]:
    """``count`` different subsets of ``kept`` of these layers, which ascend; all subsets where there are no more."""
    return _different(layers, kept, count, seed, tries=0)


def balanced_subsets(layers: Sequence[int], kept: int, count: int, seed: int | list[int]) -> list[Subset]:
    """As ``random_subsets``, and each layer is in as many of them as any other, give or take one where that can be.

    A subset has the layers that those before it have least, ties at random, so that all subsets are equally likely. A
    mean over them is then not shifted by a layer that matters and happens to be in 5 of 20.
    """
    return _different(layers, kept, count, seed, tries=TRIES)


def _different(layers: Sequence[int], kept: int, count: int, seed: int | list[int], tries: int) -> list[Subset]:
    if math.comb(len(layers), kept) <= count:
        return list(combinations(layers, kept))
    generator = np.random.default_rng(seed)
    taken = np.zeros(len(layers), dtype=np.int64)  # how often so far
    even = np.zeros_like(taken)
    found: dict[Subset, None] = {}  # of places
    while len(found) < count:
        drawn = chain(_drawn(taken, kept, generator, repeat(None, tries)), _drawn(even, kept, generator, repeat(None)))
        subset = next(subset for subset in drawn if subset not in found)
        taken[list(subset)] += 1
        found[subset] = None
    return [tuple(layers[place] for place in subset) for subset in found]


def _drawn(
    taken: npt.NDArray[np.int64], kept: int, generator: np.random.Generator, times: Iterator[None]
) -> Iterator[Subset]:
    """Subsets of the places taken least, at random among those taken equally often."""
    for _ in times:
        order = generator.permutation(len(taken))
        yield tuple(sorted(order[np.argsort(taken[order], kind="stable")[:kept]].tolist()))
