"""What the report writes, and what a run records for it."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.report.__main__ import main
from benchmarks.report.page import PAGE, PICTURES, README, replaced
from benchmarks.report.plots import PLOTS, plots
from benchmarks.report.read import read
from benchmarks.test_step import RATES
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY
from layerdrop_fast.recipes.files import RecipeError
from tests.benchmarks.results import (
    ABOUT,
    COMMIT,
    MIB,
    OTHER,
    ROOT,
    content,
    depth,
    judged,
    memory,
    parts,
    step,
    steps,
    stored,
)


def test_everything_is_written_between_its_markers(results, root, capsys):
    stored(results, one=content(steps()), two=content(depth() + memory() + parts(), "2026-01-02T00:00:00+00:00", OTHER))
    before, _, rest = (root / README).read_text().partition("<!-- report:step-table -->")
    after = rest.partition("<!-- /report:step-table -->")[2]
    assert main([str(results), "--root", str(root)]) == 0
    readme, page = (root / README).read_text(), (root / PAGE).read_text()
    assert before
    assert readme.startswith(before)
    assert after
    assert readme.endswith(after)
    block = readme.partition("<!-- report:step-table -->")[2].partition("<!-- /report:step-table -->")[0]
    assert block.count("p = 0.5 by") == 2
    assert block.count("\nsubset") == 2  # a line of the table of samples, a note
    assert block.count("\nours") == 3
    assert "a processor, 2 cores, threads: 2; python 3.11.7, torch 2.13.0" in block
    assert f"`{COMMIT[:12]}`, 2026-01-01; `python -m pytest benchmarks`" in block
    assert page.count("p = 0.2 by") == 2
    assert "Not measured" not in page
    for name in PLOTS:
        assert f"](performance/{name}.png)" in page
        assert (root / PICTURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| saved bytes: ours / skip | batch, p = 0 | ≤ 0.57 | 0.500 | hit, 12.3% to spare |" in page
    said = capsys.readouterr().out
    assert "missing" not in said
    assert said.splitlines()[0] == "31 of 31 hit."
    # Again, with the same results, nothing changes.
    assert main([str(results), "--root", str(root)]) == 0
    assert ((root / README).read_text(), (root / PAGE).read_text()) == (readme, page)


@pytest.mark.parametrize(
    ("rows", "drawn", "lacking"),
    [
        (step, {"steps"}, ["depth", "memory", "parts"]),
        (depth, {"depth"}, ["step", "memory", "parts"]),
        (memory, {"course", "bounds", "recompute"}, ["step", "depth", "parts"]),
        (parts, {"parts"}, ["step", "depth", "memory"]),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_made(results, root, capsys, rows, drawn, lacking):
    assert main([str(stored(results, some=content(rows()))), "--root", str(root)]) == 0
    said, page = capsys.readouterr().out, (root / PAGE).read_text()
    assert {path.stem for path in (root / PICTURES).iterdir()} == drawn
    for suite in lacking:
        assert f"missing: suite {suite}" in said
    for name in PLOTS:
        assert (f"missing: plot {name}" in said) is (name not in drawn)
        assert (f"performance/{name}.png" in page) is (name in drawn)
    assert ("Not measured on this machine" in (root / README).read_text()) is ("step" in lacking)


def test_plots_differ_with_what_they_show(results):
    found = plots(read(stored(results, all=content(steps() + depth() + memory() + parts()))))
    changed = judged(
        steps() + depth() + memory() + parts(), ours=lambda row: {"saved_bytes": 7 * MIB, "peak_bytes": 9 * MIB}
    )
    other = plots(read(stored(results, all=content(changed))))
    assert {name for name in PLOTS if found[name].png != other[name].png} == set(PLOTS) - {"course", "parts"}
    assert all(len(picture.png) > 10_000 for picture in found.values())
    shown = [contest.by_way()["dense"].setting for contest in found["steps"].contests]
    assert [(of.granularity, of.p) for of in shown] == [(of, p) for of in BY_GRANULARITY for p in RATES]


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- report:a -->",
        "<!-- /report:a --> <!-- report:a -->",
        "<!-- report:a --> <!-- /report:a --> <!-- report:a -->",
        "<!-- report:a --> <!-- report:a --> <!-- /report:a -->",
        "<!-- report:b --> <!-- /report:b -->",
    ],
)
def test_a_file_without_its_markers_is_an_error(text):
    with pytest.raises(RecipeError, match=r"PAGE needs <!-- report:a --> and <!-- /report:a -->"):
        replaced(text, "a", "block", "PAGE")


def test_a_block_replaces_what_was_between_its_markers():
    text = "before <!-- report:a -->\nold\n<!-- /report:a --> after <!-- report:b -->\nkept\n<!-- /report:b -->"
    expected = text.replace("old", "new\n\nlines")
    assert replaced(text, "a", "new\n\nlines\n", "PAGE") == expected


def test_nothing_is_written_where_one_marker_is_missing(results, root, capsys):
    stored(results, all=content(depth()))
    for name, marker in ((README, "<!-- /report:step-table -->"), (PAGE, "<!-- report:all-tables -->")):
        whole = (root / name).read_text()
        (root / name).write_text(whole.replace(marker, ""))
        before = {path: path.read_text() for path in (root / README, root / PAGE)}
        assert main([str(results), "--root", str(root)]) == 1
        assert f"error: {name} needs" in capsys.readouterr().err
        assert {path: path.read_text() for path in before} == before
        assert not (root / PICTURES).exists()
        (root / name).write_text(whole)


def test_a_file_that_cannot_be_replaced_stays_as_it_was(results, root, capsys, monkeypatch):
    stored(results, all=content(step()))
    before = (root / README).read_text(), (root / PAGE).read_text()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main([str(results), "--root", str(root)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert ((root / README).read_text(), (root / PAGE).read_text()) == before
    assert not [path for path in root.rglob("*") if path.suffix in (".tmp", ".png")]


BENCHMARKS = """
import pytest
from benchmarks.conftest import *
from benchmarks.replay import CLOCK, replay

THREADS = 1

@pytest.mark.benchmark(timer=CLOCK)
def test_good(benchmark):
    replay(benchmark, [1.0, 2.0])

def test_other():
    assert {good}

@pytest.fixture
def broken():
    assert {good}

def test_broken(broken):
    pass

def test_last():
    {last}
"""


@pytest.mark.parametrize(
    ("good", "last", "failed", "status"),
    [(True, "pass", 0, 0), (False, "raise KeyboardInterrupt", 2, 2)],
)
def test_a_run_records_how_it_ended(tmp_path, good, last, failed, status):
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks/conftest.py").read_text())
    (tmp_path / "test_small.py").write_text(BENCHMARKS.format(good=good, last=last))
    file = tmp_path / "found.json"
    arguments = ["test_small.py", "-p", "no:cacheprovider", f"--benchmark-json={file}", "-k", "not nothing"]
    run = [sys.executable, "-m", "pytest", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    found = json.loads(file.read_text())
    assert (found["run"]["failed"], found["run"]["exit status"]) == (failed, status)
    assert found["run"]["command"].startswith("python -m pytest test_small.py")
    assert found["run"]["command"].endswith("-k 'not nothing'")
    assert set(ABOUT) <= set(found["machine_info"])
    assert "cores" in found["machine_info"]["machine"]
    assert "node" not in found["machine_info"]
    assert found["benchmarks"][0]["extra_info"]["threads"] == 1
