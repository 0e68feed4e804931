"""Adaptive embeddings: frequent tokens have wide vectors, rare ones narrow ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerdrop_fast._checks import check_count


class AdaptiveEmbedding(nn.Module):
    """The embeddings whose tables and projections are those of an adaptive softmax, ``nn.AdaptiveLogSoftmaxWithLoss``.

    Tokens are numbered by falling frequency. Those below the first cutoff have a row of width D in the softmax's head,
    those of band i a row of width d_i = D / 4^i in its tail, which the tail's projection widens:

        embedding(t) = sqrt(D) * W_head[t] @ P,  or  sqrt(D) * W_i[t - first_i] @ P_i

    P is the only parameter of its own. The results of all bands are computed for all tokens and one is chosen, so that
    the device is not asked which tokens there are; the bands beyond the first cost less than a tenth of a layer.

    Shapes:
        tokens: int64 [...] -> [..., D]

    Source: Baevski & Auli 2019 (arXiv 1809.10853), section 3, with tied tables and projections.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.projection = nn.Linear(d_model, d_model, bias=False)

    def forward(self, tokens: Tensor, softmax: nn.AdaptiveLogSoftmaxWithLoss) -> Tensor:
        cutoffs: list[int] = softmax.cutoffs
        found = self.projection(F.embedding(tokens.clamp(max=cutoffs[0] - 1), softmax.head.weight[: cutoffs[0]]))
        for number, ((first, end), tail) in enumerate(zip(pairwise(cutoffs), softmax.tail, strict=True), 1):
            projection, rows = tail[0].weight, tail[1].weight  # type: ignore[index]
            last = number == softmax.n_clusters  # whose end is the vocabulary's: a token beyond it is an error
            band = F.embedding((tokens - first).clamp(0, None if last else end - first - 1), rows) @ projection
            found = torch.where((tokens >= first).unsqueeze(-1), band.to(found.dtype), found)
        # As an embedding's, under autocast too.
        return (found * math.sqrt(softmax.in_features)).to(softmax.head.weight.dtype)  # type: ignore[no-any-return]


def losses(softmax: nn.AdaptiveLogSoftmaxWithLoss, x: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each target, [n], of x [n, D]; in x's weights' dtype, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return -softmax(x.to(softmax.head.weight.dtype), targets).output  # type: ignore[no-any-return]


def check_cutoffs(cutoffs: Sequence[int], vocab_size: int, d_model: int) -> list[int]:
    """Where the bands behind the first begin.

    Raises:
        ValueError: they do not ascend strictly, or leave a band without tokens or without channels. TypeError: no whole
            numbers.
    """
    if not isinstance(cutoffs, Sequence):
        raise TypeError(f"cutoffs: got {type(cutoffs).__name__}, expected whole numbers")
    found = [check_count(cutoff, "cutoff", 1) for cutoff in cutoffs]
    if not found or found != sorted(set(found)) or found[-1] >= vocab_size:
        raise ValueError(f"cutoffs are {found}, expected some that ascend, below the vocabulary's {vocab_size}")
    if d_model < 4 ** len(found):
        raise ValueError(
            f"{len(found)} cutoffs for d_model {d_model}: expected d_model to be at least {4 ** len(found)}, since a "
            "band is 4 times as narrow as the one before"
        )
    return found


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """What marks each position, float32 [length, width]: sines in the first half of the channels, then cosines.

    Channel i of a half has the wave length 2 pi 10000^(i / (width / 2 - 1)).

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / max(half - 1, 1)))
    angles = torch.arange(length)[:, None] * frequencies
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width - 2 * half))
