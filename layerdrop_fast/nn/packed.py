"""Packed rows: sequences of different lengths behind one another, with no padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerdrop_fast._checks import check_count
from layerdrop_fast.nn.turn import Turn
from layerdrop_fast.plan import to_device


class Packed:
    """Where the tokens of packed sequences stand, here and in the padded batch [B, max_seqlen] of the same sequences.

    Args:
        cu_seqlens: int [B + 1], on the host: sequence b has the tokens from cu_seqlens[b] up to cu_seqlens[b + 1].
        tokens: how many there are.
        max_seqlen: length of the padded batch; None: of the longest sequence. It numbers the elements of dropout masks.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to ``tokens``, or lies on a device, which would have to be waited
            for.
    """

    def __init__(self, cu_seqlens: Tensor | Sequence[int], tokens: int, max_seqlen: int | None) -> None:
        if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"cu_seqlens: got a tensor on {cu_seqlens.device}, expected one on the host: cu_seqlens.cpu()"
            )
        ends = np.asarray(cu_seqlens)
        if ends.dtype.kind not in "iu":
            raise TypeError(f"cu_seqlens: got {ends.tolist()}, expected integers")
        ends = ends.astype(np.int64)
        if ends.ndim != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or (np.diff(ends) < 0).any():
            raise ValueError(f"cu_seqlens: got {ends.tolist()}, expected ascending integers from 0 to {tokens}")
        self.starts, self.lengths = ends[:-1], np.diff(ends)
        longest = int(self.lengths.max())
        if max_seqlen is not None and check_count(max_seqlen, "max_seqlen", 0) < longest:
            raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least {longest}, the longest sequence")
        self.max_seqlen = longest if max_seqlen is None else max_seqlen
        if len(self.lengths) * self.max_seqlen >= 1 << 31:
            raise ValueError(f"{len(self.lengths)} sequences of {self.max_seqlen}: expected less than 2^31 places")

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    def tokens_of(self, samples: Sequence[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The tokens of these sequences, int32 [K]: their places among all tokens, and in the padded batch."""
        lengths = self.lengths[samples]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self.starts[samples], lengths) + within
        padded = np.repeat(np.asarray(samples, dtype=np.int64) * self.max_seqlen, lengths) + within
        return places.astype(np.int32), padded.astype(np.int32)

    def in_tokens(self, turn: Turn) -> Turn:
        """The same forward, with tokens for sequences in ``num_rows``."""
        total = int(self.lengths.sum())
        kept = []
        for unit in turn.kept:
            tokens = total
            if unit.rows is not None and turn.plan is not None:
                tokens = int(self.lengths[turn.plan.kept_samples(unit.unit)].sum())
            kept.append(unit._replace(num_rows=tokens))
        return dataclasses.replace(turn, kept=kept)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [N]: each token's position in its sequence."""
        places = np.arange(self.lengths.sum()) - np.repeat(self.starts, self.lengths)
        return to_device(places, device)
