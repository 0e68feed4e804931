"""Checkpoints and atomic files: whole, or as they were before."""

import os
import resource
import subprocess
import sys
import time

import pytest
import torch

from layerdrop_fast.recipes.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from layerdrop_fast.recipes.files import RecipeError, locked, read_bytes, write_atomically

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "empty": torch.zeros(0, dtype=torch.bool)}
RECORD = {"step": 3, "numbers": [0.1, 1e-300], "name": "größe"}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", TENSORS, RECORD)
    return tmp_path / "x.safetensors"


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_comes_back_bit_for_bit(path):
    tensors, record = load_checkpoint(path)
    assert record == RECORD
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_a_plain_safetensors_reader_can_use_it(path):
    from safetensors.torch import load_file

    torch.testing.assert_close(load_file(path)["a.weight"], TENSORS["a.weight"])


def test_every_flipped_bit_is_noticed(path):
    content, noticed = path.read_bytes(), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            tensors, record = load_checkpoint(path)
        except RecipeError:
            noticed += 1
        else:  # white space that pads the header
            assert record == RECORD
            assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert noticed > len(content) - 16


@pytest.mark.parametrize("length", [0, 4, 8, 20, 200, -1])
def test_a_truncated_file_is_refused_and_left_there(path, length):
    content = path.read_bytes()[:length]
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="is damaged") as error:
        load_checkpoint(path)
    assert str(path) in one_line(error)
    assert "--restart" in one_line(error)
    assert path.read_bytes() == content


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="no checkpoint of this program"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_full_disk_leaves_the_earlier_file_and_no_litter(path):
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing beyond raises OSError
    try:
        with pytest.raises(RecipeError, match="cannot write") as error:
            save_checkpoint(path, {"big": torch.zeros(100_000)}, RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "untouched" in one_line(error)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(RecipeError, match="nothing was saved") as error:
        write_atomically(tmp_path / "absent" / "x", b"1")
    assert str(tmp_path / "absent" / "x") in one_line(error)
    with pytest.raises(RecipeError, match="cannot read"):
        read_bytes(tmp_path / "absent")


def test_a_reader_never_sees_half_a_file(tmp_path):
    """A writer is killed at random moments; what lies there is always one whole version."""
    path = tmp_path / "x.safetensors"
    writer = (
        "import sys, torch; from pathlib import Path; from layerdrop_fast.recipes.checkpoint import save_checkpoint\n"
        "for n in range(10**6):\n"
        "    save_checkpoint(Path(sys.argv[1]), {'w': torch.full((200_000,), n)}, {'n': n})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        seen = set()
        for _ in range(30):
            tensors, record = load_checkpoint(path)
            assert (tensors["w"] == record["n"]).all()
            seen.add(record["n"])
    finally:
        process.kill()
        process.wait()
    tensors, record = load_checkpoint(path)
    assert (tensors["w"] == record["n"]).all()
    assert len(seen) > 1


def test_other_settings_are_named_with_both_values(path):
    check_same_settings(path, {"steps": 5, "size": [1, 2], "more": 0}, {"steps": 5, "size": (1, 2)})
    with pytest.raises(RecipeError, match="steps = 5, this call has steps = 6") as error:
        check_same_settings(path, {"steps": 5}, {"steps": 6})
    assert str(path) in one_line(error)
    with pytest.raises(RecipeError, match="steps = None"):
        check_same_settings(path, None, {"steps": 6})


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
        with pytest.raises(RecipeError, match="another run is using"), locked(tmp_path / "new"):
            pass
    with locked(tmp_path / "new"):
        pass


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot use .*file as a folder"), locked(tmp_path / "file"):
        pass
