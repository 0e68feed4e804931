"""The examples of docs/pruning.md run in their order, as they stand."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerdrop_fast.models import TransformerLM

PAGE = Path(__file__).parents[2] / "docs/pruning.md"


def network():
    return TransformerLM(32, 8, 4, 16, 16, max_len=16, schedule=0.5, seed=0)


def mean_loss(seed):
    windows = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(seed))
    return lambda model: model.loss(windows[:, :-1], windows[:, 1:]).item()


@pytest.mark.filterwarnings("error")
def test_the_examples_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = network()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "model.safetensors")
    names = {
        "model": model,
        "fresh": network(),
        "evaluate": mean_loss(0),
        "evaluate_others": mean_loss(1),
        "batches": torch.randint(32, (20, 2, 2, 8)),
        "prompt": torch.randint(32, (1, 4)),
    }
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for number, example in enumerate(found, 1):
        exec(compile(example, f"pruning.md, example {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert {"held out", "every other"} <= set(re.findall(r"held out|every other", printed))
    assert printed.endswith("{'stack.layers': 16}\n")
    assert "# {'stack.layers': 16}" in PAGE.read_text()
    assert [len(names["small"].stack.layers), len(model.stack.layers)] == [8, 16]
    assert not torch.all(names["driven"].rates == 0.5)
    for file in ("model-8.safetensors", "half.safetensors"):
        assert {name.split(".")[2] for name in load_file(file) if name.startswith("stack.layers")} == set("01234567")
    assert len(names["moments"]["state"]) < len(names["optimizer"].state_dict()["state"])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["depth.png", "importance.png"]
    for name, value in names["again"].state_dict().items():
        assert torch.equal(value, names["narrow"].state_dict()[name])
