"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, STACK = (ROOT / "README.md").read_text(), (ROOT / "docs/stack.md").read_text()


def test_the_swap_in_example(capsys):
    example, fused, pruning = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    ran = len(names["model"].plan(0).layers)
    assert capsys.readouterr().out == f"{ran / 12:.0%} of the work was done\n"
    assert ran < 12
    assert len(names["small"].layers) == 6
    assert names["small"](names["x"]).shape == (8, 32, 64)
    exec(compile(fused, "README.md", "exec"), names)
    assert 0 < names["model"].stats().realized_rates.mean() < 0.4
    exec(compile(pruning, "README.md", "exec"), names)
    assert "every other" in capsys.readouterr().out
    assert len(names["found"].keep) == 9


def test_the_example_of_the_stacks_page(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", STACK, flags=re.DOTALL)
    exec(compile(example, "stack.md", "exec"), {})
    assert "layers_run=" in capsys.readouterr().out


def test_the_example_of_the_targets_page():
    make, cut = re.findall(r"```python\n(.*?)```", (ROOT / "docs/targets.md").read_text(), flags=re.DOTALL)
    names = {}
    for example in (make, cut):
        exec(compile(example.replace("512", "16").replace("2048", "32"), "targets.md", "exec"), names)
    assert make.count("TransformerStack(") == 4
    first = names["narrow"].layers[0]
    assert (first.self_attn.nhead, first.linear1.out_features) == (4, 16)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
