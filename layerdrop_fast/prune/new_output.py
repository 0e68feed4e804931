"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerdrop_fast._files import sync_folder


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A path for the block to write a file or folder at, which becomes ``out``, on the disk, once it has ended well."""
    with tempfile.TemporaryDirectory(prefix=".prune-", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        yield temporary
        _sync(temporary)
        temporary.rename(out)
    sync_folder(out.parent)


def _sync(path: Path) -> None:
    """Brings what was written to the disk: a rename may get there before it."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())
