"""The recipe search: equal work, provenance, a table that shows every seed."""

import json

import pytest

from layerdrop_fast.recipes import trials
from layerdrop_fast.recipes.training import ModelSize


def test_trials_spend_the_same_work():
    for name, recipe in trials.TRIALS.items():
        steps = recipe.steps_of_equal_work(16, 1000)
        assert steps * recipe.density(16) == pytest.approx(1000, abs=1), name
    assert len(trials.TRIALS) <= 9  # dense and eight ways to drop


@pytest.mark.parametrize(("layers", "depths"), [(16, [16, 12, 9, 8, 4, 2]), (40, [40, 30, 21, 20, 10, 5]), (1, [1])])
def test_the_depths_that_are_shown(layers, depths):
    assert trials.shown_depths(layers) == depths


def test_a_trial_says_what_it_ran(monkeypatch):
    monkeypatch.setattr(trials, "EVALUATION_WINDOWS", 2)
    monkeypatch.setattr(trials.torch, "set_num_threads", lambda _: None)
    size = ModelSize(num_layers=2, d_model=8, nhead=1, dim_feedforward=8, context=8)
    result = trials.run_trial("linear to 0.4, inverse", 1, size, 4)
    assert result["settings"]["steps"] == 5
    assert set(result["bits_per_byte"]) == {"2", "1"}
    assert 0 < result["layers_run"] <= 10
    assert result == json.loads(json.dumps(result))


def test_the_table_has_mean_and_seeds():
    def run(seed, bits):
        named = {"trial": "uniform 0.2", "seed": seed, "settings": {"steps": 1250}, "share_of_layers_run": 0.8}
        return named | {"bits_per_byte": {"2": bits, "1": bits + 1}}

    table = trials.markdown([run(1, 2.5), run(0, 2.25)]).splitlines()
    assert table[0] == "| recipe | layers run | steps | 2 layers | 1 layers | mean of all depths |"
    assert table[2] == (
        "| uniform 0.2 | 80% | 1,250 | **2.375** (2.250, 2.500) | **3.375** (3.250, 3.500) | **2.875** (2.750, 3.000) |"
    )
