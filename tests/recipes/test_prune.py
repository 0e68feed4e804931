"""``layerdrop-fast prune``, as a user calls it."""

import json
import os
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerdrop_fast import cli
from layerdrop_fast.recipes.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def source(tmp_path):
    state = {f"{side}.layers.{n}.w": torch.full((2, 3), float(n)) for side in ("encoder", "decoder") for n in range(6)}
    save_file({**state, "head": torch.ones(4)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def call(source, *arguments, out="out.safetensors"):
    return cli.main(["prune", str(source), "--out", str(source.parent / out), *arguments])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--kept", "3"], [0, 2, 4]),
        (["--kept", "6"], [0, 1, 2, 3, 4, 5]),
        (["--kept", "2", "--strategy", "first"], [0, 1]),
        (["--kept", "2", "--strategy", "last"], [4, 5]),
        (["--keep", "1,2,5"], [1, 2, 5]),
    ],
)
def test_the_named_list_is_cut_and_the_other_stays_whole(source, capsys, arguments, kept):
    assert call(source, "--layers", "decoder.layers", *arguments) == 0
    found = load_file(source.parent / "out.safetensors")
    assert [found[f"decoder.layers.{n}.w"][0, 0].item() for n in range(len(kept))] == kept
    assert len(found) == len(kept) + 6 + 1
    printed = capsys.readouterr().out
    assert f"decoder.layers: 6 -> {len(kept)} layers, those that were {', '.join(map(str, kept))}" in printed
    assert str(source.parent / "out.safetensors") in printed


def test_the_size_of_the_weights_before_and_after_is_told(source, capsys, monkeypatch):
    monkeypatch.setattr("layerdrop_fast.recipes.prune.MIB", 4)  # a float
    assert call(source, "--layers", "decoder.layers", "--kept", "3") == 0
    assert "76.0 -> 58.0 MiB of weights" in capsys.readouterr().out


def test_both_lists(source):
    assert call(source, "--kept", "1", "--layers", "decoder.layers", "--layers", "encoder.layers") == 0
    assert set(load_file(source.parent / "out.safetensors")) == {"encoder.layers.0.w", "decoder.layers.0.w", "head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kept", "3"],
            "found lists of layers: 'decoder.layers' (6), 'encoder.layers' (6); expected one, or --layers",
        ),
        (["--kept", "7", "--layers", "decoder.layers"], "--kept is 7, expected 1 to 6, the layers of 'decoder.layers'"),
        (["--kept", "3", "--layers", "layers"], "no list of layers 'layers'; found 'decoder.layers' (6)"),
        (["--keep", "0,6", "--layers", "decoder.layers"], "are [0, 6], expected at least one of 0 to 5"),
        (["--keep", "1,1", "--layers", "decoder.layers"], "are [1, 1], expected"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(source, capsys, arguments, message):
    assert call(source, *arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(source.parent) == ["in.safetensors"]


def test_files_that_are_not_there(source, capsys, tmp_path):
    assert call(tmp_path / "nowhere.safetensors", "--kept", "1") == 2
    assert "No such file" in capsys.readouterr().err
    assert call(source, "--kept", "1", out="in.safetensors") == 2
    assert "in.safetensors exists, expected a new name" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--kept", "0"], ["--keep", "a"], ["--kept", "1", "--keep", "0"]])
def test_wrong_arguments_are_explained(source, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        call(source, *arguments)
    assert ended.value.code == 2
    assert "prune: error:" in capsys.readouterr().err


def test_a_folder(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    save_file({f"h.{n}.w": torch.ones(2) for n in range(4)}, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text(json.dumps({"n_layer": 4, "mlp_only_layers": [1]}))
    (tmp_path / "in/model.gguf").write_text("the same weights, whole")
    (tmp_path / "in/onnx").mkdir()
    assert cli.main(["prune", str(tmp_path / "in"), "--kept", "2", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"n_layer": 2, "mlp_only_layers": [1]}
    printed = capsys.readouterr().out
    assert "prune: 1/1  model.safetensors" in printed
    assert "left out: model.gguf, onnx/\n" in printed
    assert "in: mlp_only_layers = [1] left as is, check whether that fits" in printed


@pytest.mark.parametrize(("keep", "told"), [("0,2", "full"), ("1,3", "sliding"), ("0,1", None), ("2", None)])
def test_one_kind_of_layers_that_is_left_is_told(tmp_path, capsys, keep, told):
    (tmp_path / "in").mkdir()
    save_file({f"h.{n}.w": torch.ones(2) for n in range(4)}, tmp_path / "in/model.safetensors")
    kinds = {"layer_types": ["full", "sliding"] * 2, "layer_widths": [8] * 4}
    (tmp_path / "in/config.json").write_text(json.dumps({"n_layer": 4, **kinds}))
    assert cli.main(["prune", str(tmp_path / "in"), "--keep", keep, "--out", str(tmp_path / "out")]) == 0
    line = f"config.json: layer_types had full, sliding, only {told} is left: choose other layers with --keep\n"
    printed = capsys.readouterr().out
    assert (line in printed) if told else ("is left:" not in printed)
    assert "layer_widths" not in printed


def test_a_training_checkpoint(tmp_path, capsys):
    """Its optimizer has groups without names, its average no names, and its options have tensors."""
    groups = [{"params": [0]}, {"params": [1, 2]}]
    content = {
        "model": {f"layers.{n}.w": torch.ones(2) for n in range(3)},
        "optimizer": {"state": {}, "param_groups": groups},
        "ema": [torch.ones(2)] * 3,
        "args": {"n_layer": 3, "dense_layers": [torch.ones(1), 2]},
    }
    torch.save(content, tmp_path / "in.pt")
    command = ["prune", str(tmp_path / "in.pt"), "--kept", "2", "--out", str(tmp_path / "out.pt")]
    assert cli.main(command) == 2
    assert "--without-optimizer" in capsys.readouterr().err
    assert cli.main([*command, "--without-optimizer"]) == 0
    assert set(torch.load(tmp_path / "out.pt")) == {"model", "ema", "args"}
    printed = capsys.readouterr().out
    assert 'in.pt: dense_layers = ["tensor([1.])", 2], ema = "3 tensors"' in printed


def test_files_that_are_broken_are_named(source, capsys):
    folder = source.parent
    (folder / "cut.safetensors").write_bytes(source.read_bytes()[:-1])
    torch.save({"path": pathlib.PurePosixPath("a")}, folder / "code.pt")
    (folder / "cut.pt").write_bytes((folder / "code.pt").read_bytes()[:-100])
    (folder / "index").mkdir()
    (folder / "index" / "model.safetensors.index.json").write_text("{}")
    before = sorted(os.listdir(folder))
    for name in ("cut.safetensors", "code.pt", "cut.pt", "index"):
        assert call(folder / name, "--kept", "1", out=f"out{pathlib.Path(name).suffix}") == 2
        assert name in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before


def test_safetensors_is_asked_for_where_it_is_needed(source, capsys, monkeypatch):
    monkeypatch.setattr("layerdrop_fast.recipes.prune.find_spec", lambda name: None)
    torch.save({f"layers.{n}.w": torch.ones(2) for n in range(4)}, source.parent / "in.pt")
    assert call(source.parent / "in.pt", "--kept", "2", out="out.pt") == 0
    assert set(torch.load(source.parent / "out.pt")) == {"layers.0.w", "layers.1.w"}
    for other in (source, source.parent):
        assert call(other, "--kept", "1") == 2
        assert "prune needs safetensors: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [False, True])
def test_a_model_of_this_program_has_its_record_as_soon_as_it_has_its_name(tmp_path, monkeypatch, folder):
    state = {f"stack.layers.{n}.w": torch.full((2,), float(n)) for n in range(4)}
    source, out = (tmp_path / f"{name}{'' if folder else '.safetensors'}" for name in ("in", "out"))
    if folder:
        source.mkdir()
    save_checkpoint(source / "model.safetensors" if folder else source, state, {"settings": {"num_layers": 4}, "x": 1})

    def interrupted(path):
        if out.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("layerdrop_fast.prune.new_output.sync_folder", interrupted)
    assert cli.main(["prune", str(source), "--keep", "1,3", "--out", str(out)]) == 130
    tensors, record = load_checkpoint(out / "model.safetensors" if folder else out)
    assert record == {"settings": {"num_layers": 2}, "x": 1, "kept": [1, 3]}
    assert [tensors[f"stack.layers.{n}.w"][0].item() for n in range(2)] == [1, 3]
