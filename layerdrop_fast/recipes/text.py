"""Text to learn from as tokens, byte by byte, and what a bigram model makes of it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from layerdrop_fast.recipes.files import RecipeError, read_bytes

Tokens: TypeAlias = npt.NDArray[Any]  # integers

MIN_BYTES = 20_000
MAX_BYTES = 64 << 20

# Tests, a graphical editor that not every installation has, and other people's packages.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """A text in two parts that share no file (or, of a single file, no token).

    Shapes:
        train: integers [N]; validation: integers [M]
    """

    name: str
    train: Tokens = field(repr=False)
    validation: Tokens = field(repr=False)
    vocab_size: int = 256
    unit: str = "byte"  # what a token is
    words: Sequence[str] | None = field(default=None, repr=False)  # by number; None: bytes

    @property
    def sha256(self) -> str:
        """The digest of both parts."""
        digest = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        digest.update(self.train.data)
        digest.update(self.validation.data)
        return digest.hexdigest()


def standard_library() -> Corpus:
    """The source of the running Python's standard library, every 16th file for validation.

    Raises:
        RecipeError: there is no source to read, as in some frozen or stripped installations.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [read_bytes(path) for path in _python_files(root)]
    if sum(map(len, sources)) < MIN_BYTES:
        raise RecipeError("this Python has no source of its standard library: give a text of your own with --text FILE")
    train = [source for number, source in enumerate(sources) if number % 16 != 7]
    validation = [source for number, source in enumerate(sources) if number % 16 == 7]
    version = sysconfig.get_python_version()
    return Corpus(f"the standard library of Python {version}", _joined(train), _joined(validation))


def _python_files(root: Path) -> list[Path]:
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        # _sysconfigdata holds the paths and flags of the machine that built this Python.
        chosen = (name for name in sorted(names) if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        paths.extend(Path(folder, name) for name in chosen)
    return paths


def from_file(path: Path) -> Corpus:
    """The bytes of one file (its first 64 MiB), the last tenth for validation.

    Raises:
        RecipeError: the file cannot be read, is empty or too short.
    """
    content = read_bytes(path, MAX_BYTES)
    if len(content) < MIN_BYTES:
        size = f"has only {len(content):,} bytes" if content else "is empty"
        raise RecipeError(f"{path} {size}: give a text of at least {MIN_BYTES:,} bytes")
    text = _joined([content])
    cut = len(text) * 9 // 10
    return Corpus(path.name, text[:cut], text[cut:])


def _joined(parts: Iterable[bytes]) -> Tokens:
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def windows(text: Tokens, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """The ``length`` tokens from each start on, int64 [len(starts), length]."""
    window: npt.NDArray[np.int64] = text[starts[:, None] + np.arange(length)].astype(np.int64)
    return window


def batch_of_step(text: Tokens, *, seed: int, step: int, batch: int, length: int) -> npt.NDArray[np.int64]:
    """The training windows of a step, int64 [batch, length]: a pure function of the text and the integers."""
    starts = np.random.default_rng([seed, step]).integers(0, len(text) - length + 1, batch)
    return windows(text, starts, length)


def validation_windows(text: Tokens, *, count: int, length: int) -> npt.NDArray[np.int64]:
    """Windows at even distances over a text, int64 [at most count, length]; fewer where they would overlap."""
    count = max(1, min(count, len(text) // length))
    return windows(text, np.linspace(0, len(text) - length, count).astype(np.int64), length)


def bigram_bits_per_byte(train: Tokens, scored: npt.NDArray[np.int64], smoothing: float = 0.1) -> float:
    """Bits per byte of a bigram model on windows [K, T], each byte but a window's first given the one before.

    The model counts all pairs of the training text, plus ``smoothing`` of each of the 256 x 256.
    """
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=1 << 16).reshape(256, 256) + smoothing
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return float(bits[scored[:, :-1], scored[:, 1:]].mean())
