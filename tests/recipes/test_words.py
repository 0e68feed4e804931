"""Words as tokens."""

import sys
import types

import numpy as np
import pytest

from layerdrop_fast.recipes import words
from layerdrop_fast.recipes.files import RecipeError

TRAIN = ["the cat saw the dog", "", "the dog saw a bird"]
VALIDATION = ["the fox saw the cat", "  "]


def test_words_are_numbered_by_falling_frequency():
    corpus = words.corpus("text", TRAIN, VALIDATION, min_count=1)
    # the 3; <eos>, dog, saw 2; a, bird, cat 1; <unk> 0. Equal ones in the order of the alphabet.
    numbers = {"the": 0, "<eos>": 1, "dog": 2, "saw": 3, "a": 4, "bird": 5, "cat": 6, "<unk>": 7}
    assert corpus.train.tolist() == [
        numbers[w] for w in ["the", "cat", "saw", "the", "dog", "<eos>", "the", "dog", "saw", "a", "bird", "<eos>"]
    ]
    assert corpus.validation.tolist() == [numbers[w] for w in ["the", "<unk>", "saw", "the", "cat", "<eos>"]]
    assert (corpus.vocab_size, corpus.unit, corpus.name) == (8, "word", "text")
    assert corpus.train.dtype == np.int32


def test_blank_lines_have_an_end_where_they_count():
    corpus = words.corpus("text", TRAIN, VALIDATION, min_count=1, blank_lines=True)
    end = corpus.words.index("<eos>")
    assert [(part == end).sum() for part in (corpus.train, corpus.validation)] == [3, 2]
    assert corpus.train[6] == end, "the blank line's, behind that of the first"


def test_the_end_of_the_last_line_begins_no_other(tmp_path):
    corpora = []
    for end in ("", "\n"):
        for part, lines in (("train", TRAIN), ("valid", VALIDATION)):
            (tmp_path / f"wiki.{part}.tokens").write_text("\n".join(lines) + end)
        corpora.append(words.from_text(tmp_path).sha256)
    assert corpora[0] == corpora[1]


def test_rare_words_are_unknown():
    corpus = words.corpus("text", TRAIN, VALIDATION, min_count=2)
    # a, bird, cat are three unknown ones, as many as "the".
    numbers = {"<unk>": 0, "the": 1, "<eos>": 2, "dog": 3, "saw": 4}
    assert corpus.vocab_size == 5
    assert corpus.validation.tolist() == [numbers[w] for w in ["the", "<unk>", "saw", "the", "<unk>", "<eos>"]]


def test_a_text_that_has_unknown_words_of_its_own():
    corpus = words.corpus("text", ["a <unk> a b", "<unk> a <unk>"], VALIDATION, min_count=1)
    assert corpus.words == ["<unk>", "a", "<eos>", "b"]


def test_words_seen_fewer_than_three_times_are_unknown(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("often often seldom\noften seldom\n\n" + "\n" * 7 + "x\n" * 20)
    assert words.from_text(path).words == ["<eos>", "x", "often", "<unk>"]


def test_of_a_file_the_last_tenth_of_lines_is_for_validation(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("\n".join(f"line {n} ends here" for n in range(20)))
    corpus = words.from_text(path, min_count=1)
    assert (len(corpus.train), len(corpus.validation)) == (18 * 5, 2 * 5)
    assert corpus.name == "novel.txt"


def test_a_folder_of_wikitext(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text("\n".join(TRAIN))
    (tmp_path / "wiki.valid.tokens").write_text("\n".join(VALIDATION))
    corpus = words.from_text(tmp_path)
    assert corpus.sha256 == words.corpus("x", TRAIN, VALIDATION, min_count=1, blank_lines=True).sha256
    assert (corpus.train == corpus.words.index("<eos>")).sum() == len(TRAIN)


def test_wikitext_by_datasets(monkeypatch):
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *names: (
        asked.append(names) or {"train": {"text": TRAIN}, "validation": {"text": VALIDATION}}
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    expected = words.corpus("", TRAIN, VALIDATION, min_count=1, blank_lines=True)
    assert words.wikitext("wikitext-103").train.tolist() == expected.train.tolist()
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1")]


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"wikitext-2 needs datasets: pip install .layerdrop_fast\[datasets\]"):
        words.wikitext("wikitext-2")


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_an_error_of_datasets_is_told(monkeypatch, error):
    def fails(*_):
        raise error("no network")

    module = types.ModuleType("datasets")
    module.load_dataset = fails
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(RecipeError, match="datasets cannot load wikitext-2: no network"):
        words.wikitext("wikitext-2")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        words.from_text(tmp_path / "nothing")
    path = tmp_path / "latin"
    path.write_bytes(b"caf\xe9 au lait\n" * 5)
    with pytest.raises(RecipeError, match="is no UTF-8 text"):
        words.from_text(path)
    path.write_text("one")
    with pytest.raises(RecipeError, match="has 1 line, expected more: the last tenth of the lines is for validation"):
        words.from_text(path)


def test_lines_end_at_line_feeds_alone(tmp_path):
    lines = "a b\u2028c d\nthe\x85q\r\n" * 20
    path = tmp_path / "text"
    path.write_bytes(lines.encode())
    found = words.from_text(path)
    assert sum(found.train == found.words.index("<eos>")) == 36
    path.write_text("one line alone " * 1000)
    with pytest.raises(RecipeError, match="has 1 line, expected more"):
        words.from_text(path)
