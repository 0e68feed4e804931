"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerdrop_fast._files import ABANDONED_AFTER, sync_folder


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A path for the block to write a file or folder at, which becomes ``out``, on the disk, once it has ended well.

    What a process left that was killed within the block is removed by a call for the same ``out`` an hour later.

    Raises:
        ValueError: ``out`` exists by then; it is as it was.
    """
    _remove_abandoned(out)
    with tempfile.TemporaryDirectory(prefix=_prefix(out), dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        yield temporary
        _sync(temporary)
        check_new(out)
        temporary.rename(out)
    sync_folder(out.parent)


def check_new(out: Path) -> None:
    """Nothing has the name ``out``, not even a link to nowhere."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists, expected a new name")


def _prefix(out: Path) -> str:
    return f".{out.name}.prune-"


def _remove_abandoned(out: Path) -> None:
    for folder in out.parent.iterdir():
        if folder.name.startswith(_prefix(out)):
            try:
                last = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if time.time() - last > ABANDONED_AFTER:
                    shutil.rmtree(folder)
            except OSError:  # gone by now, no folder, or another user's: no reason not to write
                continue


def _sync(path: Path) -> None:
    """Brings what was written to the disk: a rename may get there before it."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())
