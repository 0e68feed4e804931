"""Runs beside each other."""

import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.pool import read_results, run_missing


def halved(number):
    if number % 2:
        raise ValueError(f"{number} is odd")
    return {"number": number, "half": number // 2}


def noted(folder, number):
    (folder / f"{number}").touch()
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": number, "process": os.getpid()}


def run_noted(folder, *numbers, tell):
    (folder / "runs").mkdir()
    return run_missing(
        folder / "results.json",
        {number: (folder / "runs", number) for number in numbers},
        noted,
        lambda result: result["number"],
        jobs=1,
        command=["x"],
        tell=tell,
    )


def test_each_run_has_its_own_process_and_one_that_is_killed_takes_no_other_with_it(tmp_path):
    told = []
    with pytest.raises(BrokenProcessPool):
        run_noted(tmp_path, 2, 3, 4, tell=told.append)
    assert [result["number"] for result in told] == [2, 4]
    assert len({result["process"] for result in told} - {os.getpid()}) == 2


def test_what_has_not_begun_when_it_is_stopped_does_not_begin(tmp_path):
    def stop(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_noted(tmp_path, *range(10, 20), tell=stop)
    assert len(list((tmp_path / "runs").iterdir())) <= 2
    assert [result["number"] for result in read_results(tmp_path / "results.json")] == [10]


def test_what_fails_takes_nothing_with_it(tmp_path):
    out, told = tmp_path / "results.json", []

    def missing(*numbers):
        return run_missing(
            out,
            {number: (number,) for number in numbers},
            halved,
            lambda result: result["number"],
            jobs=1,
            command=["x"],
            tell=told.append,
        )

    with pytest.raises(ValueError, match="3 is odd"):
        missing(2, 3, 5, 4)
    assert sorted(result["half"] for result in json.loads(out.read_text())["results"]) == [1, 2]
    assert [result["half"] for result in missing(2, 8)][-1] == 4
    assert [result["number"] for result in told] == [2, 4, 8]


def test_each_result_names_its_commit_and_machine(tmp_path, monkeypatch):
    out = tmp_path / "new" / "results.json"
    for number, commit in ((2, "one"), (4, "another")):
        monkeypatch.setattr("layerdrop_fast._provenance.commit", lambda commit=commit: commit)
        monkeypatch.setattr("layerdrop_fast._provenance.machine", lambda _, commit=commit: f"machine of {commit}")
        wanted = {number: (number,) for number in (2, number)}
        run_missing(out, wanted, halved, lambda result: result["number"], jobs=1, command=["x"], tell=lambda _: None)
    content = json.loads(out.read_text())
    assert [(result["number"], result["commit"]) for result in content["results"]] == [(2, "one"), (4, "another")]
    assert [result["machine"] for result in content["results"]] == ["machine of one", "machine of another"]
    assert content["provenance"]["commit"] == "another"


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(RecipeError, match=r"other\.json is no file of results"):
        read_results(tmp_path / "other.json")
