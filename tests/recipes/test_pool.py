"""Runs beside each other."""

import json

import pytest

from layerdrop_fast.recipes.pool import run_missing


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
        missing(2, 3, 4)
    assert sorted(result["half"] for result in json.loads(out.read_text())["results"]) == [1, 2]
    assert [result["half"] for result in missing(2, 8)][-1] == 4
    assert [result["number"] for result in told] == [2, 4, 8]
