"""The README's example runs as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, STACK = (ROOT / "README.md").read_text(), (ROOT / "docs/stack.md").read_text()


def test_the_swap_in_example(capsys):
    example, fused = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    ran = int(capsys.readouterr().out.split()[0])
    assert ran == len(names["model"].plan(0).layers) < 12
    assert len(names["small"].layers) == 6
    assert names["small"](names["x"]).shape == (8, 32, 64)
    exec(compile(fused, "README.md", "exec"), names)
    assert 0 < names["model"].stats().realized_rates.mean() < 0.4


def test_the_example_of_the_stacks_page(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", STACK, flags=re.DOTALL)
    exec(compile(example, "stack.md", "exec"), {})
    assert "layers_run=" in capsys.readouterr().out


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
