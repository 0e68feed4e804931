"""Files that are either whole or as they were before."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

ABANDONED_AFTER = 3600.0  # seconds since the last byte


def replace_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one move: whoever reads, also after a crash, finds the old content or the new.

    Processes that write the same file at once do not disturb each other: the last one's content stays. What a process
    left that was killed while it wrote is removed by a write an hour later.

    Raises:
        OSError: no space, no permission; the file is as it was.
    """
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt too: no other call would use the same name
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    for file in path.parent.iterdir():
        if file.name.startswith(f".{path.name}.") and file.suffix == ".tmp":
            try:
                if time.time() - file.stat().st_mtime > ABANDONED_AFTER:
                    file.unlink()
            except OSError:  # gone by now, or another user's: no reason not to write
                continue
