"""``layerdrop-fast bench``."""

import functools
import json

import pytest
import torch

from layerdrop_fast import cli
from layerdrop_fast.recipes.bench import command
from layerdrop_fast.recipes.bench.measure import figures_of, measure
from layerdrop_fast.recipes.bench.table import table
from layerdrop_fast.recipes.training import Stopped

TINY = ["--layers", "4", "--d-model", "8", "--dim-feedforward", "16", "--nhead", "2", "--samples", "2", "--length", "4"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "measure", functools.partial(measure, draws=3))


def bench(*arguments):
    return cli.main(["bench", "--device", "cpu", *TINY, *arguments])


def test_it_prints_the_table_and_writes_what_it_measured(capsys, tmp_path):
    file = tmp_path / "figures.json"
    ways = ("skip", "ours", "limit")
    assert bench("--p", "0.25", "--rounds", "2", "--ways", *ways, "--out", str(file)) == 0
    content = json.loads(file.read_text())
    figures = {record["way"]: figures_of(record) for record in content["figures"]}
    assert tuple(figures) == ways
    assert all(len(row.seconds) == 2 for row in figures.values())
    assert figures["ours"].setting.p == 0.25
    assert content["provenance"]["command"].startswith("layerdrop-fast")
    printed = capsys.readouterr().out
    assert table(figures) in printed
    assert "4 layers, d 8, FFN 16, 2 heads, 2 x 4 tokens, float32, dropout 0.1, p = 0.25 by batch" in printed
    assert "cores, threads: 1, torch" in printed


def test_threads_are_set(monkeypatch, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    seen = []
    monkeypatch.setattr(command, "measure", lambda *_, **__: seen.append(torch.get_num_threads()) or {})
    assert bench("--threads", "2") == 0
    assert seen == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "skip", "subset"], "no way 'subset' at granularity 'batch', expected some of: dense, masked"),
        (["--granularity", "sample", "--ways", "skip"], "no way 'skip' at granularity 'sample'"),
        (["--nhead", "3"], "d_model is 8, expected a multiple of nhead, 3"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
    ],
)
def test_what_can_be_mended_is_said_in_a_line(capsys, arguments, message):
    assert bench(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"layerdrop-fast: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("rate", ["1.5", "nan", "half"])
def test_rates_are_checked(capsys, rate):
    with pytest.raises(SystemExit) as ended:
        bench("--p", rate)
    assert ended.value.code == 2
    assert f"'{rate}' is not a number from 0 to 1" in capsys.readouterr().err


def test_ctrl_c_writes_nothing(capsys, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr(command, "measure", stop)
    file = tmp_path / "figures.json"
    assert bench("--out", str(file)) == 130
    assert not file.exists()
    assert capsys.readouterr().err == "\nStopped.\n"
