"""pruning_curve: one network at every depth."""

import re

import pytest
import torch

from layerdrop_fast.prune import every_other, extract, pruning_curve
from tests.prune.test_search import LISTS, Model, evaluate


def first(num_layers, *, kept):
    return range(kept)


@pytest.mark.parametrize("strategy", [every_other, first])
@pytest.mark.parametrize("depths", [None, [1, 4], [5]])
def test_each_depth_is_what_extract_leaves(strategy, depths):
    model, told = Model(LISTS["stack"](5)), []
    curve = pruning_curve(model, evaluate, depths=depths, strategy=strategy, on_depth=lambda *pair: told.append(pair))
    assert list(curve) == ([5, 4, 3, 2, 1] if depths is None else depths)
    assert told == list(curve.items())
    for depth, value in curve.items():
        assert value == pytest.approx(evaluate(extract(model, list(strategy(5, kept=depth)))), rel=1e-6)
    assert len(model.layers.layers) == 5


def test_nothing_runs_where_a_depth_is_wrong():
    model, told = Model(LISTS["stack"](3)), []
    with pytest.raises(ValueError, match="depth is 4, expected 1 to 3"):
        pruning_curve(model, told.append, depths=[3, 4])
    with pytest.raises(ValueError, match=r"are \[1, 0\], expected at least one of 0 to 2, ascending"):
        pruning_curve(model, evaluate, depths=[2], strategy=lambda num_layers, *, kept: [1, 0])
    assert not told


@pytest.mark.parametrize("wrong", [[0, 1, 2, 3], [0]])
def test_a_strategy_that_keeps_another_number_is_refused(wrong):
    told = []

    def strategy(num_layers, *, kept):
        return wrong if kept == 2 else range(num_layers)

    with pytest.raises(ValueError, match=rf"the strategy keeps {re.escape(str(wrong))}, expected 2 of 4 layers"):
        pruning_curve(Model(LISTS["stack"](4)), told.append, depths=[4, 2], strategy=strategy)
    assert not told


def test_the_model_is_left_in_the_mode_it_was_in_and_no_graph_is_made():
    model, grad = Model(LISTS["stack"](4)).train(), []
    model.last.eval()
    before = {name: module.training for name, module in model.named_modules()}

    def noting(model):
        grad.append(torch.is_grad_enabled())
        return evaluate(model)

    pruning_curve(model, noting)
    assert grad == [False] * 4
    assert {name: module.training for name, module in model.named_modules()} == before
