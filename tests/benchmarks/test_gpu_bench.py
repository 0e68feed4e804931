"""What `make gpu-bench` measures first, what it keeps of a run that is stopped, and its table."""

import dataclasses

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import graphed_step, report, small_batch, steps
from benchmarks.gpu_check.check import Check, Failed
from layerdrop_fast import set_step
from layerdrop_fast.recipes.bench.contest import Disagreement
from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY
from layerdrop_fast.triton.timing import Device
from tests.benchmarks.test_gpu_check import record, spread

# Seconds and bytes with which every target is hit, by just so much.
SECONDS = {"ours": 1.0, "limit": 0.99, "skip": 1.51, "subset": 1.31, "masked": 2.61}
BYTES = {"ours": 619, "limit": 610}
PEAKS = {"ours": 619, "skip": 1000}


def figures(setting, seconds=SECONDS, size=BYTES, peaks=PEAKS):
    ways = [way for way in BY_GRANULARITY[setting.granularity] if way in seconds]
    common = {"setting": setting, "layers_run": (20.0, 20.0), "decision_s": None, "compilation": None}
    return {
        way: Figures(
            way=way,
            seconds=(seconds[way], 2 * seconds[way]),
            saved_bytes=size.get(way, 9),
            peak_bytes=peaks.get(way, 9),
            **common,
        )
        for way in ways
    }


def measured(seconds=SECONDS, size=BYTES, peaks=PEAKS, faster=3.1, settings=None, dry=False):
    four = steps.settings(False)[:4] if settings is None else settings
    contests = [{"figures": [row.record() for row in figures(each, seconds, size, peaks).values()]} for each in four]
    rows = [
        {
            "size": "4 x 128",
            "granularity": granularity,
            "milliseconds": {"ours": spread(9.0)},
            "times faster": {way: spread(faster) for way in ways},
        }
        for granularity, ways in small_batch.EAGER.items()
    ]
    return [
        record("steps", result={"contests": contests, "left out": ["this: out of time"]}, dry=dry),
        record("small_batch", result={"rows": rows}, dry=dry),
    ]


def verdicts(records):
    """Of the last lines."""
    text = report.table(records)
    lines = text[text.index("target for an H200") :].splitlines()[1:]
    return [line.rsplit(maxsplit=1)[-1] for line in lines]


def test_all_targets_hit():
    assert verdicts(measured()) == ["hit"] * 8
    text = report.table(measured())
    assert "fused op" not in text  # targets of gpu-check
    assert "left out: this: out of time" in text
    assert "4 contests, 1 left out" in text


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"seconds": SECONDS | {"skip": 1.49}}, [0]),
        ({"seconds": SECONDS | {"skip": 1.14}}, [0, 1]),
        ({"seconds": SECONDS | {"subset": 1.29}}, [2]),
        ({"seconds": SECONDS | {"masked": 2.59}}, [3]),
        ({"peaks": PEAKS | {"skip": 990}}, [4]),
        ({"seconds": SECONDS | {"limit": 0.97}}, [5]),
        ({"size": BYTES | {"limit": 600}}, [6]),
        ({"faster": 2.9}, [7]),
    ],
)
def test_a_target_that_is_missed(change, missed):
    assert [number for number, said in enumerate(verdicts(measured(**change))) if said == "MISSED"] == missed


def test_targets_of_what_was_left_out_are_not_measured():
    batch, *_ = steps.settings(False)
    # Of masked and the limit both granularities count.
    assert verdicts(measured(settings=[batch])) == ["hit", *["measured"] * 3, "hit", "measured", "measured", "hit"]
    others = [dataclasses.replace(each, p=0.2) for each in steps.settings(False)[:4]]
    assert verdicts(measured(settings=others)) == ["measured"] * 7 + ["hit"]
    assert verdicts(measured(SECONDS | {"masked": 9})[:1])[-1] == "measured"


def test_a_dry_run_hits_nothing_and_a_red_one_shows_nothing():
    assert set(verdicts(measured(dry=True))) == {"dry"}
    text = report.table([record("graphed_step", "red"), *measured()])
    assert "RED: graphed_step; no speeds" in text
    assert "ours" not in text


def test_the_first_rate_comes_first_and_compiling_last():
    order = [(each.p, each.granularity, each.compiled) for each in steps.settings(False)]
    assert order[:5] == [
        *((0.5, "batch", False), (0.5, "sample", False), (0.5, "batch", True), (0.5, "sample", True)),
        (0.2, "batch", False),
    ]
    assert len(set(order)) == 16
    assert [compiled for _, _, compiled in order[4:]] == [False] * 6 + [True] * 6


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A stage of 100 s, of which a contest of the GPU's settings takes 20, in four parts."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()

    def measure(setting, makers, *, tell, **keywords):
        for done in range(4):
            tell(done, 4, f"step, {list(makers)[done]}")
            clock.sleep(5)
        tell(4, 4, "done")
        return figures(setting)

    monkeypatch.setattr(steps, "measure", measure)
    monkeypatch.setattr(steps, "time", clock)
    monkeypatch.setattr("benchmarks.gpu_check.check.time", clock)
    every = steps.settings(False)
    monkeypatch.setattr(steps, "settings", lambda dry: list(every))
    return Check(tmp_path / "steps.json", True, 100.0, {})


def test_what_time_does_not_reach_is_named(check):
    found = steps.run(check)
    titles = [each.title() for each in steps.settings(True)]
    assert [each["figures"][0]["setting"]["compiled"] for each in found["contests"]] == [False, False, True, True]
    assert found["left out"] == [f"{title}: out of time" for title in titles[4:]]


def test_a_contest_stops_when_time_is_up_and_those_before_it_are_kept(check, monkeypatch):
    parts = []

    def slower(setting, makers, *, tell, **keywords):
        """Each contest is three times as long as the one before."""
        for done in range(4):
            tell(done, 4, "step, skip")
            parts.append(setting)
            steps.time.sleep(3 ** len(set(parts)))
        return figures(setting)

    monkeypatch.setattr(steps, "measure", slower)
    check.until = 12 + 2 * 9 + steps.RESERVE
    first, second, *others = steps.settings(True)
    found = steps.run(check)
    assert parts == [first] * 4 + [second] * 3
    assert len(found["contests"]) == 1
    assert found["left out"] == [f"{each.title()}: out of time" for each in (second, *others)]


def test_a_stop_keeps_what_was_measured_and_names_the_rest(check, monkeypatch):
    saved = []
    monkeypatch.setattr(Check, "save", lambda self, result: saved.append((len(result["contests"]), result["left out"])))
    steps.run(check)
    titles = [f"{each.title()}: out of time" for each in steps.settings(True)]
    assert saved[:3] == [(0, titles), (1, titles[1:]), (2, titles[2:])]


def broken(monkeypatch, way, error):
    """Measuring fails while it is this way's turn."""
    whole = steps.measure

    def measure(setting, makers, *, tell, **keywords):
        if way in makers:
            tell(0, 4, f"correctness, {way}")
            raise error
        return whole(setting, makers, tell=tell)

    monkeypatch.setattr(steps, "measure", measure)


@pytest.mark.parametrize("error", [RuntimeError("why"), Disagreement("why")])
def test_a_way_of_others_that_fails_is_left_out(check, monkeypatch, error):
    broken(monkeypatch, "skip", error)
    found = steps.run(check)
    assert len(found["contests"]) == 4
    first = steps.settings(True)[0].title()
    assert f"{first}, skip: {type(error).__name__}: why" in found["left out"]


@pytest.mark.parametrize("way", ["stack", "ours", "recompute", "limit"])
def test_one_of_ours_that_fails_is_red(check, monkeypatch, way):
    broken(monkeypatch, way, Disagreement("why"))
    with pytest.raises(Disagreement, match="why"):
        steps.run(check)


@pytest.mark.parametrize("granularity", small_batch.EAGER)
def test_graphed_steps_that_are_not_the_eager_ones_are_not_timed(monkeypatch, granularity):
    def another_plan(model, *given):
        set_step(model, 100)
        return eager(model, *given)

    eager = graphed_step.eager
    monkeypatch.setattr(graphed_step, "eager", another_plan)
    monkeypatch.setattr(Device, "in_turn", lambda *given: pytest.fail("timed"))
    with pytest.raises(Failed, match="differs from eager"):
        small_batch.measure(dataclasses.replace(steps.TINY, granularity=granularity), Device(), dry=True)


def test_the_command_has_stages_of_its_own(monkeypatch):
    def chosen(*arguments):
        monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
        return list(gpu_check.chosen_stages(gpu_check.arguments()))

    assert chosen("--steps") == chosen("--steps", "--dry") == ["build", "graphed_step", "steps", "small_batch"]
    assert chosen("--steps", "--only", "steps") == ["steps"]
    assert chosen() == list(gpu_check.BUDGETS)
    assert chosen("--tune") == chosen("--dry") == [*gpu_check.BUDGETS, "tuning"]
