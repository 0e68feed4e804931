"""plot_curves and plot_importance: what is drawn."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from layerdrop_fast.prune import plot_curves, plot_importance
from layerdrop_fast.prune.importance import Importance


def line_and_bars(container):
    """x, y and the half lengths of the bars; None where there are none."""
    line, _, bars = container
    if not bars:
        return list(line.get_xdata()), list(line.get_ydata()), None
    segments = bars[0].get_segments()
    middle = [(low + high) / 2 for (_, low), (_, high) in segments]
    assert middle == pytest.approx(list(line.get_ydata()))
    return list(line.get_xdata()), list(line.get_ydata()), [(high - low) / 2 for (_, low), (_, high) in segments]


def test_curves_of_one_seed_are_lines_without_bars():
    axes = plot_curves({"p = 0.2": {3: 1.0, 1: 4.0, 2: 2.5}, "dense": {3: 0.5, 2: 6.0, 1: 9.0}})
    first, second = axes.containers
    assert line_and_bars(first) == ([1, 2, 3], [4.0, 2.5, 1.0], None)
    assert line_and_bars(second) == ([1, 2, 3], [9.0, 6.0, 0.5], None)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["p = 0.2", "dense"]
    assert axes.get_xlabel() == "layers kept, without retraining"


def test_curves_of_several_seeds_are_means_with_their_standard_deviation():
    seeds = {1: [4.0, 5.0, 9.0], 2: [2.0, 2.0, 2.0], 3: [1.0, 1.5]}
    (container,) = plot_curves({"p": seeds}).containers
    x, y, bars = line_and_bars(container)
    assert x == [1, 2, 3]
    assert y == pytest.approx([6.0, 2.0, 1.25])
    assert bars == pytest.approx([7.0**0.5, 0.0, 0.125**0.5])  # with n - 1


def test_importance_is_drawn_with_its_standard_error():
    values = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [1.0, 3.0, np.nan]])
    axes = plot_importance({"p = 0.2": Importance(2, values)})
    (container,) = axes.containers
    x, y, bars = line_and_bars(container)
    assert x == [0, 1, 2]
    assert y == pytest.approx([3.0, 4.0, 2.0])
    assert bars == pytest.approx([(7 / 3) ** 0.5, 0.0, 1.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["p = 0.2"]
    assert axes.get_xlabel() == "layer that is left out"


def test_ticks_are_whole_layers_and_axes_may_be_given(tmp_path):
    first = plot_curves({"a": {1: 2.0, 2: 1.0}})
    assert plot_importance({"b": Importance(1, np.array([[1.0, 2.0], [2.0, 4.0]]))}, first) is first
    assert len(first.containers) == 2
    assert all(tick == int(tick) for tick in first.get_xticks())
    first.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_without_a_name_is_refused():
    with pytest.raises(TypeError, match=r"curves\[2\] is a float, expected \{name: \{depth: value\}\}"):
        plot_curves({2: 1.0, 1: 2.0})
    with pytest.raises(TypeError, match=r"importances is an Importance, expected \{name: Importance\}"):
        plot_importance(Importance(1, np.array([[1.0, 2.0]])))
