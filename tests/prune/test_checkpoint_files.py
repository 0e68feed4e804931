"""prune_checkpoint: files in, files out, whole or not at all."""

import argparse
import json
import os
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from layerdrop_fast import LayerDropModuleList
from layerdrop_fast.prune import every_other, extract, prune_checkpoint
from tests.prune.blocks import blocks

KEEP = [0, 2, 3]


def model_of(count=5):
    return nn.ModuleDict({"layers": LayerDropModuleList(0.2, blocks(count)), "head": nn.Linear(4, 2)})


def choose(lists):
    return {"layers": KEEP}


def expected(model):
    return extract(model, {"layers": KEEP}).state_dict()


def assert_same(got, wanted):
    assert list(got) == list(wanted) or set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_safetensors_file(tmp_path):
    model = model_of()
    save_file(model.state_dict(), tmp_path / "in.safetensors", {"format": "pt", "sha256": "of all layers"})
    before = (tmp_path / "in.safetensors").read_bytes()
    seen = []
    found = prune_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", lambda lists: seen.append(lists) or choose(lists)
    )
    assert seen == [{"layers": 5}]
    assert_same(load_file(tmp_path / "out.safetensors"), expected(model))
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (found.kept, found.layers) == ({"layers": KEEP}, {"layers": 5})
    assert found.bytes_before == 4 * (5 * 20 + 10)
    assert found.bytes_after == 4 * (3 * 20 + 10)
    assert (tmp_path / "in.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_as_transformers_saves_it(tmp_path, shards):
    model, source = model_of(), tmp_path / "in"
    source.mkdir()
    state = model.state_dict()
    if shards == 1:
        save_file(state, source / "model.safetensors")
    else:
        weight_map = {}
        for number in range(shards):
            part = {name: tensor for place, (name, tensor) in enumerate(state.items()) if place % shards == number}
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, source / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "model_type": "x"}))
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("the same weights, whole")
    prune_checkpoint(source, tmp_path / "out", choose)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text()) == {"num_hidden_layers": 3, "model_type": "x"}
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "pytorch_model.bin").exists()
    got = {}
    for file in sorted(out.glob("*.safetensors")):
        got |= load_file(file)
    assert_same(got, expected(model))
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(expected(model))
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected(model).values())
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def checkpoint_of(model, named=True):
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(list(parameters))
    model["head"](model["layers"](torch.ones(2, 4))).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "ema": {f"module.{name}": tensor * 2 for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(decoder_layers=5, arch="x", num_hidden_layers=5),
        "step": 7,
    }


@pytest.mark.parametrize("named", [True, False])
def test_a_training_checkpoint_of_torch(tmp_path, named):
    model = model_of()
    model["layers"].p = 0.0
    whole = checkpoint_of(model, named)
    whole["args"] = argparse.Namespace(num_hidden_layers=5, arch="x")
    torch.save(whole, tmp_path / "in.pt")
    prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", choose)
    with torch.serialization.safe_globals([argparse.Namespace]):
        got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(got["model"], expected(model))
    assert_same(got["ema"], {f"module.{name}": tensor * 2 for name, tensor in expected(model).items()})
    assert got["args"] == argparse.Namespace(num_hidden_layers=3, arch="x")
    assert got["step"] == 7
    small = extract(model, {"layers": KEEP})
    optimizer = torch.optim.AdamW(list(small.named_parameters() if named else small.parameters()))
    optimizer.load_state_dict(got["optimizer"])
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert [moment.shape for moment in moments] == [weight.shape for weight in small.parameters()]
    old = whole["optimizer"]["state"]
    assert all(
        torch.equal(moment, old[place]["exp_avg"])
        for moment, place in zip(moments, [0, 1, 4, 5, 6, 7, 10, 11], strict=True)
    )


def test_a_bare_state_dict_of_torch(tmp_path):
    model = model_of()
    torch.save(model.state_dict(), tmp_path / "in.bin")
    prune_checkpoint(tmp_path / "in.bin", tmp_path / "out.bin", choose)
    assert_same(torch.load(tmp_path / "out.bin", weights_only=True), expected(model))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": model_of().state_dict(), "x": Malicious()}, tmp_path / "in.pt")
    with pytest.raises(pickle.UnpicklingError):
        prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", choose)
    assert os.listdir(tmp_path) == ["in.pt"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no layers", "holds no state dict with layers"),
        ("a list", "holds a list, expected a state dict"),
        ("unknown order", "cannot tell which of the optimizer's 2 parameters belong to which layer"),
        ("options of another", "the config says"),
    ],
)
def test_torch_files_that_cannot_be_cut(tmp_path, kind, message):
    content = {
        "no layers": {"model": {"weight": torch.ones(2)}},
        "a list": [1, 2],
        "unknown order": {
            "model": model_of().state_dict(),
            "o": torch.optim.SGD([torch.ones(1), torch.ones(1)]).state_dict(),
        },
        "options of another": {"model": model_of().state_dict(), "args": argparse.Namespace(num_hidden_layers=4)},
    }[kind]
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", choose)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_no_partial_output(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    save_file(model_of().state_dict(), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    with pytest.raises(ValueError, match=re.escape("{'num_hidden_layers': 6}")):
        prune_checkpoint(source, tmp_path / "out", choose)
    with pytest.raises(ValueError, match=r"are \[0, 5\]"):
        prune_checkpoint(source / "model.safetensors", tmp_path / "out.safetensors", lambda lists: {"layers": [0, 5]})
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 5}))

    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(source, tmp_path / "out", choose)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(source / "model.safetensors", tmp_path / "out.safetensors", choose)
    assert os.listdir(tmp_path) == ["in"]
    assert sorted(os.listdir(source)) == ["config.json", "model.safetensors"]


def test_sources_and_targets_of_another_kind_are_refused(tmp_path):
    save_file(model_of().state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for source, out, message in [
        ("in.safetensors", "text.txt", "text.txt exists, expected a new name"),
        ("text.txt", "out.txt", "is none of a folder, .safetensors, .pt"),
        ("broken.safetensors", "out.safetensors", "broken.safetensors is no safetensors file"),
        ("short.safetensors", "out.safetensors", "short.safetensors is no safetensors file"),
        ("empty", "out", "has no model.safetensors, expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune_checkpoint(tmp_path / source, tmp_path / out, choose)
    with pytest.raises(FileNotFoundError):
        prune_checkpoint(tmp_path / "nowhere.safetensors", tmp_path / "out.safetensors", choose)


def test_every_other_of_what_is_there(tmp_path):
    model = model_of(6)
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    found = prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        lambda lists: {name: every_other(count, kept=2) for name, count in lists.items()},
    )
    assert found.kept == {"layers": [0, 3]}
