"""Scores that are kept in a file: for the same model and evaluate only, and whole whatever happens."""

import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from layerdrop_fast._files import ABANDONED_AFTER, replace_atomically
from layerdrop_fast.prune import layer_importance, search
from layerdrop_fast.prune.scores import Scores
from tests.prune.blocks import blocks
from tests.prune.test_search import LISTS, Model, brute_force, evaluate


def test_it_goes_on_where_it_was_stopped(tmp_path):
    model, file = Model(LISTS["ModuleList"](6)), tmp_path / "scores.json"
    calls = []

    def stopping(model):
        calls.append(1)
        if len(calls) == 10:  # two of which are checks
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        search(model, stopping, kept=3, layers="layers", resume=file)
    assert len(json.loads(file.read_text())["scores"]) == 7
    calls.clear()

    def counting(model):
        calls.append(1)
        return evaluate(model)

    found = search(model, counting, kept=3, layers="layers", resume=file)
    # Three of the known ones, to see that they are of this model; two are checked with all layers.
    assert len(calls) == math.comb(6, 3) - 7 + 3 + 2
    assert {tuple(row.keep): row.value for row in found.ranked} == pytest.approx(brute_force(model, 3), rel=1e-6)
    assert found.layers_asked == 3 * (math.comb(6, 3) - 7)
    calls.clear()
    again = search(model, counting, kept=3, layers="layers", resume=file)
    assert again.ranked == found.ranked
    assert len(calls) == 3 + 1
    assert (again.layers_run, again.layers_asked) == (0, 0)  # but those of checks


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_checks_of_a_file_are_not_counted_and_share_nothing(tmp_path, share_prefixes):
    model, file = Model(LISTS["ModuleList"](5)), tmp_path / "scores.json"
    given = dict(share_prefixes=share_prefixes, resume=file)
    Scores(model, "layers", evaluate, **given).of([(0, 1, 2)])
    scores = Scores(model, "layers", evaluate, **given)
    assert (scores.layers_run, scores.layers_asked) == (0, 0)
    scores.of([(0, 1, 2), (0, 1, 3)])
    assert (scores.layers_run, scores.layers_asked) == (3, 3)


def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path):
    model = Model(LISTS["ModuleList"](4))
    given = dict(kept=2, layers="layers", share_prefixes=False)
    for measure in (search, layer_importance):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            measure(model, evaluate, resume=tmp_path / "nowhere" / "scores.json", **given)
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            measure(model, evaluate, resume=tmp_path, **given)
    assert not any(layer.calls for layer in model.layers)
    assert not list(tmp_path.iterdir())


def test_scores_of_another_model_are_refused(tmp_path):
    file = tmp_path / "scores.json"
    search(Model(LISTS["ModuleList"](4)), evaluate, kept=2, layers="layers", resume=file)
    before = file.read_bytes()
    other = Model(nn.ModuleList(blocks(4, seed=99)))
    with pytest.raises(ValueError, match=r"scores\.json holds scores of another model: weights is "):
        search(other, lambda model: 1.0, kept=2, layers="layers", resume=file, share_prefixes=False)
    deeper = Model(LISTS["ModuleList"](5))
    with pytest.raises(ValueError, match=r"scores\.json holds scores of another model: depth is 4, expected 5"):
        search(deeper, evaluate, kept=2, layers="layers", resume=file)
    two = nn.ModuleDict({"layers": nn.ModuleList(blocks(4)), "other": nn.ModuleList(blocks(4))})
    with pytest.raises(ValueError, match="another model: list is 'layers', expected 'other'"):
        search(two, evaluate, kept=2, layers="other", resume=file)
    assert file.read_bytes() == before
    for content in ("{}", "[]", "no", '{"scores": []}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"scores\.json holds no scores of a search"):
            search(Model(LISTS["ModuleList"](4)), evaluate, kept=2, layers="layers", resume=file)


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("kind", ["scores", "held_out"])
def test_the_first_middle_and_last_score_are_checked(tmp_path, place, kind):
    model, file = Model(LISTS["ModuleList"](4)), tmp_path / "scores.json"
    given = dict(kept=2, layers="layers", held_out=evaluate, resume=file)
    search(model, evaluate, **given)
    content = json.loads(file.read_text())
    content[kind][place][1] *= 1.001
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"for the layers .*\({kind}\), got .*another model or another evaluate"):
        search(model, evaluate, **given)


def test_scores_near_zero_may_differ_by_rounding(tmp_path):
    model, file = Model(LISTS["ModuleList"](4)), tmp_path / "scores.json"
    scores = {(0, 1): 1.0, (1, 2): 1e-9, (2, 3): -1e-9}
    first = Scores(model, "layers", lambda model: evaluate(model) * 0 + 1.0, resume=file)
    first.of(scores)
    content = json.loads(file.read_text())
    content["scores"] = [[list(subset), value] for subset, value in scores.items()]
    file.write_text(json.dumps(content))
    again = {tuple(model.layers[index] for index in subset): -value for subset, value in scores.items()}
    again[tuple(model.layers[:2])] = 1.0
    known = Scores(model, "layers", lambda model: again[tuple(model.layers)], share_prefixes=False, resume=file)
    assert known.of(scores) == scores


def test_held_out_scores_that_are_known_are_not_computed_again(tmp_path):
    file, asked, model = tmp_path / "scores.json", [], Model(LISTS["ModuleList"](4))

    def other(model):
        asked.append(1)
        return -evaluate(model)

    given = dict(kept=2, layers="layers", held_out=other, top=20, resume=file, share_prefixes=False)
    found = search(model, evaluate, **given)
    assert len(asked) == 6
    again = search(model, evaluate, **given)
    assert len(asked) == 6 + 3  # which are checked
    assert again.ranked == found.ranked
    assert again.every_other == found.every_other


def test_scores_are_saved_while_it_runs(tmp_path, monkeypatch):
    file, seen = tmp_path / "scores.json", []
    monkeypatch.setattr("layerdrop_fast.prune.scores.SECONDS_BETWEEN_SAVES", -1.0)

    def counting(model):
        seen.append(len(json.loads(file.read_text())["scores"]) if file.exists() else 0)
        return evaluate(model)

    search(Model(LISTS["ModuleList"](4)), counting, kept=2, layers="layers", resume=file, share_prefixes=False)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    file, replace = tmp_path / "file", os.replace

    def meanwhile(source, target):
        monkeypatch.setattr(os, "replace", replace)
        replace_atomically(file, b"other")
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    replace_atomically(file, b"own")
    assert file.read_bytes() == b"own"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error):
    file = tmp_path / "file"
    file.write_bytes(b"before")

    def fails(source, target):
        raise error

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(error):
        replace_atomically(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    file = tmp_path / "file"
    program = f"""
import os, pathlib
from layerdrop_fast import _files
os.replace = lambda *_: os.kill(os.getpid(), 9)
_files.replace_atomically(pathlib.Path({str(file)!r}), b"never there")
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    bystanders = [tmp_path / name for name in (".other.1-0.tmp", ".file.txt", "file.tmp", ".file.folder.tmp")]
    for bystander in bystanders:
        bystander.mkdir() if "folder" in bystander.name else bystander.write_bytes(b"")
        os.utime(bystander, (0, 0))
    replace_atomically(file, b"now")
    assert left.exists(), "another process may still be at it"
    hour_ago = time.time() - ABANDONED_AFTER - 1
    os.utime(left, (hour_ago, hour_ago))
    replace_atomically(file, b"later")
    assert sorted(tmp_path.iterdir()) == sorted([file, *bystanders])


def test_what_another_process_has_removed_is_no_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / ".file.1-0.tmp"]))
    replace_atomically(file, b"now")
    assert file.read_bytes() == b"now"


def test_content_and_folder_reach_the_disk_around_the_move(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def moved(source, target):
        done.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    replace_atomically(tmp_path / "file", b"now")
    assert done == ["file", "move", "folder"]
