"""prune_checkpoint on folders as transformers saves them: weights of two kinds, shards, and what lies beside them."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerdrop_fast.prune import prune_checkpoint
from tests.prune.test_checkpoint_files import assert_same, choose, expected, model_of

MODEL = model_of()
WHOLE = MODEL.state_dict()
SMALL = expected(MODEL)
KINDS = {
    "safetensors": ("model", "safetensors", save_file, load_file),
    "bin": ("pytorch_model", "bin", torch.save, lambda path: torch.load(path, weights_only=True)),
}


def save_shards(folder, kind, parts, index=None):
    """State dicts, one a shard, and an index of them, or another one."""
    name, suffix, save, _ = KINDS[kind]
    folder.mkdir()
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{name}-{number:05d}-of-{len(parts):05d}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    written = {"metadata": {"total_size": 440, "total_parameters": 110, "format": "x"}, "weight_map": weight_map}
    (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index(written) if index else written))


def dealt(count):
    """The whole state dict in so many parts."""
    return [dict(list(WHOLE.items())[number::count]) for number in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_as_transformers_saves_it(tmp_path, kind, shards):
    name, suffix, save, load = KINDS[kind]
    source, out = tmp_path / "in", tmp_path / "out"
    if shards == 1:
        source.mkdir()
        save(WHOLE, source / f"{name}.{suffix}")
    else:
        save_shards(source, kind, dealt(shards))
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "model_type": "x"}))
    (source / "tokenizer.json").write_text("{}")
    cut = prune_checkpoint(source, out, choose)
    assert json.loads((out / "config.json").read_text()) == {"num_hidden_layers": 3, "model_type": "x"}
    assert (out / "tokenizer.json").read_text() == "{}"
    files = sorted(out.glob(f"*.{suffix}"))
    assert len(files) == shards
    got = {}
    for file in files:
        got |= load(file)
    assert_same(got, SMALL)
    assert (cut.bytes_before, cut.bytes_after, cut.left_out) == (440, 280, ())
    if shards > 1:
        index = json.loads((out / f"{name}.{suffix}.index.json").read_text())
        assert set(index["weight_map"]) == set(SMALL)
        assert index["metadata"] == {"total_size": 280, "format": "x"}
        for entry, file in index["weight_map"].items():
            assert entry in load(out / file)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_which_nothing_is_left_are_not_written(tmp_path, kind):
    layers = [{name: value for name, value in WHOLE.items() if f".{layer}." in name} for layer in range(5)]
    head = {name: value for name, value in WHOLE.items() if name.startswith("head")}
    save_shards(tmp_path / "in", kind, [*layers, head])
    prune_checkpoint(tmp_path / "in", tmp_path / "out", choose)
    name, suffix, _, load = KINDS[kind]
    stay = [f"{name}-0000{number}-of-00006.{suffix}" for number in (1, 3, 4, 6)]
    index = f"{name}.{suffix}.index.json"
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*stay, index])
    assert set(json.loads((tmp_path / "out" / index).read_text())["weight_map"].values()) == set(stay)
    assert set(load(tmp_path / "out" / stay[1])) == {"layers.1.linear.weight", "layers.1.linear.bias"}


def moved(index):
    files = sorted(set(index["weight_map"].values()))
    return {"weight_map": {**index["weight_map"], "head.weight": files[index["weight_map"]["head.weight"] == files[0]]}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("parts", "index", "message"),
    [
        (
            dealt(2),
            lambda index: {"weight_map": {**index["weight_map"], "layers.2.b": index["weight_map"]["head.bias"]}},
            r"index.json says that 'layers.2.b' is in .*, but no shard has it",
        ),
        (dealt(2), moved, r"index.json says that 'head.weight' is in .*-0000\d-of.*, but it is in .*-0000\d-of"),
        (
            [WHOLE, {"head.bias": torch.ones(2)}],
            None,
            r"has 'head.bias' in .*1-of-00002.* and in .*2-of-0.*, expected i",
        ),
    ],
)
def test_shards_are_compared_with_their_index(tmp_path, kind, parts, index, message):
    save_shards(tmp_path / "in", kind, parts, index)
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", choose)
    assert os.listdir(tmp_path) == ["in"]


def test_shards_that_are_not_there_are_named(tmp_path):
    save_shards(tmp_path / "in", "safetensors", dealt(2))
    (tmp_path / "in" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no model-00002-of-00002.safetensors, expected all shards that model.saf"
    ):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", choose)


def test_a_folder_with_another_thing_in_the_place_of_weights(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save([1], tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds a list, expected a state dict"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", choose)
    torch.save({"n": 1, **WHOLE}, tmp_path / "in" / "pytorch_model.bin")
    assert prune_checkpoint(tmp_path / "in", tmp_path / "out", choose).bytes_before == 440


def test_what_goes_along_and_what_is_left_out(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "onnx").mkdir(parents=True)
    save_file(WHOLE, source / "model.safetensors")
    along = ["README.md", "LICENSE", "NOTICE.txt", "chat_template.jinja", "generation_config.json", "merges.txt"]
    along += ["modeling_x.py", "qwen.tiktoken", "spiece.model", "bpe.codes"]
    left = [
        "model.gguf",
        "model.onnx",
        "rust_model.ot",
        "trainer_state.json",
        "metrics.json",
        "optimizer.pt",
        "training_args.bin",
    ]
    left += [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "adapter.safetensors",
        "rng_state.pth",
        ".gitattributes",
    ]
    for name in (*along, *left):
        (source / name).write_text(name)
    cut = prune_checkpoint(source, out, choose)
    assert sorted(os.listdir(out)) == sorted([*along, "model.safetensors"])
    assert [(out / name).read_text() for name in along] == along
    assert cut.left_out == tuple(sorted([*left, "onnx/"]))


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"layers.0.w": "../victim.safetensors"}},
        {"weight_map": {"layers.0.w": "inner/victim.safetensors"}},
        {"weight_map": {"layers.0.w": "/tmp/victim.safetensors"}},
        {"weight_map": {"layers.0.w": ".."}},
        {"weight_map": {"layers.0.w": 3}},
        {"weight_map": {"layers.0.w": "config.json"}},
        {"weight_map": ["model.safetensors"]},
        {"metadata": {}},
        {"weight_map": {}, "metadata": [1]},
    ],
)
def test_shards_lie_in_their_folder(tmp_path, index):
    (tmp_path / "in" / "inner").mkdir(parents=True)
    for victim in (tmp_path, tmp_path / "in" / "inner"):
        save_file({f"layers.{n}.w": torch.ones(2) for n in range(5)}, victim / "victim.safetensors")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    before = (tmp_path / "victim.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"model.safetensors.index.json (names|has no weight_map|has the metadata)"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", choose)
    assert (tmp_path / "victim.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in", "victim.safetensors"]
