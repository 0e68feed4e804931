"""The report judges rightly what was measured, and refuses what may not be told."""

import pytest

from benchmarks.report.__main__ import main
from benchmarks.report.goals import GPU, DepthGoal, Goal, Verdict, verdicts
from benchmarks.report.page import PAGE, PICTURES, README
from benchmarks.report.plots import PLOTS
from benchmarks.report.read import read
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY
from layerdrop_fast.recipes.files import RecipeError
from tests.benchmarks.results import COMMIT, MIB, OTHER, content, depth, judged, memory, step, steps, stored


def refusal(folder, *words):
    with pytest.raises(RecipeError) as raised:
        read(folder)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda of: of.pop("run"), ["run.failed", "run.exit status", "run.command"]),
        (lambda of: of["run"].update(failed=2), ["red", "2 tests failed"]),
        (lambda of: of["run"].update({"exit status": 2}), ["red", "exit status 2"]),
        (lambda of: of["run"].pop("command"), ["run.command missing"]),
        (lambda of: of["run"].update(commit=OTHER), ["began at", OTHER, COMMIT]),
        (lambda of: of["run"].update(commit=f"{COMMIT} and changes"), ["and changes"]),
        (lambda of: of["commit_info"].update(dirty=True), ["with changes", "dirty"]),
        (lambda of: of["commit_info"].pop("dirty"), ["commit_info.dirty missing"]),
        (lambda of: of["commit_info"].update(id="unversioned"), ["no commit", "'unversioned'"]),
        (lambda of: of.pop("commit_info"), ["commit_info.id"]),
        (lambda of: of["machine_info"].pop("machine"), ["machine_info.machine missing"]),
        (lambda of: of["machine_info"].pop("torch"), ["machine_info.torch missing"]),
        (lambda of: of.pop("datetime"), ["datetime missing"]),
        (lambda of: of["benchmarks"][0]["extra_info"].pop("figures"), ["test_step[batch-0.5-float32-dense]"]),
        (lambda of: of["benchmarks"][0]["extra_info"]["figures"].pop("seconds"), ["no usable", "seconds"]),
        (lambda of: of["benchmarks"][0]["extra_info"].pop("threads"), ["extra_info.threads"]),
        (lambda of: of["benchmarks"][0]["extra_info"]["figures"]["seconds"].pop(), ["different numbers of turns"]),
    ],
)
def test_what_may_not_be_told_is_refused_by_name(results, root, capsys, change, words):
    of = content(step())
    assert read(stored(results, good=of)).suite("step")
    change(of)
    refusal(stored(results, good=of), "good.json", *words)
    before = (root / PAGE).read_text()
    assert main([str(results), "--root", str(root)]) == 1
    assert words[0] in capsys.readouterr().err
    assert (root / PAGE).read_text() == before
    assert not (root / PICTURES).exists()


def test_a_memory_suite_without_courses_is_refused(results):
    of = content(memory())
    del of["benchmarks"][1]["extra_info"]["course"]
    refusal(stored(results, some=of), "some.json", "skip", "course")


def test_files_that_hold_none_of_the_suites_are_left_out(results):
    rows = {"benchmarks": [{"fullname": "benchmarks/test_row_ops.py::test_add[x]", "extra_info": {}}]}
    stored(results, rows=rows, demo={"provenance": {}}, trials=[1, 2], steps=content(step()))
    assert [contest.suite for contest in read(results).contests] == ["step"]
    (results / "Linux" / "steps.json").unlink()
    refusal(results, "no results of step, depth, memory, parts")


def test_what_is_not_there_or_no_json_is_refused(results):
    refusal(results, "make bench")
    stored(results, whole=content(step()))
    (results / "half.json").write_text('{"benchmarks": [')
    refusal(results, "half.json")


def test_of_several_runs_the_latest_of_each_contest_counts(results, root, capsys):
    slow = step()
    for row in slow:
        row["extra_info"]["figures"]["seconds"] = [9.0] * 5
    # The name that sorts last is the oldest.
    stored(results, z=content(slow), a=content(step(), "2026-01-03T00:00:00+00:00", OTHER))
    stored(results, m=content(step("sample") + step(p=0.2), "2026-01-02T00:00:00+00:00"))
    found = read(results)
    assert found.step("batch", 0.5).by_way()["ours"].median_s == pytest.approx(0.96)
    assert found.step("batch", 0.5).source.commit == OTHER
    assert found.step("sample", 0.5).source.commit == COMMIT
    assert len(found.contests) == 3
    assert main([str(results), "--root", str(root)]) == 0
    assert {f"`{OTHER[:12]}`", f"`{COMMIT[:12]}`"} <= set((root / README).read_text().replace(",", " ").split())
    assert f"step: commit {OTHER}, Linux/a.json" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [step, depth, memory])
def test_ways_of_one_contest_from_two_runs_are_refused(results, suite):
    rows = suite()
    later = [row for row in rows if "skip" in row["fullname"]]
    stored(results, one=content(rows), two=content(later, "2026-01-02T00:00:00+00:00", OTHER))
    refusal(results, "one.json", "two.json", "skip", "several runs")


def test_two_machines_in_one_folder_are_refused(results):
    other = content(step("sample"), "2026-01-02T00:00:00+00:00")
    other["machine_info"]["machine"] = "another"
    refusal(stored(results, one=content(step()), two=other), "one.json", "two.json", "different machines: machine")


def verdict_of(folder, rows, measure, way, other, where):
    found = [
        verdict
        for verdict in verdicts(read(stored(folder, all=content(rows))))
        if (verdict.goal.measure, verdict.goal.way, verdict.goal.other, verdict.where) == (measure, way, other, where)
    ]
    assert len(found) == 1
    return found[0]


def test_a_goal_that_is_hit(results):
    found = verdict_of(results, steps(), "saved bytes", "ours", "skip", "batch, p = 0.2")
    assert (found.hit, found.figure(), found.said()) == (True, "0.500", "hit, 12.3% to spare")  # 1 - 0.5 / 0.57
    found = verdict_of(results, steps(), "step time", "ours", "masked", "sample, p = 0.5")
    assert (found.hit, found.figure(), found.said()) == (True, "0.400 (0.400 to 0.400)", "hit, 14.9% to spare")


def test_a_goal_that_is_missed(results):
    rows = judged(steps(), ours=lambda row: {"seconds": [1.0, 1.1, 1.2, 1.3, 7.0], "saved_bytes": 60 * MIB})
    found = verdict_of(results, rows, "step time", "ours", "skip", "batch, p = 0.5")
    # The median of ratios, which one bad turn does not move; not the ratio of medians.
    assert (found.hit, found.figure()) == (False, "1.000 (1.000 to 1.000)")
    assert found.said() == "**missed** by 11.1%"  # 1 / 0.9 - 1
    found = verdict_of(results, rows, "saved bytes", "ours", "limit", "sample, p = 0.8")
    assert (found.hit, found.said()) == (False, "**missed** by 17.6%")  # 1.2 / 1.02 - 1


def test_a_bound_itself_is_hit_and_ratios_pair_turns(results):
    rows = judged(step(), ours=lambda row: {"seconds": [0.5, 2.0, 1.8, 1.6, 1.4]})
    rows = judged(rows, skip=lambda row: {"seconds": [1.0, 2.0, 2.0, 2.0, 2.0]})
    found = verdict_of(results, rows, "step time", "ours", "skip", "batch, p = 0.5")
    assert found.ratios == (0.5, 1.0, 0.9, 0.8, 0.7)
    exact = Verdict(Goal("step time", "ours", "skip", at_most=0.8), "here", found.ratios)
    assert exact.hit
    assert exact.figure() == "0.800 (0.700 to 0.900)"


def test_what_has_no_goal_is_told_and_not_judged(results):
    for measure, way, where in (("step time", "skip", "batch, p = 0"), ("saved bytes", "narrow", "sample, p = 0.8")):
        found = verdict_of(results, steps(), measure, "ours", way, where)
        assert found.ratios
        assert found.hit is None
        assert found.said() == "no goal"


def test_missing_figures_and_too_few_turns_are_not_judged(results):
    rows = [row for row in step() if not row["fullname"].endswith("-skip]")]
    found = verdict_of(results, rows, "step time", "ours", "skip", "batch, p = 0.5")
    assert (found.hit, found.figure(), found.said()) == (None, "-", "not measured")
    assert verdict_of(results, rows, "saved bytes", "ours", "limit", "sample, p = 0.5").said() == "not measured"
    rows = judged(step(), **{way: lambda row: {"seconds": row["seconds"][:4]} for way in BY_GRANULARITY["batch"]})
    found = verdict_of(results, rows, "step time", "ours", "masked", "batch, p = 0.5")
    assert (found.hit, found.said()) == (None, "open: 4 turns of 5")
    # Bytes need no turns.
    assert verdict_of(results, rows, "saved bytes", "ours", "masked", "batch, p = 0.5").hit
    rows = judged(step(), skip=lambda row: {"saved_bytes": 0})
    assert verdict_of(results, rows, "saved bytes", "ours", "skip", "batch, p = 0.5").said() == "not measured"


@pytest.mark.parametrize(("factor", "hit"), [(1.04, True), (0.96, True), (1.06, False), (0.94, False)])
def test_the_price_of_depth_is_that_of_a_kept_layer(results, factor, hit):
    rows = depth()
    for row in rows:
        found = row["extra_info"]["figures"]
        if found["way"] == "ours" and found["setting"]["layers"] == 1000:
            found["seconds"] = [2 * factor * second for second in found["seconds"]]
            found["layers_run"] = [20.0] * 5
    name = "time a kept layer", "ours", "ours"
    found = verdict_of(results, rows, *name, "1,000 layers")
    assert found.ratios == pytest.approx([factor] * 5)
    assert found.hit is hit
    assert verdict_of(results, rows, *name, "100 layers").hit
    where = [verdict.where for verdict in verdicts(read(results)) if isinstance(verdict.goal, DepthGoal)]
    assert where == ["100 layers", "250 layers", "1,000 layers"]


def test_a_gpu_has_goals_of_its_own(results, root):
    of = {"device": "cuda", "dtype": "bfloat16"}
    stored(results, gpu=content(step(**of) + step("sample", **of)), cpu=content(step()))
    read_back = read(results)
    assert read_back.device == "cuda"
    found = {(verdict.goal.title(), verdict.where): verdict for verdict in verdicts(read_back)}
    assert {verdict.goal for verdict in found.values()} == set(GPU)
    assert found["throughput: ours / subset", "sample, p = 0.5, bfloat16"].said() == "**missed** by 3.8%"  # 1.25 of 1.3
    assert found["throughput: ours / skip", "batch, p = 0.5, bfloat16, compiled"].said() == "not measured"
    assert found["peak bytes: ours / skip", "batch, p = 0.5, bfloat16"].hit  # 0.5 of 0.62
    # The pages have no blocks for it yet.
    assert main([str(results), "--root", str(root)]) == 1
    for name, blocks in ((README, ["step-table"]), (PAGE, ["goals", "all-tables", *PLOTS])):
        added = "".join(f"<!-- report:gpu-{block} -->\n<!-- /report:gpu-{block} -->\n" for block in blocks)
        (root / name).write_text((root / name).read_text() + added)
    before = (root / PAGE).read_text().partition("<!-- report:gpu-")[0]
    assert main([str(results), "--root", str(root)]) == 0
    after = (root / PAGE).read_text()
    assert after.startswith(before)
    assert "(performance/gpu/steps.png)" in after
    assert (root / PICTURES / "gpu" / "steps.png").exists()
