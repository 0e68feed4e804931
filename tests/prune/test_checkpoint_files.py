"""prune_checkpoint: files in, files out, whole or not at all."""

import argparse
import json
import os
import re
import sys
from contextlib import contextmanager

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
    assert set(got) == set(wanted)
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
    with pytest.raises(ValueError, match=r"cannot read .*in.pt.*: it holds a posix.mkdir, .*: save state dicts and"):
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


@contextmanager
def recursion_limit(limit):
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    yield
    sys.setrecursionlimit(before)


def nested(kind):
    value = {}
    if kind == "cyclic":
        value["itself"] = value
    for _ in range(2000 if kind == "deep" else 0):
        value = [value]
    return value


@pytest.mark.parametrize("kind", ["cyclic", "deep", "deep JSON", "deep header"])
def test_what_has_no_end_is_named(tmp_path, kind):
    source, out, deep = tmp_path / "in.pt", tmp_path / "out.pt", "[" * 100_000
    if kind == "deep JSON":
        source, out = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        save_file(model_of().state_dict(), source / "model.safetensors")
        (source / "config.json").write_text(deep)
    elif kind == "deep header":
        source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        source.write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    else:
        with recursion_limit(50_000):
            torch.save({"model": model_of().state_dict(), "x": nested(kind)}, source)
    with pytest.raises(ValueError, match=r"in(.pt|.safetensors)? holds values within values without an end"):
        prune_checkpoint(source, out, choose)
    assert os.listdir(tmp_path) == [source.name]


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

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(source, tmp_path / "out", choose)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(source / "model.safetensors", tmp_path / "out.safetensors", choose)
    assert os.listdir(tmp_path) == ["in"]
    assert sorted(os.listdir(source)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["file", "folder", "torch"])
def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, kind):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(model_of().state_dict(), source)
    if kind == "folder":
        (tmp_path / "in").mkdir()
        source = source.rename(tmp_path / "in" / "model.safetensors").parent
        (source / "config.json").write_text(json.dumps({"n_layer": 5}))
        (source / "vocab.txt").write_text("a")
        out = tmp_path / "out"
    if kind == "torch":
        source, out = tmp_path / "in.pt", tmp_path / "out.pt"
        torch.save(model_of().state_dict(), source)
    synced = {False: set(), True: set()}
    fsync = os.fsync

    def seen(descriptor):
        status = os.fstat(descriptor)
        synced[out.exists()].add((status.st_ino, status.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    prune_checkpoint(source, out, choose)
    written = [out, *out.iterdir()] if kind == "folder" else [out]
    assert len(written) == (4 if kind == "folder" else 1)
    assert {(path.stat().st_ino, path.stat().st_size) for path in written} <= synced[False]
    assert tmp_path.stat().st_ino in {number for number, _ in synced[True]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_with_names_of_temporary_ones_stay(tmp_path, suffix):
    state, source, out = model_of().state_dict(), tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, source)
    mine = [tmp_path / f".out{suffix}.tmp", tmp_path / f"out{suffix}.tmp"]
    for path in mine:
        path.write_text("mine")
    prune_checkpoint(source, out, choose)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert len(os.listdir(tmp_path)) == 4


def test_a_list_inside_of_a_layer(tmp_path):
    state = {
        f"l.{layer}.e.{expert}": torch.full((2,), 10.0 * layer + expert) for layer in (0, 1) for expert in range(3)
    }
    state = {f"{name}.w": tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "in.safetensors")
    torch.save({"model": state, "args": {"depth": 2, "n_layer": 3}}, tmp_path / "in.pt")
    for suffix in (".safetensors", ".pt"):
        found = prune_checkpoint(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", lambda lists: {"l.0.e": [0, 2]})
        assert (found.layers, found.bytes_before, found.bytes_after) == ({"l.0.e": 3}, 48, 40)
    small = {name: tensor for name, tensor in state.items() if name not in ("l.0.e.1.w", "l.0.e.2.w")}
    small["l.0.e.1.w"] = state["l.0.e.2.w"]
    assert_same(load_file(tmp_path / "out.safetensors"), small)
    assert_same(torch.load(tmp_path / "out.pt")["model"], small)


def test_sources_and_targets_of_another_kind_are_refused(tmp_path):
    save_file(model_of().state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    whole = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "long.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    (tmp_path / "headless.safetensors").write_bytes(bytes(8) + whole[8:])
    (tmp_path / "strange.safetensors").write_bytes(whole.replace(b"F32", b"F99"))
    torch.save(model_of().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-700])
    torch.save(model_of().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:-30])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for part in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / part).write_bytes(whole)
    before = sorted(os.listdir(tmp_path))
    for source, out, message in [
        (
            "model-00001-of-00002.safetensors",
            "out.safetensors",
            "is a part of a checkpoint, expected the whole: its fo",
        ),
        ("model.safetensors.index.json", "out", "is a part of a checkpoint, expected the whole: its folder"),
        ("in.safetensors", "nowhere/out.safetensors", "nowhere is no folder, expected one to write out.safetensors in"),
        ("in.safetensors", "text.txt", "text.txt exists, expected a new name"),
        ("text.txt", "out.txt", "is none of a folder, .safetensors, .pt"),
        ("broken.safetensors", "out.safetensors", "broken.safetensors is no safetensors file"),
        ("short.safetensors", "out.safetensors", "short.safetensors is no safetensors file"),
        (
            "cut.safetensors",
            "out.safetensors",
            "cut.safetensors has 439 bytes of weights, expected 440: it is not whole",
        ),
        ("strange.safetensors", "out.safetensors", "strange.safetensors is no safetensors file"),
        ("long.safetensors", "out.safetensors", "long.safetensors is no safetensors file"),
        ("headless.safetensors", "out.safetensors", "headless.safetensors is no safetensors file"),
        ("cut.pt", "out.pt", "cannot read .*cut.pt"),
        ("old.pt", "out.pt", "cannot read .*old.pt"),
        ("empty.pt", "out.pt", "cannot read .*empty.pt"),
        ("in.safetensors", "out.pt", "out.pt is of another kind than .*in.safetensors, expected .safetensors"),
        ("whole.pt", "out.safetensors", "out.safetensors is of another kind than .*whole.pt, expected .pt or .pth"),
        ("empty", "out.safetensors", "out.safetensors is named like a file, expected the name of a folder"),
        (
            "empty",
            "out",
            "has no model.safetensors, expected model.safetensors, or model.safetensors.index.json and it",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            prune_checkpoint(tmp_path / source, tmp_path / out, choose)
        assert sorted(os.listdir(tmp_path)) == before
    for suffix in (".safetensors", ".pt"):
        with pytest.raises(FileNotFoundError, match=f"No such file or directory: .*nowhere{suffix}"):
            prune_checkpoint(tmp_path / f"nowhere{suffix}", tmp_path / f"out{suffix}", choose)


def test_the_header_says_what_it_is_given(tmp_path):
    model = model_of()
    save_file(model.state_dict(), tmp_path / "in.safetensors", {"format": "pt"})
    prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        choose,
        metadata=lambda cut, tensors: {"kept": str(cut.kept), "names": " ".join(sorted(tensors))},
    )
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        names = " ".join(sorted(expected(model)))
        assert file.metadata() == {"format": "pt", "kept": "{'layers': [0, 2, 3]}", "names": names}


def test_what_to_keep_may_be_said_at_once(tmp_path):
    model = model_of()
    save_file(model.state_dict(), tmp_path / "model-00001-of-00001.safetensors")
    cut = prune_checkpoint(tmp_path / "model-00001-of-00001.safetensors", tmp_path / "o.safetensors", {"layers": KEEP})
    assert cut.kept == {"layers": KEEP}
    assert_same(load_file(tmp_path / "o.safetensors"), expected(model))


def test_nothing_is_written_into_the_source(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    save_file(model_of().state_dict(), source / "model.safetensors")
    before = sorted(os.listdir(source))
    with pytest.raises(ValueError, match=r"in/small is inside of .*in, expected another place"):
        prune_checkpoint(source, source / "small", choose)
    assert sorted(os.listdir(source)) == before


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_who_may_read_the_source_may_read_what_is_cut(tmp_path, mode):
    save_file(model_of().state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors").chmod(mode)
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", choose)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == mode


def test_every_other_of_what_is_there(tmp_path):
    model = model_of(6)
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    found = prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        lambda lists: {name: every_other(count, kept=2) for name, count in lists.items()},
    )
    assert found.kept == {"layers": [0, 3]}
