"""Search on Valid: which layers to keep, by what evaluating says of candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from layerdrop_fast._checks import check_choice, check_count, check_range
from layerdrop_fast.prune.every_other import every_other
from layerdrop_fast.prune.lists import layers_of, named_list, said
from layerdrop_fast.prune.scores import Scores
from layerdrop_fast.prune.shared_prefixes import Evaluate
from layerdrop_fast.prune.subsets import Subset, random_subsets

METHODS = ("exhaustive", "greedy", "beam", "random")
MOST_SUBSETS = 1_000_000


@dataclass(frozen=True)
class Scored:
    """Layers to keep, and what evaluating says of them."""

    keep: list[int]
    value: float
    held_out: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: the candidates, the best first. Of "greedy" and "beam" those of the last round.
        every_other: the Every Other strategy, for comparison.
        layers_run: layers that ran, counted once an evaluation; without those of checks, of ``held_out``, and of scores
            that a ``resume`` file has.
        layers_asked: as many as would without shared prefixes.
    """

    ranked: list[Scored]
    every_other: Scored
    layers_run: int
    layers_asked: int

    @property
    def keep(self) -> list[int]:
        """The layers of the best candidate."""
        return self.ranked[0].keep

    def table(self, rows: int = 10) -> str:
        """The best candidates and Every Other, and below them how many layers ran, as text."""
        held_out = self.every_other.held_out is not None
        titles = ["rank", "value", *(["held out"] if held_out else []), "layers"]
        lines = [[f"{rank}", *_cells(row, held_out)] for rank, row in enumerate(self.ranked[:rows], 1)]
        lines.append(["every other", *_cells(self.every_other, held_out)])
        widths = [max(len(line[column]) for line in [titles, *lines]) for column in range(len(titles) - 1)]
        table = [
            "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
            for line in [titles, *lines]
        ]
        ran = f"{self.layers_run:,} layer evaluations where separate runs have {self.layers_asked:,}"
        return "\n".join([*table, ran])


def search(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    kept: int,
    method: str = "exhaustive",
    layers: str | None = None,
    held_out: Evaluate | None = None,
    top: int = 10,
    width: int = 4,
    trials: int = 200,
    seed: int = 0,
    share_prefixes: bool = True,
    max_bytes: int = 1 << 30,
    resume: Path | str | None = None,
    progress: bool = False,
) -> SearchResult:
    """Which ``kept`` layers of a trained model are best, by a number that evaluating gives.

    Candidates are evaluated without copying a weight. A layer's output depends on the layers kept before it only, so
    candidates are taken in ascending order and each starts from the hidden states that it shares with the one before,
    if that has as many layers:
    of n layers to k, exhaustive, ``C(n + 1, k) - 1`` layers run, one for each distinct prefix, where candidates have
    ``k * C(n, k)`` (24,309 of 102,960 for 8 of 16).

        found = search(model, lambda model: loss(model, valid), kept=8, held_out=lambda model: loss(model, valid2))
        print(found.table())
        small = extract(model, found.keep)

    Choosing the best of many candidates fits the validation set: ``held_out`` says by how much.

    Args:
        model: a module that is or holds a list of layers, as for ``extract``; it is left as it is, and in the mode it
            was in.
        evaluate: called with the model at the smaller depth, in evaluation mode under ``torch.no_grad()``; returns a
            number, lower is better. It calls the model with the same inputs in the same order each time. A list's
            layers, and what holds them, run uncompiled then; a stack's may be compiled.
        kept: how many layers to keep, 1 to L.
        method: "exhaustive", all subsets; "greedy", from all layers on always without the one that is missed least;
            "beam", the same from the ``width`` best; "random", ``trials`` subsets.
        layers: the name of the list of layers; None: the only one.
        held_out: a second number, of other data, for the ``top`` best and for Every Other.
        seed: of "random".
        share_prefixes: False runs every layer of every candidate: for layers that pass on more than x, that write into
            it, or that stand in a model which reads states between them. A few candidates are evaluated both ways, and
            must score the same (1e-4, or 1e-2 with bfloat16 or float16).
        max_bytes: of hidden states that are held for the next candidates, at most. Of inputs only fingerprints are.
        resume: a file that keeps all scores, of ``held_out`` too, so that the same call goes on where an earlier one
            stopped, however that ended. Of several ranks each needs its own.
        progress: show how far it is.

    Raises:
        ValueError: a value out of range; more than a million subsets; inputs that change; scores that shared prefixes
            change; an ``evaluate`` that runs no layer; no candidate with a finite score; a ``resume`` file of another
            model or ``evaluate``. TypeError: a value of another kind. OSError: the ``resume`` file cannot be read or
            written, which shows before anything runs.

    Randomness: "random" draws from numpy's PCG64 with ``seed``.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3, "Search on Valid".
    """
    check_choice(method, "method", METHODS)
    name = named_list(model, layers)
    depth = len(layers_of(model, name))
    check_range(kept, "kept", 1, depth, f", the layers of {said(model, name)}")
    for number, what in ((top, "top"), (width, "width"), (trials, "trials")):
        check_count(number, what, 1)
    given: dict[str, Any] = {
        "share_prefixes": share_prefixes,
        "max_bytes": check_count(max_bytes, "max_bytes", 0),
        "resume": None if resume is None else Path(resume),
        "progress": progress,
    }
    if method == "exhaustive" and math.comb(depth, kept) > MOST_SUBSETS:
        raise ValueError(
            f"{kept} of {depth} layers are {math.comb(depth, kept):,} subsets, expected at most {MOST_SUBSETS:,} for "
            '"exhaustive": choose "greedy", "beam" or "random"'
        )
    scores = Scores(model, name, evaluate, **given)
    baseline = tuple(every_other(depth, kept=kept))
    if method == "exhaustive":
        found = scores.of(combinations(range(depth), kept), f"{kept} of {depth}")
    elif method == "random":
        found = scores.of(random_subsets(range(depth), kept, trials, seed), f"{kept} of {depth}")
    else:
        found = _eliminate(scores, depth, kept, width if method == "beam" else 1)
    best = sorted(found, key=lambda subset: _order(found[subset], subset))
    if not math.isfinite(found[best[0]]):
        raise ValueError(f"the best of {len(found)} candidates scores {found[best[0]]}, expected a finite number")
    value = scores.of([baseline], "every other")[baseline]
    scores.forget_states()
    others: dict[Subset, float] = {}
    if held_out is not None:
        judge = Scores(model, name, held_out, kind="held_out", **given)
        others = judge.of([*best[:top], baseline], "held out")
    return SearchResult(
        [Scored(list(subset), found[subset], others.get(subset)) for subset in best],
        Scored(list(baseline), value, others.get(baseline)),
        scores.layers_run,
        scores.layers_asked,
    )


def _eliminate(scores: Scores, depth: int, kept: int, width: int) -> dict[Subset, float]:
    """The scores of the last round: round by round without one more layer, from the ``width`` best."""
    beam = [tuple(range(depth))]
    found = scores.of(beam) if depth == kept else {}
    while len(beam[0]) > kept:
        found = scores.of(set(_without_one(beam)), f"{len(beam[0]) - 1} of {depth}")
        beam = sorted(found, key=lambda subset: _order(found[subset], subset))[:width]
    return found


def _without_one(subsets: list[Subset]) -> Iterator[Subset]:
    for subset in subsets:
        for place in range(len(subset)):
            yield subset[:place] + subset[place + 1 :]


def _order(value: float, subset: Subset) -> tuple[bool, float, Subset]:
    """Best first; what is no number last."""
    return math.isnan(value), value, subset


def _cells(row: Scored, held_out: bool) -> list[str]:
    values = [row.value, *([row.held_out] if held_out else [])]
    return [*("" if value is None else f"{value:.4f}" for value in values), " ".join(map(str, row.keep))]
