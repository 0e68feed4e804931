"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layerdrop_fast._checks import check_count, check_rate


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen: of the ``top_k`` likeliest, the likeliest that make up ``top_p``, at a temperature.

    Shapes:
        logits: [B, vocab_size] -> int64 [B]

    Args:
        temperature: divides the logits, at least 0; 0 takes the likeliest token and draws nothing.
        top_k: at least 1; more than there are is all; None: all.
        top_p: in (0, 1]; the likeliest token always stays; None: all.
        generator: draws, torch's own if None.

    Raises:
        ValueError: a number out of range. TypeError: one of another kind.

    Source: Fan, Lewis, Dauphin 2018 (top k); Holtzman et al. 2020 (top p).

    Randomness: one ``torch.multinomial`` a call, at a temperature above 0.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float):
            raise TypeError(f"temperature must be a number, got {type(self.temperature).__name__}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected a finite number of at least 0")
        if self.top_k is not None:
            check_count(self.top_k, "top_k", 1)
        if self.top_p is not None and not check_rate(self.top_p, "top_p") > 0:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]")

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        # Differences from the largest stay finite however small the temperature is.
        logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # By place and not by value, so that of equal logits exactly k stay.
            places = logits.topk(self.top_k).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, places, logits.gather(-1, places))
        chances = logits.softmax(-1)
        if self.top_p is not None:
            ordered, places = chances.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            chances = torch.zeros_like(chances).scatter(-1, places, ordered.where(before < self.top_p, 0.0))
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0]
