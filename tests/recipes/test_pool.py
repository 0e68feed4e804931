"""Runs beside each other."""

import json

import pytest

from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.pool import read_results, run_missing


def halved(number):
    if number % 2:
        raise ValueError(f"{number} is odd")
    return {"number": number, "half": number // 2}


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


def test_each_result_names_its_commit(tmp_path, monkeypatch):
    out = tmp_path / "new" / "results.json"
    for number, commit in ((2, "one"), (4, "another")):
        monkeypatch.setattr("layerdrop_fast._provenance.commit", lambda commit=commit: commit)
        wanted = {number: (number,) for number in (2, number)}
        run_missing(out, wanted, halved, lambda result: result["number"], jobs=1, command=["x"], tell=lambda _: None)
    content = json.loads(out.read_text())
    assert [(result["number"], result["commit"]) for result in content["results"]] == [(2, "one"), (4, "another")]
    assert content["provenance"]["commit"] == "another"


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(RecipeError, match=r"other\.json is no file of results"):
        read_results(tmp_path / "other.json")
