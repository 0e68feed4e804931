"""Figures 2 and 5 of the paper, drawn from one's own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from layerdrop_fast.prune.importance import Importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# {depth: value}, or {depth: values of several seeds}.
Curve: TypeAlias = "Mapping[int, float] | Mapping[int, Sequence[float]]"


def plot_curves(curves: Mapping[str, Curve], axes: Axes | None = None) -> Axes:
    """What models are worth at every depth (``pruning_curve``), one line each.

    Args:
        curves: by what the legend calls them; of several seeds the mean, with their standard deviation as bars.
        axes: matplotlib's, to draw into; None: those of a new figure, which ``.figure.savefig(path)`` writes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install 'layerdrop_fast[demo]'``). TypeError: a curve
            without a name.
    """
    from matplotlib.ticker import MaxNLocator

    for name, curve in curves.items():
        if not isinstance(curve, Mapping):
            raise TypeError(f"curves[{name!r}] is a {type(curve).__name__}, expected {{name: {{depth: value}}}}")
    axes = _new_axes() if axes is None else axes
    for name, curve in curves.items():
        depths = sorted(curve)
        seeds = [np.atleast_1d(np.asarray(curve[depth], dtype=np.float64)) for depth in depths]
        spread = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in seeds]
        axes.errorbar(
            depths,
            [values.mean() for values in seeds],
            spread if any(spread) else None,
            fmt="o-",
            ms=4,
            lw=1.3,
            capsize=2,
            label=name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers kept, without retraining")
    _finish(axes)
    return axes


def plot_importance(importances: Mapping[str, Importance], axes: Axes | None = None) -> Axes:
    """The mean value of sub-networks without each layer (``layer_importance``), with its standard error.

    Args, Raises: as ``plot_curves``.
    """
    from matplotlib.ticker import MaxNLocator

    if not isinstance(importances, Mapping):
        raise TypeError(f"importances is an {type(importances).__name__}, expected {{name: Importance}}")
    axes = _new_axes() if axes is None else axes
    for name, found in importances.items():
        axes.errorbar(
            range(len(found.means)), found.means, found.standard_errors, fmt="o-", ms=4, lw=1.3, capsize=2, label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer that is left out")
    _finish(axes)
    return axes


def _new_axes() -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1.0, edgecolor="none")
