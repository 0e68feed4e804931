"""new_output: what has the name already stays, and what killed processes left goes."""

import os
import time

import pytest

from layerdrop_fast.prune.new_output import check_new, new_output


def write(out, folder=False, meanwhile=lambda: None):
    with new_output(out) as temporary:
        if folder:
            temporary.mkdir()
            temporary /= "file"
        temporary.write_text("new")
        meanwhile()


@pytest.mark.parametrize("folder", [False, True])
def test_what_appears_meanwhile_stays(tmp_path, folder):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out exists, expected a new name"):
        write(out, folder, out.mkdir if folder else lambda: out.write_text("theirs"))
    assert os.listdir(out) == [] if folder else out.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_nowhere_stays(tmp_path):
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="out exists, expected a new name"):
        check_new(out)
    with pytest.raises(ValueError, match="out exists"):
        write(out)
    assert os.readlink(out) == str(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["out"]


def abandoned(tmp_path, name, ago, inside):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "half").write_text("half of it")
    for path, seconds in ((folder / "half", inside), (folder, ago)):
        os.utime(path, (time.time() - seconds,) * 2)
    return name


def test_what_killed_processes_left_is_removed(tmp_path):
    abandoned(tmp_path, ".out.prune-killed", 4000, 3700)
    stay = [
        abandoned(tmp_path, ".out.prune-at-work", 4000, 3000),
        abandoned(tmp_path, ".other.prune-killed", 4000, 4000),
        abandoned(tmp_path, ".prune-mine", 4000, 4000),
    ]
    (tmp_path / ".out.prune-file").write_text("mine")
    os.utime(tmp_path / ".out.prune-file", (0, 0))
    write(tmp_path / "out", folder=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, ".out.prune-file", "out"])
