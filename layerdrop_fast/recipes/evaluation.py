"""Validation bits per byte, of a whole model and of what Every Other leaves of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import every_other, extract
from layerdrop_fast.recipes.training import Stopped

ROWS_AT_ONCE = 64


@torch.no_grad()
def bits_per_byte(model: nn.Module, scored: npt.NDArray[np.int64]) -> float:
    """Mean bits per byte on windows [K, T], each byte but a window's first given those before it in the window."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    predicted = scored.shape[0] * (scored.shape[1] - 1)
    for rows in torch.from_numpy(scored).split(ROWS_AT_ONCE):
        tokens = rows.to(device)
        logits = model(tokens[:, :-1]).flatten(0, 1)
        total += F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
    return float(total / predicted / math.log(2))


def depth_curve(
    model: TransformerLM,
    scored: npt.NDArray[np.int64],
    depths: Sequence[int] | None = None,
    *,
    on_depth: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, float]:
    """Validation bits per byte after a cut to each depth by Every Other, without retraining.

    Args:
        model: the trained model; it is left as it is.
        scored: int64 [K, T], the windows to score on.
        depths: numbers of layers to keep, or None for all from the full depth to 1.
        on_depth: called with each depth and its bits per byte.
        should_stop: asked before each depth.

    Raises:
        Stopped: ``should_stop`` said so.

    Source: Fan, Grave, Joulin 2019, figure 2.
    """
    num_layers = len(model.stack.layers)
    curve: dict[int, float] = {}
    for depth in range(num_layers, 0, -1) if depths is None else depths:
        if should_stop():
            raise Stopped
        curve[depth] = bits_per_byte(extract(model, every_other(num_layers, kept=depth)), scored)
        if on_depth is not None:
            on_depth(depth, curve[depth])
    return curve
