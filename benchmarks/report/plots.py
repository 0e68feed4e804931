"""The plots: a colour a way, the same in all of them, names beside the lines."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from benchmarks.report.drawing import COLOURS, DASHES, Name, colour_of, draw_lines, ends, in_words, log, write_names
from benchmarks.report.read import Contest, Results
from benchmarks.test_memory import BOUNDS
from benchmarks.test_step import RATES
from layerdrop_fast.recipes.bench.measure import Figures

MIB = 2**20
COURSES = ("masked", "skip", "ours", "recompute", "max_kept=5", "limit")


def _milliseconds(found: Figures) -> float:
    return 1e3 * found.median_s


def _saved(found: Figures) -> float:
    return found.saved_bytes / MIB


def _peak(found: Figures) -> float:
    return found.peak_bytes / MIB


TIME_AND_SAVED = ((_milliseconds, "step, ms"), (_saved, "saved for backward, MiB"))


@dataclass(frozen=True)
class Drawn:
    """Whose figures a plot shows, and what is to be written where."""

    contests: list[Contest]
    names: list[tuple[Axes, list[Name]]]


@dataclass(frozen=True)
class Plot:
    """One file."""

    suite: str
    alt: str
    draw: Callable[[Results, Figure], Drawn | None]  # None: the results do not allow it
    size: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A plot as PNG, and the contests that it shows."""

    png: bytes
    contests: list[Contest]


def plots(results: Results) -> dict[str, Picture]:
    """All plots that the results allow."""
    found = {}
    for name, plot in PLOTS.items():
        figure = Figure(figsize=plot.size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        drawn = plot.draw(results, figure)
        if drawn is None:
            continue
        for axes in figure.axes:
            axes.grid(alpha=0.2, which="major")
            axes.spines[["top", "right"]].set_visible(False)
        figure.draw_without_rendering()  # places the axes, and with them the points
        for axes, names in drawn.names:
            write_names(axes, names)
        content = io.BytesIO()
        figure.savefig(content, format="png")
        found[name] = Picture(content.getvalue(), drawn.contests)
    return found


def steps(results: Results, figure: Figure) -> Drawn | None:
    """Time and bytes against p, for the batch and per sample."""
    wanted = {
        granularity: [found for p in RATES if (found := results.step(granularity, p, *_kind(results)))]
        for granularity in ("batch", "sample")
    }
    if not any(wanted.values()):
        return None
    written: list[tuple[Axes, list[Name]]] = []
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (granularity, contests) in enumerate(wanted.items()):
        for row, (value, label) in enumerate(TIME_AND_SAVED):
            axes = panels[row][column]
            lines: dict[str, list[tuple[float, float]]] = {}
            for contest in contests:
                for way, figures in contest.by_way().items():
                    lines.setdefault(way, []).append((figures.setting.p, value(figures)))
            log(axes, "y")
            draw_lines(axes, lines)
            axes.set_xticks(RATES, [f"{p:g}" for p in RATES])
            axes.set_xlim(-0.02, 1.2)  # room for names
            axes.set_title(f"{'time' if row == 0 else 'memory'}, a decision a {_unit(granularity)}", fontsize=10)
            if column == 0:
                axes.set_ylabel(label)
            if row == 1:
                axes.set_xlabel("drop rate p")
            written.append((axes, ends(lines)))
    shown = [contest for contests in wanted.values() for contest in contests]
    figure.suptitle(f"Step against drop rate: {_model(shown[0])}")
    return Drawn(shown, written)


def depth(results: Results, figure: Figure) -> Drawn | None:
    """Time and bytes against the number of layers, of which as many are kept."""
    contest = results.only("depth")
    if contest is None:
        return None
    by_layers, written = contest.by_layers(), []
    panels = figure.subplots(1, 2)
    for axes, value, label in zip(
        panels, (_milliseconds, _saved), ("step, ms", "saved for backward, MiB"), strict=True
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for layers in sorted(by_layers):
            for way, found in by_layers[layers].items():
                lines.setdefault(way, []).append((layers, value(found)))
        log(axes, "x")
        log(axes, "y")
        draw_lines(axes, lines)
        ticks = sorted(by_layers)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.set_xlim(ticks[0] * 0.85, ticks[-1] * 2.4)
        axes.set_xlabel("layers of the model")
        axes.set_ylabel(label)
        written.append((axes, ends(lines)))
    kept = round(median(contest.by_way()["ours" if "ours" in contest.by_way() else "limit"].layers_run))
    figure.suptitle(f"A training step that keeps {kept} layers, against the depth of the model")
    return Drawn([contest], written)


def course(results: Results, figure: Figure) -> Drawn | None:
    """What is allocated while a step runs."""
    contest = results.only("memory")
    if contest is None:
        return None
    axes, names = figure.subplots(), []
    for way in COURSES:
        if way in contest.courses:
            points = contest.courses[way]
            at, held = [1e3 * t for t in points.seconds], [count / MIB for count in points.bytes]
            axes.plot(at, held, color=colour_of(way), linestyle=DASHES.get(way, "-"), linewidth=1.3)
            highest = max(range(len(held)), key=held.__getitem__)
            names.append(Name(at[highest], held[highest], in_words(way), colour_of(way), above=True))
    axes.set_xlabel("since the step began, ms (under the profiler)")
    axes.set_ylabel("held beyond what was there, MiB")
    axes.set_ylim(bottom=0, top=1.06 * axes.get_ylim()[1])
    axes.set_xlim(left=0)
    figure.suptitle(f"Memory over the course of a step: {_model(contest)}")
    return Drawn([contest], [(axes, names)])


def bounds(results: Results, figure: Figure) -> Drawn | None:
    """What max_kept costs and saves."""
    contest = results.only("memory")
    ways = contest.by_way() if contest else {}
    bounded = [(bound, ways[f"max_kept={bound}"]) for bound in sorted(BOUNDS) if f"max_kept={bound}" in ways]
    if contest is None or not bounded:
        return None
    panels, written = figure.subplots(1, 2), []
    for axes, value, label in zip(panels, (_peak, _milliseconds), ("peak of a step, MiB", "step, ms"), strict=True):
        points = [(bound, value(found)) for bound, found in bounded]
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["ours"], linewidth=1.6, markersize=4)
        names = [Name(*points[-1], "max_kept", COLOURS["ours"])]
        for way, word in (("ours", "ours, no bound"), ("skip", "skip")):
            if way in ways:
                level = value(ways[way])
                axes.plot([0, max(BOUNDS)], [level, level], color=COLOURS[way], linestyle="--", linewidth=1)
                names.append(Name(max(BOUNDS), level, word, COLOURS[way]))
        axes.xaxis.set_major_locator(FixedLocator([bound for bound, _ in bounded]))
        axes.set_xlim(0, max(BOUNDS) * 1.6)
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        axes.set_xlabel("max_kept, layers")
        axes.set_ylabel(label)
        written.append((axes, names))
    figure.suptitle(f"Bounded memory: ours under max_kept, {_model(contest)}")
    return Drawn([contest], written)


def recompute(results: Results, figure: Figure) -> Drawn | None:
    """Time against peak bytes, a point a way to trade them."""
    contest = results.only("memory")
    if contest is None:
        return None
    axes, names = figure.subplots(), []
    for way, found in contest.by_way().items():
        if way in ("masked", "limit"):
            continue
        x, y = _milliseconds(found), _peak(found)
        axes.plot(x, y, "o", color=colour_of(way), markersize=6)
        names.append(Name(x, y, in_words(way), colour_of(way)))
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.25 * (high - low))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step, ms")
    axes.set_ylabel("peak of a step, MiB")
    figure.suptitle(f"Memory for time, lower left is better: {_model(contest)}")
    return Drawn([contest], [(axes, names)])


def parts(results: Results, figure: Figure) -> Drawn | None:
    """Time (with quartiles) and bytes of every target against the kept share, as shares of those of the whole."""
    contest = results.only("parts")
    if contest is None or 0.0 not in contest.by_rate():
        return None
    by_rate, written = contest.by_rate(), []
    colours = dict(zip(by_rate[0.0], ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"), strict=True))
    for axes, value, label in zip(
        figure.subplots(1, 2), (_milliseconds, _saved), ("step time", "saved for backward"), strict=True
    ):
        names = []
        for way, colour in colours.items():
            whole = value(by_rate[0.0][way])
            points = [(1 - p, value(ways[way]) / whole) for p, ways in sorted(by_rate.items())]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.4, markersize=3.5)
            if value is _milliseconds:
                for p, ways in by_rate.items():
                    low, _, high = quantiles(ways[way].seconds, n=4, method="inclusive")
                    axes.plot(
                        [1 - p] * 2, [1e3 * low / whole, 1e3 * high / whole], color=colour, linewidth=1.0, alpha=0.6
                    )
            names.append(Name(*points[-1], way, colour))
        axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
        axes.set_xlim(1.02, -0.25)  # room for names
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share that is kept")
        axes.set_ylabel(f"{label} / without dropping")
        axes.set_xticks([1 - p for p in sorted(by_rate)], [f"{1 - p:g}" for p in sorted(by_rate)])
        written.append((axes, names))
    figure.suptitle(f"What each target saves: {_model(contest)}")
    return Drawn([contest], written)


PLOTS = {
    "steps": Plot("step", "Step time and saved bytes of each way against the drop rate", steps, (8.5, 7.5)),
    "depth": Plot("depth", "Step time and saved bytes against depth, the same layers kept", depth, (8.5, 4)),
    "course": Plot("memory", "Memory over the course of a training step", course, (8.5, 4.5)),
    "bounds": Plot("memory", "Peak bytes and step time against max_kept", bounds, (8.5, 4)),
    "recompute": Plot("memory", "Step time against peak bytes of each way to recompute", recompute, (8.5, 4.5)),
    "parts": Plot(
        "parts", "Step time and saved bytes against the kept share of layers, heads, chunks", parts, (8.5, 4)
    ),
}


def _kind(results: Results) -> tuple[str, bool]:
    return ("float32" if results.device == "cpu" else "bfloat16"), False


def _unit(granularity: str) -> str:
    return "layer" if granularity == "batch" else "layer and sample"


def _model(contest: Contest) -> str:
    of = contest.figures[0].setting
    p = f", p = {of.p:g}" if contest.suite == "memory" else ""
    return f"{of.layers} layers, d {of.d_model}, {of.samples} x {of.length} tokens, {of.dtype}{p}"
