"""What the experiments found, as Markdown tables and plots; every number is computed from the results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from layerdrop_fast.prune import Importance, plot_curves, plot_importance
from layerdrop_fast.recipes.experiments.runs import NETWORKS
from layerdrop_fast.recipes.files import RecipeError

Results = Sequence[dict[str, Any]]

PLOTS = {
    "depth.png": ("dense", "layers 0.2", "layers 0.5"),
    "recipe.png": ("dense", "uniform 0.15, equal work", "2026 recipe, equal work"),
}
SHOWN = (16, 12, 9, 8, 6, 4, 2)


def comparable(results: Results) -> Results:
    """The same.

    Raises:
        RecipeError: there are none, or they are of several texts or numbers of steps.
    """
    try:
        texts = {(result["text"]["name"], result["text"]["sha256"], result["steps"]) for result in results}
    except (KeyError, TypeError) as error:
        raise RecipeError(f"got a result without {error}, expected those of experiments") from error
    if len(texts) != 1:
        kinds = sorted(f"{name} ({sha256[:8]}), {steps:,} steps" for name, sha256, steps in texts)
        raise RecipeError(f"got results of {kinds}, expected those of one text and number of steps")
    return results


def tables(results: Results) -> str:
    """All tables, in Markdown: mean and standard deviation over seeds, in validation bits per byte."""
    found = [_title("At every depth, by Every Other, without retraining"), _depths(results)]
    if rows := _strategies(results):
        found += [_title("Half of the layers, by strategy"), rows]
    if rows := _halves(results):
        found += [_title("Every half of the layers, one seed"), rows]
    if rows := _parts(results):
        found += [_title("With half of its parts taken out"), rows]
    return "\n\n".join(found)


def plots(results: Results) -> dict[str, bytes]:
    """The plots that the results have something for, by file name."""
    found = {}
    bigram = fmean(result["bigram"] for result in results)
    for file, networks in PLOTS.items():
        curves = {name: _curve(results, name) for name in networks if _of(results, name)}
        if set(curves) - {"dense"}:
            axes = plot_curves(curves)
            axes.set_ylabel("validation bits/byte")
            axes.axhline(bigram, color="black", linestyle="--", linewidth=1, label="bigram model")
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.5 * bigram))  # a cut to one layer flattens everything else
            axes.legend(framealpha=1.0, edgecolor="none")
            found[file] = _png(axes.figure)
    measured = [result for result in results if "importance" in result]
    if measured:
        axes = plot_importance({name: _importance(of) for name in NETWORKS if (of := _of(measured, name))})
        axes.set_ylabel("validation bits/byte of random halves without the layer")
        found["importance.png"] = _png(axes.figure)
    return found


def _importance(runs: Results) -> Importance:
    """The sub-networks of all seeds."""
    by_layer = zip(*(run["importance"]["values"] for run in runs), strict=True)
    rows = [[value for values in of_seeds for value in values] for of_seeds in by_layer]
    padded = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return Importance(runs[0]["importance"]["kept"], padded)


def _depths(results: Results) -> str:
    depths = [depth for depth in SHOWN if all(str(depth) in result["curve"] for result in results)]
    rows = []
    for name in NETWORKS:
        if runs := _of(results, name):
            share = fmean(run["share_of_layers_run"] for run in runs)
            cells = [_cell([run["curve"][str(depth)] for run in runs]) for depth in depths]
            rows.append([name, f"{len(runs)}", f"{runs[0]['settings']['steps']:,}", f"{share:.0%}", *cells])
    return _table(["network", "seeds", "steps", "layers run", *(f"{depth} layers" for depth in depths)], rows)


def _strategies(results: Results) -> str | None:
    runs = [result for result in results if "strategies" in result]
    columns = list(dict.fromkeys(name for run in runs for name in run["strategies"]))
    rows = []
    for name in NETWORKS:
        if of := _of(runs, name):
            cells = [
                _cell([run["strategies"][column]["bits"] for run in of]) if column in of[0]["strategies"] else ""
                for column in columns
            ]
            chosen = fmean(run["strategies"]["every other"]["bits"] - run["strategies"]["search"]["bits"] for run in of)
            rows.append([name, *cells, f"{chosen:+.3f}"])
    return _table(["network", *columns, "gain of search"], rows) if rows else None


def _halves(results: Results) -> str | None:
    rows = []
    for name in NETWORKS:
        for run in _of([result for result in results if "halves" in result], name):
            halves = run["halves"]
            best, other = halves["best"], halves["every other"]
            searched = (best["value"], other["value"], halves["median"], halves["worst"])
            judged = (best["held_out"], other["held_out"])
            cells = [f"{bits:.3f}" for bits in (*searched, *judged)]
            rank = f"{other['rank']:,} of {halves['candidates']:,}"
            ran = f"{halves['layers_run']:,} of {halves['layers_asked']:,}"
            missed = _missed(halves["without"]) if "without" in halves else ""
            rows.append([name, *cells[:2], rank, *cells[2:], missed, ran])
    titles = ["network", "best", "every other", "its rank", "median", "worst"]
    titles += ["best, held out", "every other, held out", "layers missed most", "layers run"]
    return _table(titles, rows) if rows else None


def _missed(without: Sequence[float], most: int = 3) -> str:
    """The layers without which halves are worst on average, and by how much those are worse than all halves are."""
    mean = fmean(without)
    layers = sorted(range(len(without)), key=lambda layer: -without[layer])[:most]
    return ", ".join(f"{layer} ({without[layer] - mean:+.3f})" for layer in layers)


def _parts(results: Results) -> str | None:
    runs = [result for result in results if "parts" in result]
    columns = list(dict.fromkeys(name for run in runs for name in run["parts"]))
    rows = [
        [name, *(_cell([run["parts"][column] for run in of]) for column in columns)]
        for name in NETWORKS
        if (of := _of(runs, name))
    ]
    return _table(["trained with", *columns], rows) if rows else None


def _of(results: Results, name: str) -> list[dict[str, Any]]:
    return sorted((result for result in results if result["network"] == name), key=lambda result: int(result["seed"]))


def _curve(results: Results, name: str) -> dict[int, list[float]]:
    runs = _of(results, name)
    return {int(depth): [run["curve"][depth] for run in runs] for depth in runs[0]["curve"]}


def _cell(seeds: Sequence[float]) -> str:
    spread = f" ± {stdev(seeds):.3f}" if len(seeds) > 1 else ""
    return f"{fmean(seeds):.3f}{spread}"


def _title(text: str) -> str:
    return f"**{text}**"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "--:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
