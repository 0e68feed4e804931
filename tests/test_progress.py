"""What a user sees of a run that is under way."""

import sys

from layerdrop_fast import _progress as progress


def test_without_a_terminal_the_end_of_a_stage_is_one_plain_line(capsys):
    with progress.stage("training dense", 3) as update:
        for done in (1, 2, 3):
            update(done, f"loss {done}")
    assert capsys.readouterr().out.startswith("training dense: 3/3  loss 3  ")


def test_without_a_terminal_a_long_stage_tells_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with progress.stage("training", 3) as update:
        update(1, "a")
        update(2, "b")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with progress.stage("training", 3) as update:
        update(3, "loss 1.5 bits/byte")
    printed = capsys.readouterr().out
    assert "━" in printed
    assert "loss 1.5 bits/byte" in printed
