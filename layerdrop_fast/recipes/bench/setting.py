"""What is measured: a model, a batch, a drop rate."""

from __future__ import annotations

import dataclasses

import torch

from layerdrop_fast._checks import check_choice, check_count, check_rate
from layerdrop_fast.nn.stack import GRANULARITIES
from layerdrop_fast.plan import DropPlan, draw_plan
from layerdrop_fast.schedule import DropSchedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training step: forward, mean squared error, backward, fused AdamW.

    The model is ``layers`` of torch's pre-norm TransformerEncoderLayer with dropout behind both branches, weights and
    stream in ``dtype``.

    Raises:
        ValueError, TypeError: a number out of range, or of another kind.
    """

    layers: int = 40
    d_model: int = 256
    dim_feedforward: int = 1024
    nhead: int = 4
    samples: int = 16
    length: int = 128
    dropout: float = 0.1
    p: float = 0.5
    granularity: str = "batch"
    dtype: str = "float32"
    compiled: bool = False  # each layer by torch.compile
    device: str = "cpu"
    seed: int = 0  # of weights, data, dropout and plans

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "dim_feedforward", "nhead", "samples", "length"):
            check_count(getattr(self, name), name, 1)
        if self.d_model % self.nhead:
            raise ValueError(f"d_model is {self.d_model}, expected a multiple of nhead, {self.nhead}")
        check_rate(self.dropout, "dropout")
        check_rate(self.p, "drop rate p")
        check_choice(self.granularity, "granularity", GRANULARITIES)
        check_choice(self.dtype, "dtype", tuple(DTYPES))

    def plan(self, turn: int) -> DropPlan:
        """The plan of turn number ``turn``, by systematic sampling: turns differ by at most one layer, or one sample of
        each layer, so that the spread of what is measured is the machine's."""
        samples = self.samples if self.granularity == "sample" else None
        rates = DropSchedule.of(self.p, self.layers)(turn)
        return draw_plan(rates, samples, seed=self.seed, step=turn, sampling="systematic")

    def title(self) -> str:
        """In words."""
        return (
            f"{self.layers} layers, d {self.d_model}, FFN {self.dim_feedforward}, {self.nhead} heads, "
            f"{self.samples} x {self.length} tokens, {self.dtype}, dropout {self.dropout:g}, p = {self.p:g} by "
            f"{self.granularity}{', compiled' if self.compiled else ''}"
        )
