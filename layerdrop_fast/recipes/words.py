"""Text to learn from as tokens, word by word, numbered by falling frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from layerdrop_fast.recipes.files import RecipeError, read_bytes
from layerdrop_fast.recipes.text import Corpus, Tokens

END_OF_LINE, UNKNOWN = "<eos>", "<unk>"
WIKITEXT = {"wikitext-2": "wikitext-2-v1", "wikitext-103": "wikitext-103-v1"}


def from_text(path: Path, *, min_count: int = 3) -> Corpus:
    """The words of one file, its last tenth of lines for validation; or of a folder with wiki.train.tokens and
    wiki.valid.tokens, as WikiText is handed out.

    Args:
        min_count: words that the training part has less often are <unk>.

    Raises:
        RecipeError: a file cannot be read, is no UTF-8 text, or has no lines to learn from.
    """
    if path.is_dir():
        train, validation = (_lines(path / f"wiki.{part}.tokens") for part in ("train", "valid"))
        return corpus(path.name, train, validation, min_count=1, blank_lines=True)
    lines = _lines(path)
    cut = len(lines) * 9 // 10
    if cut == 0:
        raise RecipeError(f"{path} has {len(lines)} line, expected more: the last tenth of the lines is for validation")
    return corpus(path.name, lines[:cut], lines[cut:], min_count=min_count)


def wikitext(name: str) -> Corpus:
    """WikiText-2 or WikiText-103 (Merity et al. 2016), fetched and kept by ``datasets``.

    Raises:
        RecipeError: ``datasets`` is not there, or cannot fetch it.
    """
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise RecipeError(
            f"{name} needs datasets: pip install 'layerdrop_fast[datasets]', or give files of yours with --text"
        ) from None
    try:
        parts = datasets.load_dataset("Salesforce/wikitext", WIKITEXT[name])
    except (OSError, ValueError) as error:  # its errors of network and cache
        raise RecipeError(f"datasets cannot load {name}: {error}; give files of yours with --text") from error
    return corpus(name, parts["train"]["text"], parts["validation"]["text"], min_count=1, blank_lines=True)


def corpus(
    name: str, train: Iterable[str], validation: Iterable[str], *, min_count: int, blank_lines: bool = False
) -> Corpus:
    """Both parts in the words of the first.

    Args:
        blank_lines: whether they count as lines with an end, as published perplexities of WikiText have it.

    Raises:
        RecipeError: a part without words.
    """
    train, validation = ([line for line in lines if blank_lines or line.strip()] for lines in (train, validation))
    counts = Counter(_words(train))
    rare = sum(count for word, count in counts.items() if count < min_count)
    counts = Counter({word: count for word, count in counts.items() if count >= min_count})
    counts[UNKNOWN] += rare
    # By frequency; equal ones in the order of the alphabet, so that a text has one numbering.
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    numbers = {word: number for number, word in enumerate(ordered)}
    parts = [_encoded(lines, numbers) for lines in (train, validation)]
    for part, what in zip(parts, ("training", "validation"), strict=True):
        if len(part) < 2:
            raise RecipeError(f"{name}: the {what} part has {len(part)} words, expected a longer text")
    return Corpus(name, parts[0], parts[1], vocab_size=len(ordered), unit="word", words=ordered)


def _words(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from line.split()
        yield END_OF_LINE


def _encoded(lines: Iterable[str], numbers: dict[str, int]) -> Tokens:
    unknown = numbers[UNKNOWN]
    return np.fromiter((numbers.get(word, unknown) for word in _words(lines)), dtype=np.int32)


def _lines(path: Path) -> list[str]:
    try:
        lines = read_bytes(path).decode().split("\n")  # as datasets does; not at other characters that may end a line
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text: {error}") from None
    return lines if lines[-1] else lines[:-1]  # what stands after the last line's end is none
