"""prune_checkpoint on files of torch.save, as fairseq, Lightning and others write them."""

import argparse

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import extract, prune_checkpoint
from tests.prune.blocks import blocks

KEEP = [0, 2]


def pruned(tmp_path, content, keep=None, **how):
    """What is left of a checkpoint, and the lists of layers that it was found to have."""
    torch.save(content, tmp_path / "in.pt", **how)
    seen = []
    prune_checkpoint(
        tmp_path / "in.pt", tmp_path / "out.pt", lambda lists: seen.append(lists) or keep or {"layers": KEEP}
    )
    return loaded(tmp_path / "out.pt"), seen[0]


def loaded(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def told(tmp_path, content, **how):
    """What is left of a checkpoint, and what is said to be as it was."""
    torch.save(content, tmp_path / "in.pt")
    cut = prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", {"layers": KEEP}, **how)
    return loaded(tmp_path / "out.pt"), cut.left_as_is


def state_of(prefix="layers", count=3, **more):
    return {f"{prefix}.{n}.w": torch.full((2,), float(n)) for n in range(count)} | more


def left(state_dict, prefix="layers"):
    return [state_dict[f"{prefix}.{n}.w"][0].item() for n in range(len(state_dict)) if f"{prefix}.{n}.w" in state_dict]


def language_model(count=3):
    torch.manual_seed(0)
    return TransformerLM(11, 8, 2, count, 16, max_len=9, dropout=0.0, schedule=0.0)


def stepped(model, optimizer):
    x = torch.arange(6).view(1, 6) if isinstance(model, TransformerLM) else torch.ones(2, 4)
    model(x).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_the_list_of_the_same_name_is_cut_and_not_one_that_ends_like_it(tmp_path):
    got, _ = pruned(tmp_path, {"model": state_of("aux.layers") | state_of("layers")})
    assert (left(got["model"]), left(got["model"], "aux.layers")) == (KEEP, [0, 1, 2])


def test_lists_are_told_by_their_ends_in_either_direction(tmp_path):
    content = {
        "model": state_of("net.layers", head=torch.ones(1)),
        "ema": state_of("layers"),
        "swa": state_of("m.net.layers"),
    }
    got, lists = pruned(tmp_path, content, {"net.layers": KEEP})
    assert lists == {"net.layers": 3}
    assert left(got["model"], "net.layers") == left(got["ema"]) == left(got["swa"], "m.net.layers") == KEEP


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (state_of("a.layers", 2) | state_of("b.layers", 1), r"which of the lists of layers \['a.layers', 'b.layers'\]"),
        (state_of("blocks", 2), r"has lists of layers {'blocks': 2}, expected 3 layers 'layers'"),
        (state_of("module.layers", 2), r"has lists of layers {'module.layers': 2}, expected 3 layers 'layers'"),
    ],
)
def test_a_state_dict_of_another_model_is_refused(tmp_path, beside, message):
    with pytest.raises(ValueError, match=message):
        pruned(tmp_path, {"model": state_of(), "beside": beside})


def test_the_largest_state_dict_is_the_model(tmp_path):
    """By entries in layers: others may have more beside them."""
    small = state_of("aux", 2, **{f"bias_{n}": torch.ones(1) for n in range(9)})
    torch.save({"first": small, "model": state_of(), "last": small}, tmp_path / "in.pt")
    seen = []

    def choose(lists):
        seen.append(lists)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", choose)
    assert seen == [{"layers": 3}]


@pytest.mark.parametrize("first", ["model", "ema"])
def test_the_average_of_a_model_is_cut_with_it(tmp_path, first):
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks(3))})
    content = {"model": model.state_dict(), "ema": AveragedModel(model).state_dict()}
    got, lists = pruned(tmp_path, {first: content[first]} | content)
    assert lists == {"layers": 3}
    assert set(got["model"]) == {name for name in content["model"] if ".2." not in name}
    assert set(got["ema"]) == {f"module.{name}" for name in got["model"]} | {"n_averaged"}
    assert torch.equal(got["ema"]["module.layers.1.linear.weight"], model["layers"][2].linear.weight)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples_are_walked(tmp_path, kind):
    """Lightning keeps its optimizers in a list."""
    model = nn.Sequential(nn.ModuleDict({"layers": nn.Sequential(*blocks(3))})["layers"], nn.Linear(4, 2))
    optimizer = stepped(model, torch.optim.AdamW(model.named_parameters()))
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": kind([optimizer]),
        "ema": kind([model.state_dict()]),
    }
    got, _ = pruned(tmp_path, content, {"0": KEEP})
    assert type(got["optimizer_states"]) is kind
    assert got["optimizer_states"][0]["param_groups"][0]["param_names"] == list(got["state_dict"])
    assert list(got["ema"][0]) == list(got["state_dict"])
    assert len(got["optimizer_states"][0]["state"]) == 6


def test_a_state_dict_in_a_list_is_found(tmp_path):
    got, _ = pruned(tmp_path, {"models": [state_of()]})
    assert left(got["models"][0]) == KEEP


def test_options_in_dicts_are_cut(tmp_path):
    """fairseq's cfg, nanoGPT's model_args, Lightning's hyper_parameters."""
    content = {
        "model": state_of(),
        "cfg": {
            "model": {"num_layers": 3, "_name": "x"},
            "task": {"seed": 1, 2: 3},
            "inner": [argparse.Namespace(depth=3)],
        },
        "model_args": {"n_layer": 3, "n_head": 4},
        "hyper_parameters": {"model": argparse.Namespace(num_layers=3, args=argparse.Namespace(num_layers=3))},
        "epoch": 3,
    }
    got, _ = pruned(tmp_path, content)
    assert got["cfg"] == {
        "model": {"num_layers": 2, "_name": "x"},
        "task": {"seed": 1, 2: 3},
        "inner": [argparse.Namespace(depth=2)],
    }
    assert got["model_args"] == {"n_layer": 2, "n_head": 4}
    assert got["hyper_parameters"] == {"model": argparse.Namespace(num_layers=2, args=argparse.Namespace(num_layers=2))}
    assert got["epoch"] == 3


def test_the_optimizer_of_a_language_model(tmp_path):
    """Its counters are in the state dict, its embeddings are tied, and its optimizer has no names."""
    model = language_model()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    assert any(name.endswith("_extra_state") for name in model.state_dict())
    prefix = next(name for name, _ in model.named_modules() if name.endswith("layers"))
    got, _ = pruned(tmp_path, {"model": model.state_dict(), "optimizer": optimizer}, {prefix: KEEP})
    small = extract(model, KEEP)
    fresh = torch.optim.AdamW(small.parameters())
    fresh.load_state_dict(got["optimizer"])
    old = dict(zip((name for name, _ in model.named_parameters()), optimizer["state"].values(), strict=True))
    for name, weight in small.named_parameters():
        source = name.replace(f"{prefix}.1.", f"{prefix}.2.")
        assert torch.equal(fresh.state[weight]["exp_avg"], old[source]["exp_avg"])


def test_weights_that_are_tied_are_one_parameter(tmp_path):
    class Tied(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.head.weight = self.embed.weight
            self.layers = nn.Sequential(*blocks(count))

        def forward(self, x):
            return self.head(self.layers(self.embed(x)))

    model = Tied(3)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    got, _ = pruned(tmp_path, {"model": model.state_dict(), "optimizer": optimizer})
    torch.optim.AdamW(Tied(2).parameters()).load_state_dict(got["optimizer"])
    moments = [state["exp_avg"] for state in got["optimizer"]["state"].values()]
    assert all(torch.equal(m, optimizer["state"][n]["exp_avg"]) for m, n in zip(moments, [0, 1, 2, 5, 6], strict=True))


@pytest.mark.parametrize(
    "buffer",
    [{"encoder.version": torch.ones(1)}, {"p._float_tensor": torch.ones(1)}, {"position_ids": torch.arange(9)}],
)
def test_buffers_are_no_parameters(tmp_path, buffer):
    weights = state_of()
    optimizer = {
        "state": {n: {"exp_avg": value} for n, value in enumerate(weights.values())},
        "param_groups": [{"params": [0, 1, 2]}],
    }
    got, _ = pruned(tmp_path, {"model": buffer | weights, "optimizer": optimizer})
    assert [state["exp_avg"][0].item() for state in got["optimizer"]["state"].values()] == KEEP


@pytest.mark.parametrize(
    ("groups", "shape", "message"),
    [
        ([[0, 1, 2]], (3,), "which of the optimizer's 3 parameters belong to which layer, the model has 3"),
        ([[0, 1]], (2,), "which of the optimizer's 2 parameters belong to which layer, the model has 3"),
        ([[0, 2], [1]], (2,), r"3 parameters in 2 groups belong to which layer: expected groups of named parameters"),
    ],
)
def test_an_optimizer_of_an_unknown_order_is_refused(tmp_path, groups, shape, message):
    optimizer = {
        "state": {1: {"exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(2)}},
        "param_groups": [{"params": group} for group in groups],
    }
    with pytest.raises(ValueError, match=message):
        pruned(tmp_path, {"model": state_of(), "optimizer": optimizer})


@pytest.mark.parametrize("trained", [["layers.1.w", "layers.2.w"], ["module.layers.0.w"], ["head"]])
def test_an_optimizer_of_a_part_of_the_model(tmp_path, trained):
    optimizer = {
        "state": {n: {"name": name} for n, name in enumerate(trained)},
        "param_groups": [{"params": list(range(len(trained))), "param_names": trained}],
    }
    got, _ = pruned(tmp_path, {"model": state_of(head=torch.ones(1)), "optimizer": optimizer})
    kept = [name for name in trained if ".1." not in name]
    assert [state["name"] for state in got["optimizer"]["state"].values()] == kept


def test_an_optimizer_without_names_beside_a_sorted_state_dict_is_refused(tmp_path):
    """By number and shapes its parameters might be those of any layer."""
    model = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(12)))})
    optimizer = torch.optim.AdamW(model.parameters())
    model["layers"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    message = "the state dict has layer 11 of 'layers' before layer 2, expected them in the model's order"
    with pytest.raises(ValueError, match=message):
        pruned(tmp_path, {"model": {name: state[name] for name in sorted(state)}, "optimizer": optimizer.state_dict()})
    got, _ = pruned(tmp_path, {"model": dict(state), "optimizer": optimizer.state_dict()}, {"layers": [0, 2, 10]})
    moments = optimizer.state_dict()["state"]
    for place, old in enumerate([0, 2, 10]):
        assert torch.equal(got["optimizer"]["state"][place]["exp_avg"], moments[old]["exp_avg"])


def test_an_optimizer_of_a_deeper_model_is_refused(tmp_path):
    group = {"params": [0], "param_names": ["layers.3.w"]}
    with pytest.raises(ValueError, match="an optimizer has 4 layers 'layers', the model 3"):
        pruned(tmp_path, {"model": state_of(), "optimizer": {"state": {}, "param_groups": [group]}})


def test_files_from_before_torch_1_6(tmp_path):
    got, _ = pruned(tmp_path, {"model": state_of()}, _use_new_zipfile_serialization=False)
    assert left(got["model"]) == KEEP


def test_parts_of_one_storage_do_not_bring_all_of_it(tmp_path):
    flat = torch.arange(40_000.0)
    state = {f"layers.{n}.w": flat[n * 10_000 : (n + 1) * 10_000] for n in range(4)}
    state["tied"] = state["layers.0.w"]
    got, _ = pruned(tmp_path, {"model": state}, {"layers": [0]})
    assert torch.equal(got["model"]["layers.0.w"], flat[:10_000])
    assert got["model"]["tied"].data_ptr() == got["model"]["layers.0.w"].data_ptr()
    assert (tmp_path / "out.pt").stat().st_size < 45_000
