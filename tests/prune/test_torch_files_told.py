"""prune_checkpoint on files of torch.save: what stands beside state dicts, and what is told of it."""

import argparse

import pytest
import torch

from layerdrop_fast.prune import prune_checkpoint
from tests.prune.test_torch_files import KEEP, language_model, left, pruned, state_of, stepped, told


def test_options_are_cut_wherever_they_stand(tmp_path):
    """Beside state dicts, beside the weights in one, beside tensors of their own, in a Namespace."""
    weights = torch.ones(5)
    content = {
        "model": {**state_of(), "num_layers": 3, "layer_types": ["a", "b", "c"], "more": {"depth": 3}},
        "n_layers": 3,
        "num_hidden_layers": 3,
        "config": {"num_layers": 3, "class_weights": weights},
        "other": {"inner": {"num_layers": 3}, "ema": argparse.Namespace(model=state_of(), n_layer=3)},
        "history": [{"n_layer": 3}, 3],
        "epoch": 3,
    }
    got, others = told(tmp_path, content)
    model = got["model"]
    assert (model["num_layers"], model["layer_types"], model["more"]) == (2, ["a", "c"], {"depth": 2})
    assert left(model) == KEEP
    assert (got["n_layers"], got["num_hidden_layers"], got["epoch"]) == (2, 2, 3)
    assert got["config"]["num_layers"] == 2
    assert torch.equal(got["config"]["class_weights"], weights)
    assert got["other"]["inner"] == {"num_layers": 2}
    assert (left(got["other"]["ema"].model), got["other"]["ema"].n_layer) == (KEEP, 2)
    assert got["history"] == [{"n_layer": 2}, 3]
    assert others == {"config": "1 tensor"}


def test_models_in_a_list_are_not_one_a_layer(tmp_path):
    got, _ = told(tmp_path, {"model": state_of(), "n_layer": 3, "layer_emas": [state_of(), state_of(), state_of()]})
    assert [left(model) for model in got["layer_emas"]] == [KEEP, KEEP, KEEP]


def test_an_optimizers_state_is_not_the_model(tmp_path):
    """Of an optimizer that keeps one tensor by each name, and has more of them."""
    state = state_of() | {f"layers.{n}.more": torch.ones(2) for n in range(3)}
    names = list(state)
    content = {"optimizer": {"state": state, "param_groups": [{"params": names}]}, "model": state_of()}
    torch.save(content, tmp_path / "in.pt")
    assert prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", {"layers": KEEP}).bytes_before == 24


def test_options_beside_a_state_dict_that_are_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the config says \{'num_layers': 4\}, expected the 3 layers of 'layers'"):
        pruned(tmp_path, {"model": state_of(), "num_layers": 4})


@pytest.mark.parametrize(
    ("beside", "others"),
    [
        ({"ema": {"shadow_params": list(state_of().values()), "decay": 0.9}}, {"ema.shadow_params": "3 tensors"}),
        ({"ema": {f"layers{n}w": torch.ones(2) for n in range(3)}}, {"ema": "3 tensors"}),
        ({"flat": torch.ones(6)}, {"outermost": "1 tensor"}),
        ({"more": (argparse.Namespace(w=torch.ones(1)),)}, {"more.0": "1 tensor"}),
        ({"args": {"n_layer": 3, "mlp_only_layers": [1]}}, {"mlp_only_layers": [1]}),
        ({"rng": [torch.get_rng_state()], "loss": torch.tensor(0.5), "steps": torch.arange(3)}, {}),
    ],
)
def test_what_is_not_cut_is_told(tmp_path, beside, others):
    got, found = told(tmp_path, {"model": state_of(), **beside})
    assert left(got["model"]) == KEEP
    assert found == others


def test_averages_within_the_state_dict_of_a_model_are_told(tmp_path):
    """Their names have no dots, as names of buffers must not."""
    state = state_of("net.layers") | state_of("head.layers", 1)
    state |= {f"ema.{name.replace('.', '')}": value for name, value in state_of("layers").items()}
    torch.save(state, tmp_path / "in.pt")
    cut = prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", {"net.layers": KEEP})
    assert cut.left_as_is == {"ema": "3 tensors"}


def test_of_a_training_that_is_cut_whole_nothing_is_told(tmp_path):
    model = language_model()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "step": 1}, tmp_path / "in.pt")
    assert not prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", {"stack.layers": KEEP}).left_as_is


@pytest.mark.parametrize("kind", [dict, list, tuple, argparse.Namespace])
def test_optimizers_are_left_out_where_that_is_asked(tmp_path, kind):
    groups = [{"params": [0, 1]}, {"params": [2]}]
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": groups}
    place = kind([optimizer]) if kind in (list, tuple) else kind(adam=optimizer)
    content = {"model": state_of(), "optimizers": place, "n_layer": 3}
    with pytest.raises(ValueError, match=r"the checkpoint without it \(optimizer=False, --without-optimizer\)"):
        pruned(tmp_path, content)
    got, others = told(tmp_path, content, optimizer=False)
    assert (left(got["model"]), got["optimizers"], got["n_layer"]) == (KEEP, kind(), 2)
    assert not others


def test_an_optimizer_by_names(tmp_path):
    """As get_optimizer_state_dict of torch.distributed.checkpoint has it; in an order of its own."""
    names = ["layers.2.w", "head", "layers.0.w", "layers.1.w"]
    optimizer = {"state": {name: {"name": name} for name in names}, "param_groups": [{"params": names, "lr": 1.0}]}
    got, _ = pruned(tmp_path, {"model": state_of(head=torch.ones(1)), "optimizer": optimizer})
    assert got["optimizer"] == {
        "state": {"layers.1.w": {"name": "layers.2.w"}, "head": {"name": "head"}, "layers.0.w": {"name": "layers.0.w"}},
        "param_groups": [{"params": ["layers.1.w", "head", "layers.0.w"], "lr": 1.0}],
    }
