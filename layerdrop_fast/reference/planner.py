"""The host planner in Python: what the C++ module does, for installs without it."""

import numpy as np
import numpy.typing as npt
import torch

from layerdrop_fast.reference.draw_plan import draw_plan


def _signed(word: int) -> int:
    """The 64 bits of an unsigned integer as torch holds them."""
    return word - (1 << 64) if word >> 63 else word


def draw_keep(
    rates: npt.NDArray[np.float64],  # [L]
    batch_size: int | None,  # B, or None for batch granularity
    seed: int,  # these three in [0, 2**64)
    step: int,
    stream: int,
    systematic: bool,
    min_kept: int,
) -> npt.NDArray[np.bool_] | None:  # [L, B], or None when a rate lies outside [0, 1]
    if not ((rates >= 0.0) & (rates <= 1.0)).all():
        return None
    counters = torch.tensor([_signed(seed), _signed(step), _signed(stream)], device="cpu")
    # A copy, since torch warns about read-only arrays.
    keep = draw_plan(counters, torch.from_numpy(rates.copy()), batch_size, systematic, min_kept)[0]
    return keep.numpy()


def kept_layers(keep: npt.NDArray[np.bool_]) -> list[int]:
    """Layers that are kept for any sample."""
    return np.flatnonzero(keep.any(axis=1)).tolist()  # type: ignore[no-any-return]


def compact_rows(keep: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Indices of the kept samples, ascending, padded with -1: rows [L, B]; how many there are: kept [L]."""
    kept = keep.sum(axis=1, dtype=np.int64)
    order = np.argsort(~keep, axis=1, kind="stable")
    return np.where(np.arange(keep.shape[1]) < kept[:, None], order, -1).astype(np.int32), kept


def compact_slot(keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Each sample's place among the kept ones of its layer, or -1: slot [L, B]."""
    return np.where(keep, keep.cumsum(axis=1) - 1, -1).astype(np.int32)
