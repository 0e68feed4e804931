"""The demo: whole runs at toy size, stopped, killed, damaged, out of space, taken up again."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from layerdrop_fast.cli import main
from layerdrop_fast.recipes import demo as module
from layerdrop_fast.recipes import run, training
from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.checkpoint import load_checkpoint
from layerdrop_fast.recipes.evaluation import bits_per_token
from layerdrop_fast.recipes.text import from_file, validation_windows

RESULTS = {"dense.safetensors", "layerdrop.safetensors", "depth.png", "training.png", "metrics.json", "report.html"}


@pytest.fixture(scope="module", autouse=True)
def small():
    """A model and a text that train in a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "EVALUATION_WINDOWS", 8)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 700)
    return path


def arguments(text, out, steps=12):
    return ["demo", "--layers", "3", "--steps", str(steps), "--text", str(text), "--out", str(out), "--no-price"]


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert main(arguments(text, out)) == 0
    return out


def results_of(out):
    """metrics.json without times, and the bits of both models."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds"]
    models = {name: load_checkpoint(out / f"{name}.safetensors")[0] for name in ("dense", "layerdrop")}
    bits = {f"{name}.{key}": w.numpy().tobytes() for name, tensors in models.items() for key, w in tensors.items()}
    return metrics, bits


def test_a_run_leaves_its_results_and_nothing_else(unbroken):
    assert set(os.listdir(unbroken)) == RESULTS
    metrics = json.loads((unbroken / "metrics.json").read_text())
    for name in ("dense", "layerdrop"):
        assert list(metrics["models"][name]["bits_per_byte"]) == ["3", "2", "1"]
        assert 0 < metrics["models"][name]["layers_run"] <= 3 * metrics["models"][name]["steps"]
    assert metrics["models"]["dense"]["steps"] == 12
    assert metrics["models"]["layerdrop"]["steps"] > 12


def test_the_checkpoint_is_the_model_that_was_measured(unbroken, text):
    metrics = json.loads((unbroken / "metrics.json").read_text())
    tensors, _ = load_checkpoint(unbroken / "layerdrop.safetensors")
    size = training.ModelSize(num_layers=3)
    run = training.Training(size, module.LAYERDROP, metrics["models"]["layerdrop"]["steps"])
    model = run.model()
    model.load_state_dict(tensors)
    scored = validation_windows(from_file(text).validation, count=8, length=size.context + 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(metrics["threads"])
    assert bits_per_token(model, scored) == metrics["models"]["layerdrop"]["bits_per_byte"]["3"]
    torch.set_num_threads(threads)


def test_a_second_call_trains_nothing_and_reports_again(unbroken, text, monkeypatch, capsys):
    before = (unbroken / "metrics.json").read_bytes()
    page = (unbroken / "report.html").read_bytes()
    (unbroken / "report.html").unlink()
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(module, "depth_curve", None)
    assert main(arguments(text, unbroken)) == 0
    assert (unbroken / "metrics.json").read_bytes() == before
    assert (unbroken / "report.html").read_bytes() == page
    printed = capsys.readouterr().out
    assert "Validation bits/byte" in printed
    assert str(unbroken / "report.html") in printed


@pytest.mark.parametrize("after", [3, 14])
def test_ctrl_c_saves_and_the_next_call_ends_with_the_same_bits(unbroken, text, tmp_path, monkeypatch, capsys, after):
    steps = iter(range(1, 1000))
    real = training._State.train_step

    def step(state, source):
        real(state, source)
        if next(steps) == after:  # 14: in the second model's training
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training._State, "train_step", step)
    assert main(arguments(text, tmp_path)) == 130
    assert "The same command goes on" in capsys.readouterr().err
    name = "dense" if after < 12 else "layerdrop"
    assert load_checkpoint(tmp_path / f"{name}.training.safetensors")[1]["step"] == (after - 1) % 12 + 1
    assert main(arguments(text, tmp_path)) == 0
    assert results_of(tmp_path) == results_of(unbroken)
    assert set(os.listdir(tmp_path)) == RESULTS


def test_a_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch):
    def step(state, source):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(training._State, "train_step", step)
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    assert main(arguments(text, tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is before


KILLED = """
import sys
from layerdrop_fast.recipes import demo, training
from layerdrop_fast.cli import main
training.CHECKPOINT_SECONDS = training.TRAINING_PER_SAVING = 0.0
demo.EVALUATION_WINDOWS = 8
sys.exit(main(sys.argv[1:]))
"""


def run_and_kill(text, out, delay):
    """Starts the demo in a process of its own and kills it ``delay`` seconds after its first file; True if it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments(text, out)], stdout=subprocess.DEVNULL, env=same_threads()
    )
    while process.poll() is None and not (out / "metrics.json").exists():
        time.sleep(0.01)
    try:
        return process.wait(delay) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() == 0


def same_threads():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_killed_run_ends_with_the_same_bits(unbroken, text, tmp_path):
    delay = random.random()
    run_and_kill(text, tmp_path, delay)
    assert main(arguments(text, tmp_path)) == 0, f"killed after {delay} s"
    assert results_of(tmp_path) == results_of(unbroken), f"killed after {delay} s"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(unbroken, text, tmp_path):
    kills = 0
    while kills < 15 and not run_and_kill(text, tmp_path, delay=3 * random.random()):
        kills += 1
    assert main(arguments(text, tmp_path)) == 0
    assert results_of(tmp_path) == results_of(unbroken), f"after {kills} kills"


def stopped_early(text, out, monkeypatch, after=5):
    """A run that was stopped in its first training."""
    with monkeypatch.context() as patch:
        steps = iter(range(1, 1000))
        patch.setattr(module.StopSignal, "__call__", lambda _: next(steps) >= after)
        assert main(arguments(text, out)) == 130


def assert_one_line_error(capsys, *parts):
    error = capsys.readouterr().err.strip().splitlines()[-1:]
    assert len(error) == 1
    assert error[0].startswith("layerdrop-fast: ")
    assert all(part in error[0] for part in parts), error


@pytest.mark.parametrize("name", ["dense.training.safetensors", "metrics.json"])
@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_file_is_named_and_kept(text, tmp_path, monkeypatch, capsys, name, damage):
    stopped_early(text, tmp_path, monkeypatch)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[0 if name.endswith("json") else len(content) // 2] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    assert main(arguments(text, tmp_path)) == 2
    assert_one_line_error(capsys, str(path), "damaged", "--restart")
    assert path.read_bytes() == content
    assert main([*arguments(text, tmp_path), "--restart"]) == 0


def test_a_damaged_result_is_named_and_kept(unbroken, text, tmp_path, capsys):
    for name in ("metrics.json", "dense.safetensors", "layerdrop.safetensors"):
        (tmp_path / name).write_bytes((unbroken / name).read_bytes())
    path = tmp_path / "layerdrop.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(arguments(text, tmp_path)) == 2
    assert_one_line_error(capsys, str(path), "damaged")
    path.unlink()  # what the message says; the rest is kept
    assert main(arguments(text, tmp_path)) == 0
    assert results_of(tmp_path) == results_of(unbroken)


def test_a_full_disk_loses_nothing(unbroken, text, tmp_path, monkeypatch, capsys):
    stopped_early(text, tmp_path, monkeypatch)
    path = tmp_path / "dense.training.safetensors"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing beyond raises OSError
    try:
        capsys.readouterr()
        assert main(arguments(text, tmp_path)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line_error(capsys, "cannot write", str(path), "untouched")
    assert path.read_bytes() == before
    assert main(arguments(text, tmp_path)) == 0
    assert results_of(tmp_path) == results_of(unbroken)


def test_other_settings_are_refused_and_named(unbroken, text, tmp_path, capsys):
    before = {path: path.read_bytes() for path in unbroken.iterdir()}
    assert main(arguments(text, unbroken, steps=13)) == 2
    assert_one_line_error(capsys, "steps = 12", "steps = 13", "--restart", "--out")
    other = tmp_path / "fox.txt"
    other.write_bytes(text.read_bytes() + b"!")
    assert main(arguments(other, unbroken)) == 2
    assert_one_line_error(capsys, "text_sha256")
    assert {path: path.read_bytes() for path in unbroken.iterdir()} == before


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_unusable_text_is_one_line_and_writes_nothing(tmp_path, capsys, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(arguments(path, tmp_path / "out")) == 2
    assert_one_line_error(capsys, str(path))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_extra_is_named_with_the_command(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "rich" else object())
    assert main(arguments(text, tmp_path)) == 2
    assert_one_line_error(capsys, "needs rich", "pip install 'layerdrop_fast[demo]'")


def test_an_unknown_or_absent_device_is_named(text, tmp_path, monkeypatch, capsys):
    assert main([*arguments(text, tmp_path), "--device", "gpu"]) == 2
    assert_one_line_error(capsys, "'gpu', expected cpu or cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*arguments(text, tmp_path), "--device", "cuda"]) == 2
    assert_one_line_error(capsys, "finds no GPU")


def test_the_price_is_measured_once_and_reported(unbroken, text, tmp_path, monkeypatch, capsys):
    for path in unbroken.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    calls = []

    def priced(setting, makers, *, rounds, tell):
        calls.append(setting)
        tell(1, 3, "correctness")
        return {way: Figures(way, setting, (1.0, 1.1), (20.0, 20.0), 1000, 2000, 1e-6, None) for way in makers}

    monkeypatch.setattr(module, "measure", priced)
    with_price = [argument for argument in arguments(text, tmp_path) if argument != "--no-price"]
    assert main(with_price) == 0
    first = capsys.readouterr().out
    assert main(with_price) == 0
    assert len(calls) == 1
    assert "masked" in first
    assert "masked" in (tmp_path / "report.html").read_text()
    assert "masked" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"way": "a rule of the past"}, {"setting": {"p": 0.1}}, {"name": "dense"}])
def test_a_price_of_other_ways_or_settings_is_measured_anew(change, unbroken, text, tmp_path, monkeypatch, capsys):
    for path in unbroken.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    earlier = json.loads((tmp_path / "metrics.json").read_text())
    figures = {way: Figures(way, Setting(), (1.0, 1.1), (20.0, 20.0), 1000, 2000, 1e-6, None) for way in module.PRICED}
    first, *others = (row.record() for row in figures.values())
    first = change if "name" in change else first | change
    earlier["price"] = [first, *others]
    (tmp_path / "metrics.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(module, "measure", lambda *_, **__: figures)
    assert main(arguments(text, tmp_path)) == 0  # without a price
    assert "One training step" not in capsys.readouterr().out
    assert main([argument for argument in arguments(text, tmp_path) if argument != "--no-price"]) == 0
    assert "masked" in capsys.readouterr().out
    kept = json.loads((tmp_path / "metrics.json").read_text())["price"]
    assert [row["way"] for row in kept] == list(module.PRICED)
    assert all(row["setting"]["p"] == 0.5 for row in kept)


def test_threads_and_algorithms_are_left_as_they_were(unbroken, text):
    metrics = json.loads((unbroken / "metrics.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(metrics["threads"] + 1)
    try:
        assert main(arguments(text, unbroken)) == 0
        assert torch.get_num_threads() == metrics["threads"] + 1
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("layers", "steps"), [(1, 1200), (16, 1200), (40, 759), (1000, 152)])
def test_deeper_models_get_fewer_steps_by_default(layers, steps):
    assert module.default_steps(layers) == steps
