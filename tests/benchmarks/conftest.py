"""Folders for the report."""

import pytest

from benchmarks.report.page import PAGE, README
from tests.benchmarks.results import ROOT


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def root(tmp_path):
    """A checkout, as far as the report writes into it."""
    folder = tmp_path / "root"
    (folder / "docs").mkdir(parents=True)
    for name in (README, PAGE):
        (folder / name).write_text((ROOT / name).read_text())
    return folder
