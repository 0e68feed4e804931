"""What a search tells: the held-out split, and the table."""

import pytest

from layerdrop_fast.prune import Scored, SearchResult, extract, search
from tests.prune.test_search import LISTS, Model, evaluate


def test_a_held_out_split_judges_the_best_and_every_other():
    model = Model(LISTS["ModuleList"](5))
    asked = []

    def other(model):
        asked.append(len(model.layers))
        return -evaluate(model)

    found = search(model, evaluate, kept=2, layers="layers", held_out=other, top=3)
    assert [row.held_out for row in found.ranked[:3]] == pytest.approx([-row.value for row in found.ranked[:3]])
    assert all(row.held_out is None for row in found.ranked[3:] if row.keep != found.every_other.keep)
    assert found.every_other.held_out == pytest.approx(-found.every_other.value)
    assert 3 + 2 <= len(asked) <= 4 + 2  # two are checked
    lines = found.table(2).splitlines()
    assert lines[0].split() == ["rank", "value", "held", "out", "layers"]
    assert lines[1].split()[3:] == [str(layer) for layer in found.keep]
    assert lines[-2].startswith("every other")
    assert lines[-1] == "14 layer evaluations where separate runs have 20"
    assert len(lines) == 5


@pytest.mark.parametrize("method", ["exhaustive", "greedy"])
def test_every_other_is_judged_where_it_is_not_among_the_best(method):
    """Nor, for greedy, among the candidates."""
    model = Model(LISTS["ModuleList"](4))
    first = next(iter(model.layers))

    def with_the_first_layer(model):
        return 0 * evaluate(model) + float(first in set(model.layers))

    found = search(model, with_the_first_layer, kept=2, layers="layers", method=method, held_out=evaluate, top=1)
    assert found.every_other.keep == [0, 2] != found.keep
    assert found.every_other.held_out == pytest.approx(evaluate(extract(model, {"layers": [0, 2]})))
    assert found.ranked[0].held_out == pytest.approx(evaluate(extract(model, {"layers": found.keep})))


def test_the_columns_of_a_table_are_as_wide_as_their_widest_cell():
    ran = "\n24,309 layer evaluations where separate runs have 102,960"
    ranked = [Scored([0, 10], 1.5, 12345.0), Scored([2, 3], 123.25, 2.0)]
    assert SearchResult(ranked, Scored([1, 2], 2.0, 3.0), 24309, 102960).table() == (
        "       rank     value    held out  layers\n"
        "          1    1.5000  12345.0000  0 10\n"
        "          2  123.2500      2.0000  2 3\n"
        "every other    2.0000      3.0000  1 2" + ran
    )
    ranked = [Scored([0], 1.5, 2.5), Scored([2], 1.75)]  # of which only the best was judged
    assert SearchResult(ranked, Scored([1], 2.0, 3.0), 24309, 102960).table() == (
        "       rank   value  held out  layers\n"
        "          1  1.5000    2.5000  0\n"
        "          2  1.7500            2\n"
        "every other  2.0000    3.0000  1" + ran
    )
    assert SearchResult([Scored([0], 1.5)], Scored([1], 2.0), 24309, 102960).table() == (
        "       rank   value  layers\n          1  1.5000  0\nevery other  2.0000  1" + ran
    )
