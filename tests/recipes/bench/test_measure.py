"""Figures: who takes turns, what is counted, and what compiling costs."""

import dataclasses
import functools
import json

import pytest
import torch

from layerdrop_fast.recipes.bench import measure as module
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.measure import COMPILED_PLANS, WARM_UPS, figures_of, makers_of, measure_together
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY, WAYS

TINY = Setting(layers=6, d_model=8, dim_feedforward=32, nhead=2, samples=4, length=4)
SAMPLE = dataclasses.replace(TINY, granularity="sample")
measure = functools.partial(module.measure, draws=3)

DECIDE = {"masked", "discard", "skip", "sample-skip", "subset", "stack", "ours", "recompute"}


@pytest.fixture(scope="module", params=[TINY, SAMPLE], ids=lambda setting: setting.granularity)
def measured(request):
    return request.param, measure(request.param, rounds=3)


def test_every_way_has_figures_in_order(measured):
    setting, figures = measured
    assert tuple(figures) == BY_GRANULARITY[setting.granularity]
    for name, row in figures.items():
        assert (row.way, row.setting) == (name, setting)
        assert len(row.seconds) == len(row.layers_run) == 3
        assert 0 < min(row.seconds) <= row.median_s <= max(row.seconds)
        assert row.tokens_per_second == 4 * 4 / row.median_s
        assert (row.decision_s is not None) == (name in DECIDE)
        assert row.compilation is None


def test_the_record_is_json_and_comes_back(measured):
    _, figures = measured
    for row in figures.values():
        assert figures_of(json.loads(json.dumps(row.record()))) == row


def test_saved_bytes_are_those_counted_by_hand():
    # Units of B * S * D float32. 18 a layer of torch's: x, norm, q, k, v, attention, mask, x, norm, 4 hidden, 4
    # activated, mask; small: mean and rstd of two norms, logsumexp of a head's rows. 10 of ours: norm, q, k, v,
    # attention, norm, 4 hidden; small: rstd of two norms, logsumexp; once the key of the masks and 4 sites a layer.
    tokens, width, heads, layers, kept = 16, 8, 2, 6, 3
    theirs = (18 * tokens * width + 4 * tokens + heads * tokens) * 4
    ours = (10 * tokens * width + 2 * tokens + heads * tokens) * 4
    figures = measure(TINY, rounds=1)
    dropped_before_another = layers - kept - (layers - 1 not in TINY.plan(0).layers)
    saved = {name: row.saved_bytes for name, row in figures.items()}
    assert saved["dense"] == layers * theirs
    assert saved["masked"] == layers * theirs + 2 * layers * 4  # one number a branch, the mask
    # Behind a dropped layer the next one saves the very x that the dropped one has saved.
    assert saved["discard"] == layers * theirs - dropped_before_another * tokens * width * 4
    assert saved["skip"] == saved["stack"] == kept * theirs
    # The sites of dropped layers stand in one tensor with all others.
    assert saved["ours"] == kept * ours + (4 + 4 * layers) * 4
    assert saved["limit"] == kept * ours + (4 + 4 * kept) * 4
    assert saved["recompute"] == saved["ours"] - kept * 3 * tokens * width * 4


def test_the_peak_holds_what_is_saved(measured):
    _, figures = measured
    for row in figures.values():
        # x, which is there before, is saved by some.
        assert row.peak_bytes > row.saved_bytes - 4 * 4 * 8 * 4
    assert figures["ours"].peak_bytes < figures["stack"].peak_bytes < figures["dense"].peak_bytes


def test_the_ways_take_turns_and_each_begins():
    seen = []
    measure(TINY, {way: WAYS[way][1] for way in ("skip", "ours", "limit")}, rounds=3, tell=lambda *at: seen.append(at))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert {total for _, total, _ in seen} == {len(seen) - 1}
    assert seen[-1][2] == "done"
    steps = [what.split(", ")[1] for _, _, what in seen if what.startswith("step")]
    assert steps == ["ours", "limit", "skip", "limit", "skip", "ours", "skip", "ours", "limit"]


def test_contests_take_turns_with_each_other():
    seen = []
    contests = [Contest(dataclasses.replace(TINY, layers=n), {"ours": WAYS["ours"][1]}) for n in (2, 4)]
    order = []
    for contest in contests:
        contest.seconds = functools.partial(lambda n, name: order.append(n) or 1.0, contest.setting.layers)
    found = measure_together(contests, rounds=2, draws=1, tell=lambda *at: seen.append(at))
    assert order == [4, 4, 2, 2, 2, 2, 4, 4]
    assert [figures["ours"].setting.layers for figures in found] == [2, 4]
    assert found[0]["ours"].layers_run == (1.0, 1.0)


def test_the_callers_random_numbers_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Contest(TINY, makers_of("batch"))
    assert torch.equal(torch.rand(3), expected)


def test_what_tell_raises_ends_it():
    class Enough(Exception):
        pass

    def tell(done, total, what):
        if what.startswith("step"):
            raise Enough

    with pytest.raises(Enough):
        measure(TINY, tell=tell)


@pytest.fixture
def no_code_generation(monkeypatch):
    """Dynamo makes and counts its graphs as ever, which are then run as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize(
    ("granularity", "ways"), [("batch", ("dense", "skip", "ours")), ("sample", ("dense", "subset", "ours"))]
)
@pytest.mark.usefixtures("no_code_generation")
def test_compiled_ways_compute_their_rules_and_their_graphs_are_counted(granularity, ways):
    setting = dataclasses.replace(TINY, layers=4, granularity=granularity, compiled=True)
    figures = measure(setting, {way: WAYS[way][1] for way in ways}, rounds=1)
    for row in figures.values():
        assert row.compilation.seconds > 0
    graphs = {name: row.compilation.graphs for name, row in figures.items()}
    # One of a layer that follows none, one of a layer that follows another; at "sample" one of both.
    assert graphs["ours"] == {"batch": 2, "sample": 1}[granularity]
    assert graphs["dense"] == 1
    assert all(1 <= count <= 2 + COMPILED_PLANS for count in graphs.values())


@pytest.mark.usefixtures("no_code_generation")
def test_compilations_can_be_left_out():
    setting = dataclasses.replace(TINY, layers=2, compiled=True)
    figures = measure(setting, {"ours": WAYS["ours"][1]}, rounds=1, compilations=False)
    assert figures["ours"].compilation is None


@pytest.mark.parametrize(
    ("device", "compiled", "warm_ups"), [("cuda", False, WARM_UPS), ("cpu", False, 0), ("cuda", True, 0)]
)
@pytest.mark.usefixtures("no_code_generation")
def test_on_a_gpu_each_way_runs_whole_steps_before_it_is_measured(monkeypatch, device, compiled, warm_ups):
    setting, seen = dataclasses.replace(TINY, layers=2, compiled=compiled), []
    contest = Contest(setting, {way: WAYS[way][1] for way in ("skip", "ours")})
    contest.setting = dataclasses.replace(setting, device=device)
    measure_together([contest], rounds=1, draws=1, compilations=False, tell=lambda *at: seen.append(at[2]))
    first = next(number for number, what in enumerate(seen) if what.startswith("memory"))
    for way in ("skip", "ours"):
        assert seen[:first].count(f"warm-up, {way}") == seen.count(f"warm-up, {way}") == warm_ups
        assert seen[:first].count(f"compiling {way}") == (1 + COMPILED_PLANS if compiled else 0)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.usefixtures("no_code_generation")
def test_compiling_uses_caches_where_it_is_not_measured(monkeypatch, measured):
    import torch._inductor.config

    uncached = []
    monkeypatch.setattr(Contest, "step", lambda *given: uncached.append(torch._inductor.config.force_disable_caches))
    setting = dataclasses.replace(TINY, layers=2, compiled=True)
    measure(setting, {"ours": WAYS["ours"][1]}, rounds=1, compilations=measured)
    first = (1 + COMPILED_PLANS) * measured
    assert uncached == [True] * first + [False] * (len(uncached) - first)
    assert len(uncached) >= first + 1 + COMPILED_PLANS + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"nhead": 3}, "d_model is 8, expected a multiple of nhead, 3"),
        ({"p": 1.5}, r"drop rate p must lie in \[0, 1\], got 1.5"),
        ({"dropout": -1}, r"dropout must lie in \[0, 1\], got -1"),
        ({"granularity": "token"}, "granularity is 'token', expected one of"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_no_rounds_are_named():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure(TINY, rounds=0)
