"""What `make gpu-check` makes of its stages; that they work is seen in its dry run, part of `make test`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import report
from benchmarks.gpu_check.check import ROOT, Failed
from benchmarks.gpu_check.sanitizer import verdict


def record(stage, state="ok", result=None, dry=False):
    return {"stage": stage, "state": state, "seconds": 1.0, "budget": 2, "dry": dry, "result": result or {}}


def spread(value):
    return {"median": value, "quartile 1": value, "quartile 3": value}


def kernel(op, channels, share, dtype="bfloat16", kept=16):
    of = {"op": op, "channels": channels, "dtype": dtype, "kept": kept, "samples": 32}
    return {**of, "share of copy": spread(share), "copy, GB/s": 4000.0}


def comparison(eager, compiled, work="add, dropout, norm"):
    faster = {"eager": spread(eager), "torch.compile": spread(compiled)}
    way = {"milliseconds": {"ours": spread(0.1)}, "times faster": faster}
    return {"work": work, "size": "[32, 512, 4096]", "forward": way, "forward and backward": way}


def measured(kernels, rows, plan):
    left = {"left out for lack of time": 0}
    return [
        record("comparison", result={"rows": rows, **left}),
        record("rooflines", result={"kernels": kernels, "plans": {"40 x 64, systematic": spread(plan)}, **left}),
    ]


COMMANDS = pytest.mark.parametrize("budgets", [gpu_check.BUDGETS, gpu_check.STEPS_BUDGETS], ids=["check", "bench"])


@COMMANDS
def test_the_whole_takes_nine_minutes_at_most(budgets):
    assert sum(budgets.values()) + gpu_check.GRACE <= 540


@COMMANDS
def test_gates_come_first(budgets):
    gates = [name in gpu_check.GATES for name in budgets]
    assert gates == sorted(gates, reverse=True)
    assert gates.count(True) >= 2
    assert {name for name in budgets if name not in gpu_check.GATES} <= {*gpu_check.MEASURE, "sanitizer"}


def test_records_fit_into_one_folder_of_eight_files():
    assert len(gpu_check.BUDGETS) + 2 <= 8  # of tuning the record and the file that chosen reads


def test_targets_that_are_hit_and_missed():
    good = measured([kernel("act", 4096, 0.95), kernel("act", 512, 0.5)], [comparison(3.5, 1.3)], 8.0)
    text = report.table(good)
    assert text.count("hit") == 6
    assert "MISSED" not in text
    assert "1 of 1; least 0.95, act 4096 bfloat16" in text
    bad = measured([kernel("act", 4096, 0.89)], [comparison(3.5, 1.3), comparison(2.9, 1.1)], 10.1)
    assert report.table(bad).count("MISSED") == 6
    # The activation is no fused op of the target.
    assert report.table(measured([], [comparison(1.0, 1.0, "gelu, dropout")], 8.0)).count("not measured") == 5


def test_of_a_red_run_no_speed_is_shown():
    text = report.table([record("graph", "red"), *measured([kernel("act", 4096, 0.95)], [comparison(3.5, 1.3)], 8.0)])
    assert "RED: graph; no speeds" in text
    assert "0.95" not in text
    assert "3.50" not in text


def test_a_dry_run_hits_nothing():
    records = [{**each, "dry": True} for each in measured([kernel("act", 4096, 0.95)], [comparison(3.5, 1.3)], 8.0)]
    assert "hit" not in report.table(records)
    assert "DRY" in report.table(records)


def stages(monkeypatch, red=()):
    """What run_all runs, in place of the stages themselves."""
    ran = []
    result = {"rows": [], "kernels": [], "tuned": [], "passed": 1, "left": 0, "left out for lack of time": 0}
    result |= {"contests": [], "left out": []}

    def run_apart(file, name, dry, seconds):
        ran.append((name, seconds))
        found = {**record(name, "red" if name in red else "ok", result), "output": "why"}
        file.write_text(json.dumps(found))
        return found

    monkeypatch.setattr(gpu_check, "run_apart", run_apart)
    return ran


CHECK, BENCH = [*gpu_check.BUDGETS, "tuning"], list(gpu_check.STEPS_BUDGETS)


@pytest.mark.parametrize(
    ("names", "red"),
    [(CHECK, "tests"), (CHECK, "rooflines"), (BENCH, "graphed_step"), (BENCH, "steps"), (BENCH, "small_batch")],
)
def test_nothing_runs_after_a_red_stage_and_no_speed_is_kept(monkeypatch, tmp_path, capsys, names, red):
    ran = stages(monkeypatch, {red})
    assert gpu_check.run_all(tmp_path, False, dict.fromkeys(names, 1))
    assert [name for name, _ in ran] == names[: names.index(red) + 1]
    assert "why" in capsys.readouterr().out
    kept = {found["stage"] for found in gpu_check.read(tmp_path) if found["result"]}
    assert not kept & set(gpu_check.MEASURE)


def test_what_a_stage_leaves_over_the_next_get(monkeypatch, tmp_path):
    old = tmp_path / "1_build.json"
    old.write_text(json.dumps(record("build")))
    ran = stages(monkeypatch)
    assert not gpu_check.run_all(tmp_path, False, {"whole_step": 10, "rooflines": 20})
    assert ran == [("whole_step", 10), ("rooflines", 30)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1_build.json", "3_whole_step.json", "6_rooflines.json"]


def test_a_stage_that_fails_is_red_and_keeps_no_number(tmp_path):
    file = tmp_path / "1_report.json"
    found = gpu_check.run_apart(file, "report", True, 60)  # a module that is no stage
    assert found == json.loads(file.read_text())
    assert (found["state"], found["result"]) == ("red", {})
    assert "has no attribute 'run'" in found["output"]


def test_a_record_says_by_which_command_and_names_no_path(monkeypatch, tmp_path):
    stage = SimpleNamespace(run=lambda check: {"found": 1})
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_check.nothing", stage)
    file = tmp_path / "1_nothing.json"
    gpu_check.run_here("nothing", file, True, 5.0)
    content = json.loads(file.read_text())
    assert content["result"] == {"found": 1}
    assert content["provenance"]["command"] == "python -m benchmarks.gpu_check --stage nothing 5 --dry"
    assert str(tmp_path) not in file.read_text()
    assert str(gpu_check.ROOT) not in file.read_text()


@pytest.mark.parametrize(
    ("stage", "state"), [("rooflines", "stopped"), ("steps", "stopped"), ("whole_step", "red"), ("graphed_step", "red")]
)
def test_a_stage_that_outruns_its_budget_is_stopped(monkeypatch, tmp_path, stage, state):
    monkeypatch.setattr(gpu_check, "GRACE", 0)
    found = gpu_check.run_apart(tmp_path / f"1_{stage}.json", stage, True, 0.5)
    assert (found["state"], found["result"]) == (state, {})
    assert found["seconds"] < 30
    assert report.line(found).split()[:2] == [stage, state]


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "none found"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "none found"),
        ("at cutlass_kernel\n========= ERROR SUMMARY: 2 errors", 0, "nothing in our kernels; elsewhere ERROR SUMMARY"),
        ("Device not supported\n========= ERROR SUMMARY: 1 error", 1, "does not run here, status 1: Device not"),
        ("Traceback", 1, "does not run here, status 1: Traceback"),
    ],
)
def test_what_the_sanitizer_says(printed, status, expected):
    assert verdict(printed, status).startswith(expected)


@pytest.mark.parametrize("name", ["gather_norm_fwd_kernel", "act_bwd_kernel", "draw_plan_kernel", "step_key_kernel"])
def test_what_the_sanitizer_finds_in_our_kernels_is_red(name):
    with pytest.raises(Failed, match=name):
        verdict(f"Invalid __global__ write at {name}+0x10\n========= ERROR SUMMARY: 1 error", 0)


TESTS = """
import time
import pytest

@pytest.mark.parametrize("i", range(7))
def test_one(i):
    time.sleep(SLEEP)
    assert i != 3
"""


@pytest.mark.parametrize(("sleep", "seconds", "total", "status"), [(0, 60, 7, {0, 1}), (0.2, 0, 2, {2})])
def test_shares_are_all_tests_once_and_stop_in_time(tmp_path, sleep, seconds, total, status):
    import time

    (tmp_path / "test_it.py").write_text(TESTS.replace("SLEEP", str(sleep)))
    ended, codes = [], set()
    for index in range(2):
        file = tmp_path / str(index)
        share = json.dumps([index, 2, time.time() + seconds, str(file)])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_check.share", str(tmp_path)]
        environment = {**os.environ, "GPU_CHECK_SHARE": share, "PYTHONPATH": str(ROOT)}
        codes.add(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode)
        ended.append(json.loads(Path(file).read_text()))
    assert [counts["collected"] for counts in ended] == [4, 3]
    assert sum(counts.get("passed", 0) + counts.get("failed", 0) for counts in ended) == total
    assert codes == status
