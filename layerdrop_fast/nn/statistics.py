"""What a stack dropped: counted on the host, never read from a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerdrop_fast.schedule import FloatArray

# Of x's dtype and autocast's, [L, W], as the shares are.
BytesPerToken = Callable[[torch.dtype, torch.dtype | None], FloatArray | None]


@dataclass(frozen=True)
class StackStats:
    """What a stack dropped so far, over all its training forwards since it was made or ``reset_stats`` was called.

    Attributes:
        forwards: training forwards.
        layers_run: layers that ran for at least one sample, summed over forwards.
        layers_skipped: layers that ran for none.
        realized_rates: float64 [L], the share of samples (of forwards, at "batch") that each layer dropped, the mean of
            its branches; a branch with half of its heads or chunks counts as half. NaN before the first forward.
        flops_run: of forward and backward products with the matrices among the layers' parameters, 6 * elements *
            tokens, for x [B, ..., D] and matrices that meet each token once; products of activations with each other
            are not counted.
        flops_skipped: the same of what was dropped.
        bytes_saved: activations that what was dropped would have held for backward; None where the layers are not
            TransformerLayers.
    """

    forwards: int
    layers_run: int
    layers_skipped: int
    realized_rates: FloatArray
    flops_run: float
    flops_skipped: float
    bytes_saved: float | None

    @property
    def share_run(self) -> float:
        """``flops_run`` as a share of both, in [0, 1]; NaN before the first forward."""
        total = self.flops_run + self.flops_skipped
        return self.flops_run / total if total else math.nan


class Statistics:
    """The sums behind ``StackStats``."""

    def __init__(self, num_layers: int) -> None:
        self.forwards = 0
        self.samples = 0
        self.tokens = 0
        self.dtypes: tuple[torch.dtype, torch.dtype | None] = torch.float32, None  # of x, and autocast's
        self.runs = np.zeros(num_layers, dtype=np.int64)
        # [L, W], W as the first forward has it.
        self.samples_run = np.zeros((num_layers, 1), dtype=np.float64)
        self.tokens_run = np.zeros((num_layers, 1), dtype=np.float64)

    def count(self, shares: FloatArray, samples: int, tokens: int, x: Tensor) -> None:
        """Adds a forward of so many samples and tokens of x, of which the layers ran the ``shares`` [L, W].

        W is 1, or a layer's branches where they may run for other samples or in part.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        self.dtypes = x.dtype, torch.get_autocast_dtype(x.device.type) if autocast else None
        self.forwards += 1
        self.samples += samples
        self.tokens += tokens
        self.runs += shares.any(axis=1)
        self.samples_run = self.samples_run + shares * samples
        self.tokens_run = self.tokens_run + shares * tokens

    def of(self, weights: FloatArray, bytes_per_token: BytesPerToken) -> StackStats:
        """The statistics, with the elements of the matrices that ran and that did not, [L, W]."""
        run, skipped = int(self.runs.sum()), self.tokens - self.tokens_run
        held = bytes_per_token(*self.dtypes)
        return StackStats(
            forwards=self.forwards,
            layers_run=run,
            layers_skipped=self.forwards * len(self.runs) - run,
            realized_rates=1.0 - self.samples_run.mean(axis=1) / (self.samples or math.nan),
            flops_run=6.0 * float((weights * self.tokens_run).sum()),
            flops_skipped=6.0 * float((weights * skipped).sum()),
            bytes_saved=None if held is None else float((held * skipped).sum()),
        )
