"""The "Every Other" strategy: which layers to keep, from the depth alone."""

from __future__ import annotations

from layerdrop_fast._checks import check_count, check_range, check_rate


def every_other(num_layers: int, *, kept: int | None = None, p: float | None = None) -> list[int]:
    """The layers that stay when a network is cut to a smaller depth at even distances.

    With ``kept=r`` the layers ``floor(i * N / r)`` for i = 0 .. r - 1. With ``p = 1/k`` the paper's rule, which drops
    layer d, counted from 1, where ``d = 0 (mod k)``; other p keep ``r = round((1 - p) * N)`` layers as above. The
    paper's ``floor(1/p)`` drops every layer for p > 1/2 and too many for p between 1/3 and 1/2, which is why its
    formula serves p = 1/k only. 16 to 8 is 0, 2, ..., 14 by both.

    Args:
        num_layers: N, at least 1.
        kept: r, the number of layers to keep, 0 to N.
        p: the share of layers to drop, in [0, 1]. Exactly one of ``kept`` and ``p`` is given.

    Returns:
        Sorted 0-based indices.

    Raises:
        ValueError: a number out of range; both or neither of ``kept`` and ``p``.
        TypeError: a number of another kind.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3.
    """
    num_layers = check_count(num_layers, "num_layers", 1)
    if (kept is None) == (p is None):
        raise ValueError(f"got kept={kept} and p={p}, expected exactly one of them")
    if p is not None:
        check_rate(p, "share of layers to drop p")
        period = round(1 / p) if p > 0 else 0
        # 1/k as a float; 1e-9 admits 0.3333333333 and no rate that anyone would tell from 1/k.
        if period and abs(p * period - 1) < 1e-9:
            return [layer for layer in range(num_layers) if (layer + 1) % period != 0]
        kept = round((1 - p) * num_layers)
    assert kept is not None  # one of the two was given
    kept = check_range(kept, "kept", 0, num_layers)
    return [i * num_layers // kept for i in range(kept)]
