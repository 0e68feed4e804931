"""Validation bits per token, of a whole model and of what Every Other leaves of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import pruning_curve
from layerdrop_fast.recipes.training import Stopped

TOKENS_AT_ONCE = 4096


@torch.no_grad()
def bits_per_token(model: nn.Module, scored: npt.NDArray[np.int64]) -> float:
    """Mean bits per token on windows [K, T], each token but a window's first given those before it in the window."""
    assert isinstance(model, TransformerLM)
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for rows in torch.from_numpy(scored).split(max(1, TOKENS_AT_ONCE // (scored.shape[1] - 1))):
        tokens = rows.to(device)
        total += float(model.loss(tokens[:, :-1], tokens[:, 1:], per_sample=True).double().sum())
    return total / len(scored) / math.log(2)


def depth_curve(
    model: TransformerLM,
    scored: npt.NDArray[np.int64],
    depths: Sequence[int] | None = None,
    *,
    on_depth: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, float]:
    """Validation bits per token after a cut to each depth by Every Other, without retraining.

    Args:
        model: the trained model; it is left as it is.
        scored: int64 [K, T], the windows to score on.
        depths: numbers of layers to keep, or None for all from the full depth to 1.
        on_depth: called with each depth and its bits per token.
        should_stop: asked before each depth.

    Raises:
        Stopped: ``should_stop`` said so.

    Source: Fan, Grave, Joulin 2019, figure 2.
    """

    def evaluate(model: nn.Module) -> float:
        if should_stop():
            raise Stopped
        return bits_per_token(model, scored)

    return pruning_curve(model, evaluate, depths=depths, on_depth=on_depth)
