"""Where the bytes come from, and the bigram model beside which every result is printed."""

import math

import numpy as np
import pytest

from layerdrop_fast.recipes import text
from layerdrop_fast.recipes.files import RecipeError


def test_the_standard_library_is_read_in_one_order_and_without_tests():
    first, second = text.standard_library(), text.standard_library()
    assert first.sha256 == second.sha256
    # 3.10 to 3.13 have some ten megabytes.
    assert 3_000_000 < len(first.train) < 40_000_000
    assert 0.02 < len(first.validation) / len(first.train) < 0.15
    joined = first.train.tobytes() + first.validation.tobytes()
    assert b"class JSONEncoder" in joined
    assert b"class TestCase" in joined  # unittest itself is no test


def test_files_are_found_in_sorted_order_and_unwanted_ones_are_left_out(tmp_path):
    for name in ("b.py", "a.py", "c.txt", "test/d.py", "pkg/e.py", "pkg/tests/f.py", "_sysconfigdata_x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert [str(path.relative_to(tmp_path)) for path in text._python_files(tmp_path)] == ["a.py", "b.py", "pkg/e.py"]


def test_a_file_of_the_user_s_is_cut_into_two_parts(tmp_path):
    content = bytes(range(256)) * 100
    (tmp_path / "mine.bin").write_bytes(content)
    corpus = text.from_file(tmp_path / "mine.bin")
    assert corpus.name == "mine.bin"
    assert corpus.train.tobytes() + corpus.validation.tobytes() == content
    assert len(corpus.validation) == 2560


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"abc", "has only 3 bytes")])
def test_too_little_text_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "short.txt"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        text.from_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_text_is_refused_in_one_line(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(RecipeError, match="cannot read"):
            text.from_file(path)


def test_an_endless_file_is_read_to_the_limit(monkeypatch):
    monkeypatch.setattr(text, "MAX_BYTES", 30_000)
    corpus = text.from_file(text.Path("/dev/zero"))
    assert len(corpus.train) + len(corpus.validation) == 30_000


def test_batches_depend_on_the_integers_alone():
    source = np.arange(1000, dtype=np.uint8)
    arguments = {"batch": 5, "length": 7}
    first = text.batch_of_step(source, seed=1, step=2, **arguments)
    np.random.seed(0)
    np.testing.assert_array_equal(first, text.batch_of_step(source, seed=1, step=2, **arguments))
    assert first.shape == (5, 7)
    assert (np.diff(first, axis=1) % 256 == 1).all()
    assert (first != text.batch_of_step(source, seed=1, step=3, **arguments)).any()
    assert (first != text.batch_of_step(source, seed=2, step=2, **arguments)).any()


def test_the_last_byte_can_be_drawn():
    source = np.arange(8, dtype=np.uint8)
    drawn = [text.batch_of_step(source, seed=0, step=step, batch=4, length=7) for step in range(20)]
    assert np.max(drawn) == 7
    assert np.min(drawn) == 0


def test_validation_windows_span_the_text_without_overlap():
    source = np.arange(200, dtype=np.uint8)
    found = text.validation_windows(source, count=1000, length=10)
    assert found.shape == (20, 10)
    assert found[0, 0] == 0
    assert found[-1, -1] == 199
    assert len(np.unique(found)) == 200


def test_bigram_bits_of_a_known_source():
    # After 0 comes 0 or 1 alike, after 1 always 0: a rate of 2/3 bit.
    random = np.random.default_rng(0)
    source = [0]
    while len(source) < 60_000:
        source.append(0 if source[-1] == 1 else int(random.integers(2)))
    train = np.array(source[:50_000], dtype=np.uint8)
    scored = np.array(source[50_000:], dtype=np.int64).reshape(-1, 50)
    assert text.bigram_bits_per_byte(train, scored) == pytest.approx(2 / 3, abs=0.03)


def test_an_unseen_pair_costs_finite_bits():
    train = np.zeros(1000, dtype=np.uint8)
    bits = text.bigram_bits_per_byte(train, np.array([[0, 7]]), smoothing=0.1)
    assert bits == pytest.approx(-math.log2(0.1 / (999 + 25.6)))
