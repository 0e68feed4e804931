"""How much a layer is missed: Figure 5 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from layerdrop_fast._checks import check_count, check_range
from layerdrop_fast.prune.lists import layers_of, named_list, said
from layerdrop_fast.prune.scores import Scores
from layerdrop_fast.prune.shared_prefixes import Evaluate
from layerdrop_fast.prune.subsets import balanced_subsets
from layerdrop_fast.schedule import FloatArray


@dataclass(frozen=True)
class Importance:
    """What evaluating says of sub-networks without a layer, for each layer.

    Attributes:
        kept: layers of a sub-network.
        values: float64 [L, samples], NaN where there are fewer sub-networks.
    """

    kept: int
    values: FloatArray

    @property
    def means(self) -> FloatArray:
        """float64 [L]; where the number is a loss, a layer that matters has a large one."""
        return np.nanmean(self.values, axis=1)  # type: ignore[no-any-return]

    @property
    def standard_errors(self) -> FloatArray:
        """Of the means, float64 [L], as if sub-networks were independent: balanced ones make it smaller than that.

        NaN where there is one sub-network only.
        """
        counts = np.sum(~np.isnan(self.values), axis=1)
        return np.nanstd(self.values, axis=1) / np.sqrt(np.where(counts > 1, counts - 1, np.nan))  # type: ignore[no-any-return]


def layer_importance(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    kept: int,
    samples: int = 20,
    layers: str | None = None,
    seed: int = 0,
    share_prefixes: bool = True,
    max_bytes: int = 1 << 30,
    resume: Path | str | None = None,
    progress: bool = False,
) -> Importance:
    """The mean value of random sub-networks of ``kept`` layers that lack layer l, for each l.

    The paper's figure has 16 layers, 8 kept, and 20 sub-networks a layer. Here the sub-networks without layer l have
    each other layer equally often, give or take one. Independent ones do not: where 5 of 20 have a layer that matters,
    and not 11, it is layer l that seems to be missed.

    Args:
        model, evaluate, layers, share_prefixes, max_bytes, resume, progress: as for ``search``.
        kept: layers of a sub-network, 1 to L - 1.
        samples: sub-networks a layer, all different; fewer where there are not as many.

    Raises:
        ValueError, TypeError: as ``search``; a value that is infinite or no number, which has no place in a mean.

    Randomness: the sub-networks without layer l come from numpy's PCG64 with ``[seed, l]``.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), figure 5.
    """
    name = named_list(model, layers)
    depth = len(layers_of(model, name))
    check_range(kept, "kept", 1, depth - 1, f", less than the layers of {said(model, name)}")
    check_count(samples, "samples", 1)
    scores = Scores(
        model,
        name,
        evaluate,
        share_prefixes=share_prefixes,
        max_bytes=check_count(max_bytes, "max_bytes", 0),
        resume=None if resume is None else Path(resume),
        progress=progress,
    )
    drawn = [
        balanced_subsets([other for other in range(depth) if other != layer], kept, samples, [seed, layer])
        for layer in range(depth)
    ]
    found = scores.of((subset for subsets in drawn for subset in subsets), "importance")
    for subset, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the layers {list(subset)} of {said(model, name)} score {value}, expected a finite number"
            )
    values = np.full((depth, samples), np.nan)
    for layer, subsets in enumerate(drawn):
        values[layer, : len(subsets)] = [found[subset] for subset in subsets]
    return Importance(kept, values)
