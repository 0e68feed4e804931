"""One call of a raw op at a size: its arguments on any device, and the bytes that it cannot do without.

Of a branch, kept samples alone count; a functional op that returns the stream moves all of it, since it copies what it
does not change.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator


@dataclass(frozen=True)
class RowWork:
    """``kept`` of ``samples`` x ``positions`` rows of ``channels`` run a branch, as many, others in part, the next.

    Of ``norm_linear_bwd``, ``samples`` x ``positions`` are the outputs.
    """

    op: str
    samples: int
    positions: int
    channels: int
    dtype: torch.dtype
    kept: int  # of the samples
    dropout_p: float = 0.1
    activation: str = "gelu"

    @property
    def some(self) -> bool:
        return self.kept < self.samples

    def grown(self, least: int) -> "RowWork":
        """With positions doubled until it moves so many bytes."""
        work = self
        while work.moved() < least:
            work = replace(work, positions=2 * work.positions)
        return work

    def rows(self) -> tuple[list[int], list[int]]:
        """Samples of this branch and of the next, evenly spread."""
        every = [b * self.samples // max(self.kept, 1) for b in range(self.kept)]
        return every, sorted((b + 1) % self.samples for b in every)

    def moved(self) -> int:
        """Bytes to read and to write."""
        rows, next_rows = map(set, self.rows())
        b, k, n, either = self.samples, len(rows), len(next_rows), len(rows | next_rows)
        gated = self.activation == "swiglu"
        # In samples: x, y, xhat and their gradients are one each, read or written.
        samples = {
            "gather_norm": 2 * k,
            "gather_norm_bwd": 2 * k + b,
            "scatter_residual": 2 * b + k,
            "scatter_residual_": 3 * k,
            "scatter_residual_bwd": 2 * k,
            "scatter_residual_gather_norm": 2 * b + k + n,
            "scatter_residual_gather_norm_": either + 2 * k + n,
            "scatter_residual_gather_norm_bwd": 2 * b + 2 * n + k,
            "scatter_residual_gather_norm_bwd_": either + 3 * n + k,
            "norm_linear_bwd": 3 * b,
            "act": (3 if gated else 2) * k,
            "act_bwd": (6 if gated else 4) * k,
        }[self.op]
        statistics = (n if "scatter" in self.op else k) if "gather_norm" in self.op else 0
        row = self.channels * self.dtype.itemsize
        return self.positions * (samples * row + statistics * accumulator(self.dtype).itemsize)

    def arguments(self, device: torch.device | str) -> tuple[Any, ...]:
        """Random values; on the meta device none."""

        def values(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        def integers(*numbers: int) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        def stream(samples: int, channels: int = self.channels) -> Tensor:
            return values(samples, self.positions, channels)

        wide = accumulator(self.dtype)
        if self.op == "norm_linear_bwd":
            outputs, vector = self.samples * self.positions, (self.channels,)
            matrices = values(outputs, self.channels), values(outputs, dtype=wide), values(outputs, self.channels)
            return *matrices, values(*vector), values(*vector)
        k = self.kept
        rows, next_rows = (integers(*which) if self.some else None for which in self.rows())
        rstd = values(k, self.positions, dtype=wide).abs()
        mask = (self.dropout_p, *((integers(1, 2, 3, 4), integers(256)[0]) if self.dropout_p else (None, None)))
        scale = torch.full((), 1.25, dtype=wide, device=device)
        norm = {"rms": False, "eps": 1e-5}
        two = self.channels * (2 if self.activation == "swiglu" else 1)
        match self.op.removesuffix("_"):
            case "gather_norm":
                return stream(self.samples), rows, *norm.values()
            case "gather_norm_bwd":
                return stream(k), stream(k), rstd, rows, self.samples, norm["rms"]
            case "scatter_residual":
                return stream(self.samples), stream(k), rows, scale, *mask
            case "scatter_residual_bwd":
                return stream(self.samples), rows, scale, *mask, self.dtype
            case "scatter_residual_gather_norm":
                return stream(self.samples), stream(k), rows, next_rows, scale, *mask, *norm.values()
            case "scatter_residual_gather_norm_bwd":
                given = stream(self.samples), stream(k), stream(k), rstd
                return *given, rows, next_rows, scale, *mask, norm["rms"], self.dtype
            case "act":
                return stream(k, two), rows, self.activation, *mask
            case "act_bwd":
                return stream(k, two), stream(k), rows, self.activation, *mask
        raise ValueError(f"op: got {self.op!r}, expected one of the row ops")
