"""Colours, and names beside points, the same in all plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, which differ for colour-blind eyes too, and a brown and greys; in the order in which they
# cover each other.
COLOURS = {
    "dense": "#999999",
    "masked": "#E69F00",
    "discard": "#A6761D",
    "skip": "#0072B2",
    "sample-skip": "#0072B2",
    "subset": "#56B4E9",
    "stack": "#009E73",
    "ours": "#D55E00",
    "recompute": "#CC79A7",
    "limit": "#000000",
    "narrow": "#666666",
}
DASHES = {"limit": "--", "narrow": ":", "dense": "-."}
IN_WORDS = {"recompute": 'recompute="qkv"', "skip, checkpoints": "skip with checkpoints"}
LABEL = 9  # points


@dataclass(frozen=True)
class Name:
    """What is written beside a point."""

    x: float
    y: float
    text: str
    colour: str
    above: bool = False


def draw_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    """A line a way, ours and the limit on top of the others."""
    order = list(COLOURS)
    for way in sorted(lines, key=lambda way: order.index(way) if way in order else 0):
        ours = way == "ours"
        axes.plot(
            *zip(*lines[way], strict=True),
            color=colour_of(way),
            linestyle=DASHES.get(way, "-"),
            marker="o",
            markersize=4 if ours else 2.5,
            linewidth=2.2 if ours else 1.2,
        )


def ends(lines: dict[str, list[tuple[float, float]]]) -> list[Name]:
    """The names of lines, at their last points."""
    return [Name(*points[-1], in_words(way), colour_of(way)) for way, points in lines.items()]


def write_names(axes: Axes, names: Iterable[Name]) -> None:
    """Names at the right of their points, moved up or down where they would cover each other.

    The figure is laid out before.
    """
    scale = axes.figure.dpi / 72
    height = 1.15 * LABEL * scale
    at = [(name, *axes.transData.transform((name.x, name.y))) for name in sorted(names, key=lambda name: name.y)]
    widths = [0.62 * LABEL * scale * len(name.text) for name, _, _ in at]
    places = [y + 0.8 * height * name.above for name, _, y in at]
    for _ in range(200):
        for lower in range(len(at)):
            for upper in range(lower + 1, len(at)):
                left, right = sorted((lower, upper), key=lambda i: at[i][1])
                apart = at[right][1] - at[left][1] >= widths[left] + 8 * scale
                short = height - (places[upper] - places[lower])
                if not apart and short > 0:
                    places[lower] -= short / 2
                    places[upper] += short / 2
        floor = axes.transAxes.transform((0, 0))[1] + 0.5 * height
        places = [max(place, floor) for place in places]
    for (name, _, y), place in zip(at, places, strict=True):
        moved = (place - y) / scale
        axes.annotate(
            name.text,
            (name.x, name.y),
            xytext=(9, moved),
            textcoords="offset points",
            color=name.colour,
            fontsize=LABEL,
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": name.colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
            if abs(moved) > 2
            else None,
        )


def log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers on it."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def in_words(way: str) -> str:
    return IN_WORDS.get(way, way)


def colour_of(way: str) -> str:
    if way.startswith("max_kept"):
        return "#009E73"
    return COLOURS.get(way, COLOURS["skip"])
