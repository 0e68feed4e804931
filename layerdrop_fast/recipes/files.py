"""Files of a run, with errors that say what to do."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerdrop_fast._files import replace_atomically


class RecipeError(Exception):
    """Something the user can mend; the message says in one line what happened and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one move: whoever reads, also after a crash, finds the old content or the new.

    Raises:
        RecipeError: no space, no permission; the file is as it was.
    """
    try:
        replace_atomically(path, content)
    except OSError as error:
        before = "what was saved before is untouched" if path.exists() else "nothing was saved"
        raise RecipeError(
            f"cannot write {path}: {error.strerror}; {before}: make room or mend the folder, then run the same "
            "command again"
        ) from error


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """At most ``limit`` bytes of a file (-1: all), or a RecipeError that names it."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps a second run out of it; the lock ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RecipeError(f"cannot use {folder} as a folder: {error.strerror}; choose another with --out") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"another run is using {folder}: wait for it or choose another folder with --out"
            ) from None
        yield
    finally:
        os.close(descriptor)
