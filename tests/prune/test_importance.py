"""layer_importance: mean values of sub-networks that lack a layer."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from layerdrop_fast.prune import Importance, extract, layer_importance
from tests.prune.blocks import blocks
from tests.prune.test_search import LISTS, Model, evaluate


def test_each_layer_has_the_mean_of_networks_without_it():
    model = Model(LISTS["ModuleList"](6))
    found = layer_importance(model, evaluate, kept=3, samples=100, layers="layers")
    for layer in range(6):
        without = [keep for keep in combinations(range(6), 3) if layer not in keep]
        values = [evaluate(extract(model, {"layers": keep})) for keep in without]
        assert found.means[layer] == pytest.approx(np.mean(values), rel=1e-6)
        assert found.standard_errors[layer] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-4)
    assert found.values.shape == (6, 100)
    assert np.isnan(found.values).sum() == 6 * (100 - 10)


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def test_a_layer_that_matters_is_missed():
    """Loss is how much is missing of 5, which layer 2 alone gives."""
    model = nn.ModuleDict({"layers": nn.ModuleList([Shift(0.0), Shift(0.1), Shift(5.0), Shift(0.0)])})

    def missing(model):
        x = torch.zeros(1)
        for layer in model.eval()["layers"]:
            x = layer(x)
        return 5 - x.item()

    found = layer_importance(model, missing, kept=2, samples=3, layers="layers")
    assert found.means.argmax() == 2
    assert found.means[2] == pytest.approx(5 - (0.1 + 0.1 + 0.0) / 3)


def test_one_layer_that_matters_makes_no_other_one_look_as_if_it_did():
    """A loss that layer 0 alone lowers is the same without any of the others, but for one sub-network in 20."""
    model = nn.ModuleDict({"layers": nn.ModuleList([Shift(1.0), *(Shift(0.0) for _ in range(15))])})

    def missing(model):
        return 1 - sum(layer.by for layer in model["layers"])

    found = layer_importance(model, missing, kept=8, layers="layers", share_prefixes=False)
    assert found.means[0] == 1.0
    assert set(found.means[1:]) <= {9 / 20, 10 / 20}


def test_one_sample_has_no_standard_error():
    found = Importance(1, np.array([[1.0, np.nan, np.nan], [1.0, 3.0, np.nan], [1.0, 2.0, 6.0]]))
    assert found.standard_errors == pytest.approx([np.nan, 1.0, np.std([1, 2, 6], ddof=1) / 3**0.5], nan_ok=True)
    model = Model(LISTS["ModuleList"](4))
    assert np.isnan(layer_importance(model, evaluate, kept=2, samples=1, layers="layers").standard_errors).all()


def test_samples_are_different_and_follow_the_seed():
    model = Model(LISTS["ModuleList"](8))
    first, again, other = (
        layer_importance(model, evaluate, kept=4, samples=5, seed=seed, layers="layers") for seed in (1, 1, 2)
    )
    assert np.array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)
    assert all(len(set(row)) == 5 for row in first.values.tolist())


@pytest.mark.parametrize(
    ("kept", "samples", "message"), [(4, 1, "kept is 4, expected 1 to 3"), (1, 0, "samples must be")]
)
def test_errors_name_both_sides(kept, samples, message):
    with pytest.raises(ValueError, match=message):
        layer_importance(Model(nn.ModuleList(blocks(4))), evaluate, kept=kept, samples=samples, layers="layers")


def test_each_layer_has_samples_of_its_own():
    """Which of the other layers a sub-network has does not follow from its number alone."""
    model = Model(LISTS["ModuleList"](8))
    asked = {}

    def noting(model):
        asked[evaluate(model)] = tuple(map(id, model.layers))
        return evaluate(model)

    names = [id(layer) for layer in model.layers]
    found = layer_importance(model, noting, kept=3, samples=6, layers="layers", share_prefixes=False)
    drawn = []
    for layer, values in enumerate(found.values.tolist()):
        subsets = [[names.index(name) for name in asked[value]] for value in values]
        drawn.append([[other - (other > layer) for other in subset] for subset in subsets])  # places among the others
    assert all(first != second for first, second in combinations(drawn, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_have_no_place_in_a_mean_are_named(value):
    model = Model(LISTS["ModuleList"](4))
    without = list(model.layers)[1:3]

    def evaluate(model):
        return value if list(model.layers) == without else 1.0

    with pytest.raises(ValueError, match=rf"the layers \[1, 2\] of 'layers' score {value}, expected a finite number"):
        layer_importance(model, evaluate, kept=2, layers="layers", share_prefixes=False)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = Model(LISTS["ModuleList"](4)).train()
    layer_importance(model, evaluate, kept=2, samples=2, layers="layers")
    assert all(module.training for module in model.modules())
