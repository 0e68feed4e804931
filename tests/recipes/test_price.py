"""The price of a step: the same work by every rule, and no number from rules that disagree."""

import dataclasses
import json

import pytest
import torch

from layerdrop_fast import LayerDropStack, TransformerLayer, TransformerStack
from layerdrop_fast.recipes import price
from layerdrop_fast.recipes.bench.peers import Masked, Skip
from layerdrop_fast.recipes.price import RULES, PriceRow, format_price, measure_price, price_tasks

TINY = {"layers": 6, "d_model": 8, "dim_feedforward": 16, "nhead": 2, "batch": (2, 4), "repeats": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Two threads on a busy core wait for each other far longer than so small a model computes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(price, "DRAWS", 5)


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in measure_price(**TINY)}


def test_every_rule_has_a_row_in_order(rows):
    assert list(rows) == list(RULES) == ["dense", "masked", "skip", "stack", "ours", "limit"]
    for row in rows.values():
        fastest, slowest = row.step_s_range
        assert 0 < fastest <= row.step_s <= slowest
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows.values()]))


def test_the_rules_keep_the_same_layers(rows):
    assert rows["dense"].layers_run == rows["masked"].layers_run == (6, 6)
    assert {rows[name].layers_run for name in ("skip", "stack", "ours", "limit")} == {(3, 3)}


def test_activation_bytes_follow_what_was_kept(rows):
    saved = {name: row.activation_bytes for name, row in rows.items()}
    assert saved["skip"] * 2 == saved["stack"] * 2 == saved["dense"]
    # The four sites of the masks of each of the three dropped layers, which stand in one tensor with all others.
    assert saved["ours"] == saved["limit"] + 3 * 4 * 4 < saved["skip"]
    # One number a branch, the mask.
    assert saved["masked"] == saved["dense"] + 6 * 2 * 4


def test_a_dense_layer_saves_what_was_counted_by_hand():
    # x, norm, q, k, v, attention, mask, x, norm, 4 hidden, 4 activated, mask: 18 times B * S * D; and small: mean and
    # rstd of two norms, logsumexp of nhead rows of attention.
    tokens, width, heads = 2 * 4, 8, 2
    (dense, *_) = measure_price(**TINY | {"layers": 1, "dim_feedforward": 4 * width})
    assert dense.activation_bytes == (18 * tokens * width + 4 * tokens + heads * tokens) * 4


def test_a_layer_of_ours_saves_what_was_counted_by_hand():
    # norm, q, k, v, attention, norm, 4 hidden: 10 times B * S * D; and small: rstd of two norms, logsumexp; once a
    # stack the key of the masks, and 4 sites a layer.
    tokens, width, heads = 2 * 4, 8, 2
    rows = {row.name: row for row in measure_price(**TINY | {"layers": 1, "dim_feedforward": 4 * width, "p": 0.0})}
    expected = (10 * tokens * width + 2 * tokens + heads * tokens + 4 + 4) * 4
    assert rows["ours"].activation_bytes == rows["limit"].activation_bytes == expected


def test_ratios_and_decisions(rows):
    assert rows["dense"].step_to_dense == rows["skip"].step_to_skip == 1.0
    for name, row in rows.items():
        assert row.step_to_dense > 0
        assert (row.decision_s > 0) == (name in ("masked", "skip", "stack", "ours"))


def test_ratios_pair_the_steps_of_a_turn():
    assert price._ratio([2.0, 30.0, 4.0], [1.0, 10.0, 8.0]) == 2.0


def test_the_rules_take_turns():
    seen = []
    measure_price(**TINY, progress=lambda done, total, what: seen.append((done, total, what)))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert {total for _, total, _ in seen} == {len(seen) - 1} == {price_tasks(TINY["repeats"])}
    assert seen[-1][2] == "done"
    steps = [what for _, _, what in seen if what.startswith("step")]
    assert steps == [f"step {turn} of 2, {name}" for turn in (1, 2) for name in RULES]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_any_rate_can_be_priced(p):
    rows = {row.name: row for row in measure_price(**TINY | {"p": p, "layers": 4})}
    for name in ("skip", "stack", "ours", "limit"):
        assert all(abs(kept - (1 - p) * 4) < 1 for kept in rows[name].layers_run)
    format_price(list(rows.values()))


def test_the_callers_random_numbers_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_price(**TINY)
    assert torch.equal(torch.rand(3), expected)


def _red(match):
    measured = []
    with pytest.raises(RuntimeError, match=match):
        measure_price(**TINY, progress=lambda done, total, what: measured.append(what))
    assert measured == ["correctness"]


RULE_OF = pytest.mark.parametrize("rule", ["stack", "ours"])


def replace_run(monkeypatch, rule, replacement):
    """Makes a rule's stack run ``replacement(run, x, kept, stack)``, run(x, kept) being its own way."""
    kind = {"stack": LayerDropStack, "ours": TransformerStack}[rule]
    original = kind._run

    def changed(stack, x, turn, *rest):
        # A TransformerStack's _run ends in that of its base class.
        if type(stack) is not kind:
            return original(stack, x, turn, *rest)

        def run(x, kept):
            return original(stack, x, dataclasses.replace(turn, kept=kept), *rest)[0]

        return replacement(run, x, turn.kept, stack), []

    monkeypatch.setattr(kind, "_run", changed)


@RULE_OF
def test_no_price_when_another_layer_runs(rule, monkeypatch):
    replace_run(monkeypatch, rule, lambda run, x, kept, _: run(x, [*kept[1:], kept[0]]))
    _red(f"no price: {rule} and skip do not compute the same output")


@RULE_OF
def test_no_price_when_a_gradient_is_lost(rule, monkeypatch):
    def detached(run, x, kept, stack):
        with torch.no_grad():
            first = run(x, kept[:1])
        return run(first + (x - x.detach()), kept[1:])

    replace_run(monkeypatch, rule, detached)
    _red(f"{rule} and skip do not compute the same gradient")


@RULE_OF
def test_no_price_when_dropped_layers_get_gradients(rule, monkeypatch):
    def touches_all(run, x, kept, stack):
        return run(x, kept) + 0.0 * sum(weight.sum() for weight in stack.parameters())

    replace_run(monkeypatch, rule, touches_all)
    _red(rf"{rule} and skip .*\(one of them is None\)")


def test_no_price_when_masked_is_not_scaled(monkeypatch):
    monkeypatch.setattr(Masked, "forward", lambda self, branch: branch * float(self.outcome))
    _red("masked and skip do not compute the same output")


def test_no_price_when_masked_leaks_into_dropped_layers(monkeypatch):
    forward = Masked.forward
    monkeypatch.setattr(Masked, "forward", lambda self, x: forward(self, x) + 0 * x.detach() + 1e-9 * (x - x.detach()))
    _red("masked and skip do not compute the same gradient")


def test_no_price_when_skip_skips_too_much(monkeypatch):
    every = Skip.__iter__
    monkeypatch.setattr(Skip, "__iter__", lambda self: iter(list(every(self))[1:]))
    _red("stack and skip do not compute the same output")


@RULE_OF
def test_no_price_from_numbers_that_are_none(rule, monkeypatch):
    replace_run(monkeypatch, rule, lambda run, x, kept, _: run(x, kept) * float("nan"))
    _red(f"{rule} and skip do not compute the same output .*nan")


def test_no_price_when_ours_keeps_its_dropout(monkeypatch):
    always = property(lambda layer: 0.1, lambda layer, rate: None)
    monkeypatch.setattr(TransformerLayer, "dropout", always, raising=False)
    _red("ours and skip do not compute the same output")


def test_the_table_shows_the_rows():
    mib = 2**20
    rows = [
        PriceRow("dense", (40, 40), 2.0, (1.9, 2.2), 1.0, 2.0, 1442 * mib, 0.0),
        PriceRow("skip", (19, 20), 1.0, (0.9, 1.25), 0.5, 1.0, 721 * mib, 172.0e-6),
    ]
    lines = format_price(rows).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["dense", "40", "2.000", "(1.900..2.200)", "1.00", "2.00", "1442.0", "1.00", "-"],
        ["skip", "19..20", "1.000", "(0.900..1.250)", "0.50", "1.00", "721.0", "0.50", "172.0"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == ""
    assert [line.split()[0] for line in lines[4:]] == ["dense", "skip"]
    assert "fairseq" in lines[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"batch": (2, 0)}, "S must be at least 1, got 0"),
        ({"nhead": 3}, "d_model is 8, expected a multiple of nhead, 3"),
        ({"p": 1.5}, r"drop rate p must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        measure_price(**TINY | change)
