"""What a network is worth at every depth: Figure 2 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from layerdrop_fast._checks import check_range
from layerdrop_fast.nn.modes import evaluating
from layerdrop_fast.prune.every_other import every_other
from layerdrop_fast.prune.lists import layers_of, named_list, said
from layerdrop_fast.prune.shared_prefixes import Evaluate, number_from
from layerdrop_fast.prune.skip_layers import skip_layers


class Strategy(Protocol):
    """Which ``kept`` of a number of layers to keep, as ``every_other`` says it."""

    def __call__(self, num_layers: int, *, kept: int) -> Sequence[int]: ...


def pruning_curve(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    depths: Iterable[int] | None = None,
    strategy: Strategy = every_other,
    layers: str | None = None,
    on_depth: Callable[[int, float], None] | None = None,
) -> dict[int, float]:
    """What ``evaluate`` says of the model cut to each depth, without retraining.

    Args:
        model: as for ``extract``; no weight is copied, and it is left as it is, in the mode it was in.
        evaluate: called with the model at each depth, in evaluation mode under ``torch.no_grad()``; returns a number.
        depths: numbers of layers to keep; None: all, from the full depth to 1.
        strategy: ``strategy(L, kept=r)`` says which, ``every_other`` for instance.
        layers: the name of the list of layers; None: the only one.
        on_depth: called with each depth and its number.

    Returns:
        {depth: number}, in the order of ``depths``.

    Raises:
        ValueError: a depth that the model does not have; a strategy that keeps other layers than it has, or another
            number of them. TypeError: ``evaluate`` returns no number.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), figure 2.
    """
    name = named_list(model, layers)
    full = len(layers_of(model, name))
    wanted = list(range(full, 0, -1) if depths is None else depths)
    for depth in wanted:
        check_range(depth, "depth", 1, full, f", the layers of {said(model, name)}")
    keeps = {depth: list(strategy(full, kept=depth)) for depth in wanted}
    for depth, keep in keeps.items():
        if len(keep) != depth:
            raise ValueError(f"the strategy keeps {keep}, expected {depth} of {full} layers")
    curve: dict[int, float] = {}
    for depth in wanted:
        with torch.no_grad(), evaluating(model), skip_layers(model, {name: keeps[depth]}):
            curve[depth] = number_from(evaluate, model)
        if on_depth is not None:
            on_depth(depth, curve[depth])
    return curve
