"""What the demo found: as text, plots and one self-contained page. Every sentence is computed from the metrics."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics: TypeAlias = dict[str, Any]

TITLES = {"dense": "dense", "layerdrop": "LayerDrop"}
COLOURS = {"dense": "#8a8f98", "layerdrop": "#c2410c"}
WANTED_BELOW_BIGRAM = 0.15  # what "clearly learned" means
# Differences below this are called equal: by so much two seeds differ on average in docs/demo-recipe.md.
EQUAL_BITS = 0.03


def introduction(metrics: Metrics) -> str:
    """What is about to happen, in a few lines."""
    text, settings = metrics["text"], metrics["settings"]
    steps = {name: settings[name]["steps"] for name in TITLES}
    return (
        f"Text: {text['name']}, {text['train_bytes']:,} bytes to learn from; validation on {text['scored_bytes']:,} "
        "others.\n"
        f"Two {settings['layers']}-layer byte-level models at the same work, counted in layers run: dense for "
        f"{steps['dense']:,} steps, LayerDrop for {steps['layerdrop']:,}.\n"
        f"On {metrics['machine']}, threads: {metrics['threads']}. Loss is in bits/byte."
    )


def curve_of(metrics: Metrics, name: str) -> dict[int, float]:
    """Bits per byte of a model by depth, from the full depth down."""
    return {int(depth): bits for depth, bits in metrics["models"][name]["bits_per_byte"].items()}


def findings(metrics: Metrics) -> list[str]:
    """What is seen, favourable or not, one sentence each."""
    bigram = metrics["text"]["bigram_bits_per_byte"]
    dense, layerdrop = curve_of(metrics, "dense"), curve_of(metrics, "layerdrop")
    full = max(dense)
    found = [
        _learning(TITLES[name], curve[full], bigram) for name, curve in (("dense", dense), ("layerdrop", layerdrop))
    ]
    found += [_work(metrics), _time(metrics)]
    found.append(_full_depth(dense[full], layerdrop[full], full))
    found.append(_ranges(dense, layerdrop))
    if full >= 2:
        half = full // 2
        found.append(
            f"Cut to half ({half} of {full} layers), dense loses {dense[half] - dense[full]:.2f} bits/byte, LayerDrop "
            f"{layerdrop[half] - layerdrop[full]:.2f}; that leaves {dense[half]:.3f} and "
            f"{layerdrop[half]:.3f}."
        )
    shallowest = {
        name: _shallowest_below(curve, bigram) for name, curve in (("dense", dense), ("LayerDrop", layerdrop))
    }
    found.append(
        "Fewest layers that still beat the bigram model: "
        + ", ".join(f"{name} {depth if depth else 'none'}" for name, depth in shallowest.items())
        + "."
    )
    return found


def _learning(title: str, bits: float, bigram: float) -> str:
    below = 1 - bits / bigram if bigram > 0 else 0.0
    judged = "" if below >= WANTED_BELOW_BIGRAM else f": short of the {WANTED_BELOW_BIGRAM:.0%} that it should reach"
    side = f"{below:.0%} below" if below >= 0 else f"{-below:.0%} above"
    return (
        f"{title[0].upper()}{title[1:]} reaches {bits:.3f} bits/byte, {side} the bigram model's {bigram:.3f}{judged}."
    )


def _work(metrics: Metrics) -> str:
    dense, layerdrop = metrics["models"]["dense"], metrics["models"]["layerdrop"]
    return (
        f"Work: dense ran {dense['layers_run']:,.0f} layers in {dense['steps']:,} steps, LayerDrop "
        f"{layerdrop['layers_run']:,.0f} in {layerdrop['steps']:,}: "
        f"{layerdrop['layers_run'] / dense['layers_run']:.1%} of dense's work, "
        f"{layerdrop['share_of_layers_run']:.0%} of its layers a step."
    )


def _time(metrics: Metrics) -> str:
    seconds = metrics["seconds"]
    return (
        f"Time: dense trained for {seconds['train dense']:.0f} s, LayerDrop for {seconds['train layerdrop']:.0f} s; "
        "what a step does besides its layers (embedding, output, optimizer) is not in the count of layers."
    )


def _full_depth(dense: float, layerdrop: float, full: int) -> str:
    difference = layerdrop - dense
    if abs(difference) < EQUAL_BITS:
        return f"With all {full} layers the two are equal within {EQUAL_BITS} bits/byte."
    word = "worse" if difference > 0 else "better"
    return f"With all {full} layers LayerDrop is {abs(difference):.3f} bits/byte {word} than dense."


def _ranges(dense: dict[int, float], layerdrop: dict[int, float]) -> str:
    def verdict(depth: int) -> str:
        difference = layerdrop[depth] - dense[depth]
        return "equal" if abs(difference) < EQUAL_BITS else "dense" if difference > 0 else "LayerDrop"

    parts = []
    for who, group in groupby(sorted(dense), key=verdict):
        depths = list(group)
        span = f"{depths[0]} to {depths[-1]}" if len(depths) > 1 else f"{depths[0]}"
        parts.append(
            f"{span} layer{'' if span == '1' else 's'}: {'about equal' if who == 'equal' else who + ' is better'}"
        )
    return "Cut by Every Other without retraining, " + "; ".join(parts) + "."


def _shallowest_below(curve: dict[int, float], bigram: float) -> int | None:
    return min((depth for depth, bits in curve.items() if bits < bigram), default=None)


def depth_table(metrics: Metrics) -> str:
    """Validation bits per byte by depth, as plain text."""
    dense, layerdrop = curve_of(metrics, "dense"), curve_of(metrics, "layerdrop")
    bigram = metrics["text"]["bigram_bits_per_byte"]
    lines = [
        "Validation bits/byte after a cut by Every Other, no retraining",
        "layers   dense   LayerDrop   difference",
    ]
    lines += [f"{d:6d}  {dense[d]:6.3f}   {layerdrop[d]:9.3f}   {layerdrop[d] - dense[d]:+10.3f}" for d in dense]
    return "\n".join([*lines, f"bigram  {bigram:6.3f}"])


def summary(metrics: Metrics, price: str | None) -> str:
    """Table, findings and prices for the terminal."""
    parts = ["", depth_table(metrics), "", *(f"- {sentence}" for sentence in findings(metrics))]
    return "\n".join([*parts, "", price] if price else parts)


def files(metrics: Metrics, price: str | None) -> dict[str, bytes]:
    """The plots and the page, by file name."""
    plots = {"depth.png": _plot(metrics, _depth_axes), "training.png": _plot(metrics, _training_axes)}
    return {**plots, "report.html": _page(metrics, plots, price).encode()}


def _plot(metrics: Metrics, draw: Callable[[Axes, Metrics], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, metrics)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1.0, edgecolor="none")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _depth_axes(axes: Axes, metrics: Metrics) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, title in TITLES.items():
        curve = curve_of(metrics, name)
        axes.plot(list(curve), list(curve.values()), "o-", color=COLOURS[name], label=title)
    bigram = metrics["text"]["bigram_bits_per_byte"]
    axes.axhline(bigram, color="black", linestyle="--", linewidth=1, label="bigram model")
    every = [bits for name in TITLES for bits in curve_of(metrics, name).values()]
    # A cut to one layer can be far off, and would flatten everything else.
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * max(bigram, min(every))))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers kept (Every Other, no retraining)")
    axes.set_ylabel("validation bits/byte")


def _training_axes(axes: Axes, metrics: Metrics) -> None:
    for name, title in TITLES.items():
        entry = metrics["models"][name]
        work = [step * entry["layers_run"] / entry["steps"] for step, _, _ in entry["training_curve"]]
        axes.plot(work, [bits for _, bits, _ in entry["training_curve"]], color=COLOURS[name], label=title)
    axes.axhline(
        metrics["text"]["bigram_bits_per_byte"], color="black", linestyle="--", linewidth=1, label="bigram (validation)"
    )
    axes.set_xlabel("layers run so far")
    axes.set_ylabel("training bits/byte, with dropped layers")


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem } img { max-width: 100% }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .9rem; text-align: right }
th { border-bottom: 1px solid #ccc } .better { font-weight: 600; color: #c2410c }
.note { color: #57606a; font-size: .9rem }
"""


def _page(metrics: Metrics, plots: dict[str, bytes], price: str | None) -> str:
    def image(name: str, alt: str) -> str:
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(plots[name]).decode()}">'

    introductory = "".join(f"<p>{html.escape(line)}</p>" for line in introduction(metrics).splitlines())
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(metrics))
    prices = f"<h2>The price of a training step</h2><pre>{html.escape(price)}</pre>" if price else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LayerDrop: one training, every depth</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>LayerDrop: one training, every depth</h1>
{introductory}
<h2>What is seen</h2><ul>{items}</ul>
<h2>Bits per byte against depth</h2>
<p class="note">Figure 2 of Fan, Grave, Joulin (2019, arXiv 1909.11556) at small scale: both models are cut to every
depth without retraining. Lower is better.</p>
{image("depth.png", "Validation bits per byte against the number of layers kept")}
{_rows(metrics)}
<h2>Training</h2>
<p class="note">LayerDrop's loss is that of the thinned network of each step; its validation loss is that of all
layers.</p>
{image("training.png", "Training bits per byte against layers run")}
{prices}
<h2>How it was made</h2>{_settings(metrics)}
</body></html>
"""


def _rows(metrics: Metrics) -> str:
    dense, layerdrop = curve_of(metrics, "dense"), curve_of(metrics, "layerdrop")
    rows = []
    for depth in dense:
        best = min(dense[depth], layerdrop[depth])
        cells = (f"<td{_mark(bits == best)}>{bits:.3f}</td>" for bits in (dense[depth], layerdrop[depth]))
        rows.append(f"<tr><td>{depth}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>layers</th><th>dense</th><th>LayerDrop</th></tr>{''.join(rows)}</table>"


def _mark(better: bool) -> str:
    return ' class="better"' if better else ""


def _settings(metrics: Metrics) -> str:
    settings = metrics["settings"]
    lines = []
    for name, title in TITLES.items():
        entry = metrics["models"][name]
        lines.append(f"{title}: {entry['schedule']}, scale {entry['scale']}, sampling {entry['sampling']}")
    shared = ("d_model", "nhead", "dim_feedforward", "context", "batch", "learning_rate", "weight_decay", "seed")
    lines.append(", ".join(f"{key} {settings['dense'][key]}" for key in shared))
    lines.append(", ".join(f"{key} {settings[key]}" for key in ("layerdrop_fast", "torch", "numpy", "device")))
    lines.append(f"{metrics['machine']}, threads: {metrics['threads']}")
    lines.append(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in metrics["seconds"].items()))
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
