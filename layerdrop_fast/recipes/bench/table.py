"""Figures as a plain table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.ways import WAYS

# What the others are compared with.
FLOOR = "limit"


def paired(figures: Figures, other: Figures) -> list[float]:
    """How many times as long each step takes as another's of the same turn."""
    return [a / b for a, b in zip(figures.seconds, other.seconds, strict=True)]


def times(figures: Figures, other: Figures) -> float:
    """How many times as long a step takes as another's: the median over pairs of steps of one turn."""
    return median(paired(figures, other))


def table(figures: Mapping[str, Figures]) -> str:
    """A line a way, ratios to the limit behind time and bytes; below it what each way does.

    Args:
        figures: by name, as ``measure`` returns them; with "limit" among them there are ratios.
    """
    return "\n\n".join(filter(None, [rows(figures), notes(figures)]))


def rows(figures: Mapping[str, Figures]) -> str:
    """The lines of the ways alone."""
    floor = figures.get(FLOOR)
    compiled = any(row.compilation for row in figures.values())
    head = ["way", "layers run", "step, ms", "(range)", "/ limit", "tokens/s", "saved, MiB", "/ limit", "peak, MiB"]
    lines = [[*head, "decisions, µs", *(("compiling, s", "graphs") if compiled else ())]]
    lines += [_cells(row, floor, compiled) for row in figures.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(cells, widths) for cells in lines)


def notes(names: Collection[str]) -> str:
    """What each way does, a line a way that there is for everyone."""
    width = max(map(len, names), default=0)
    return "\n".join(f"{name.ljust(width)}  {WAYS[name][0]}" for name in names if name in WAYS)


def _cells(row: Figures, floor: Figures | None, compiled: bool) -> list[str]:
    fewest, most = min(row.layers_run), max(row.layers_run)
    cells = [
        row.way,
        f"{most:g}" if fewest == most else f"{fewest:g}..{most:g}",
        f"{row.median_s * 1e3:.1f}",
        f"({min(row.seconds) * 1e3:.1f}..{max(row.seconds) * 1e3:.1f})",
        "-" if floor is None else f"{times(row, floor):.2f}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.saved_bytes / 2**20:.1f}",
        "-" if floor is None or not floor.saved_bytes else f"{row.saved_bytes / floor.saved_bytes:.2f}",
        f"{row.peak_bytes / 2**20:.1f}",
        "-" if row.decision_s is None else f"{row.decision_s * 1e6:.1f}",
    ]
    if compiled:
        of = row.compilation
        cells += ["-", "-"] if of is None else [f"{of.seconds:.1f}", f"{of.graphs}"]
    return cells


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The name on the left, figures on the right."""
    others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *others])
