"""``layerdrop-fast train lm``, as a user calls it."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layerdrop_fast import cli
from layerdrop_fast.prune import every_other, extract
from layerdrop_fast.recipes import evaluation, lm, words
from layerdrop_fast.recipes.checkpoint import save_checkpoint
from layerdrop_fast.recipes.evaluation import bits_per_token
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.text import Corpus, from_file, validation_windows
from layerdrop_fast.recipes.trained_lm import load_lm
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Training
from layerdrop_fast.schedule import uniform

SENTENCE = "the quick brown fox jumps over the lazy dog and a cat looks on .\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 400)
    return path


def train(text, *arguments, out="out"):
    return cli.main(
        ["train", "lm", "--text", str(text), "--out", str(text.parent / out), "--device", "cpu", *arguments]
    )


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    monkeypatch.setattr(lm, "EVALUATION_WINDOWS", 4)


@pytest.mark.parametrize(
    ("arguments", "drops"),
    [
        (["--p", "0.3"], {"depth": "uniform(p=0.3)", "granularity": "batch"}),
        (
            ["--profile", "linear", "--p", "0.6", "--fade", "--granularity", "sample", "--scale", "inverse"],
            {"depth": "linear(p_max=0.6)", "granularity": "sample", "scale": "inverse", "fade": True},
        ),
        (
            ["--target", "branch", "--heads", "0.2", "--chunks", "0.1"],
            {"depth": "uniform(p=0.2)", "target": "branch", "heads": 0.2, "chunks": 0.1},
        ),
        (["--target", "branch", "--p", "0", "--heads", "0.2"], {"depth": "uniform(p=0.0)", "heads": 0.2}),
        (["--learned", "--p", "0.5"], {"learned": True}),
        (["--heads", "0.2"], {"depth": "uniform(p=0.0)", "heads": 0.2}),
        (["--config", "words-16"], {"vocab_size": 16, "cutoffs": None}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    ],
)
def test_it_trains_and_measures_every_depth(text, capsys, arguments, drops):
    assert train(text, "--steps", "12", "--batch", "2", *arguments) == 0
    out = text.parent / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {name: metrics["settings"][name] for name in drops} == drops
    assert list(metrics["bits_per_token"]) == [str(depth) for depth in range(16, 0, -1)]
    assert metrics["training"]["steps"] == 12
    assert metrics["text"]["scored_tokens"] == 4 * metrics["settings"]["context"]
    share = {"0.3": 0.7, "0.5": 0.5, "0.6": 0.85}.get(
        arguments[arguments.index("--p") + 1] if "--p" in arguments else ""
    )
    assert share is None or abs(metrics["training"]["share_of_layers_run"] - share) < 0.15
    assert 0 < metrics["training"]["share_of_flops_run"] <= metrics["training"]["share_of_layers_run"] <= 1
    assert f"{2 ** metrics['bits_per_token']['16']:10,.2f}" in lm.table(metrics)
    assert len(metrics["training"].get("learned_rates", [])) == (16 if "--learned" in arguments else 0)
    words = {"vocabulary.json"} if "words-16" in arguments else set()
    plots = {"depth.png", "training.png"}
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "metrics.json", *plots, *words}
    assert (out / "depth.png").read_bytes()[:4] == b"\x89PNG"
    held = {name: value for name, value in load_file(out / "model.safetensors").items() if value.is_floating_point()}
    assert sum(value.numel() for value in held.values()) == metrics["parameters"]
    printed = capsys.readouterr().out
    unit = "word" if "words-16" in arguments else "byte"
    assert f"layers  bits/{unit}  perplexity" in printed
    assert f"{metrics['bits_per_token']['16']:.3f}" in printed
    assert f"cut: 16/16  depth 1: {metrics['bits_per_token']['1']:.3f} bits/token" in printed


@pytest.mark.parametrize("arguments", [["--heads", "0.2", "--p", "0.3"], ["--config", "words-16"], ["--learned"]])
def test_the_model_is_there_for_other_programs(text, arguments):
    assert train(text, "--steps", "8", "--batch", "2", *arguments) == 0
    out = text.parent / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    before = torch.get_rng_state()
    model = load_lm(out / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert len(model.train().stack.plan().layers) == 16
    corpus = words.from_text(text) if "words-16" in arguments else from_file(text)
    scored = validation_windows(corpus.validation, count=4, length=metrics["settings"]["context"] + 1)
    for depth in (16, 5):
        small = extract(model, every_other(16, kept=depth))
        assert bits_per_token(small, scored) == pytest.approx(metrics["bits_per_token"][str(depth)], rel=1e-5)


def test_a_model_with_bands_is_read(tmp_path):
    size = ModelSize(2, 16, 2, 32, context=8, cutoffs=(40, 110), positions="sinusoidal", final_norm=False)
    training, path = Training(size, DENSE, 1), tmp_path / "model.safetensors"
    model = training.model().eval()
    save_checkpoint(path, model.state_dict(), {"settings": training.settings()})
    tokens = torch.arange(256).view(32, 8)
    assert torch.equal(load_lm(path)(tokens), model(tokens))


def test_of_words_the_vocabulary_is_written(text):
    assert train(text, "--steps", "4", "--batch", "2", "--config", "words-16") == 0
    vocabulary = json.loads((text.parent / "out" / "vocabulary.json").read_text())
    known = words.from_text(text)
    assert (
        " ".join(vocabulary[number] for number in known.train[: len(SENTENCE.split()) + 1])
        == SENTENCE.strip() + " <eos>"
    )
    assert len(vocabulary) == known.vocab_size


def test_the_page_on_training_uses_what_is_left(text, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    of_words, of_bytes, of_cut_files, to_train_on, own_loop = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    text.write_text(("It was a very " + SENTENCE) * 400)
    monkeypatch.chdir(text.parent)
    assert train(text, "--steps", "4", "--batch", "2", "--config", "words-16", out="out/lm") == 0
    capsys.readouterr()
    exec(compile(of_words, "docs/training.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(line.startswith("It was a very ") and len(line.split()) == 24 for line in printed)

    (command,) = re.findall(r"`layerdrop-fast (prune out/lm/.*)` writes a file", page)
    assert cli.main(command.split()) == 0
    before = names["small"].state_dict()
    exec(compile(of_cut_files, "docs/training.md", "exec"), names)
    after = names["small"].state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    exec(compile(to_train_on, "docs/training.md", "exec"), names)
    assert names["small"].stack.plan().kept_counts != names["small"].stack.plan(1).kept_counts

    assert train(text, "--steps", "4", "--batch", "2", "--restart", out="out/lm") == 0
    capsys.readouterr()
    exec(compile(of_bytes, "docs/training.md", "exec"), names | {"model": load_lm("out/lm/model.safetensors")})
    assert capsys.readouterr().out.startswith("def ")
    exec(compile(own_loop, "docs/training.md", "exec"), names)
    assert any(weight.grad is not None for weight in names["model"].stack.parameters())


def test_a_model_that_is_none_is_named(text):
    path = text.parent / "other.safetensors"
    save_checkpoint(path, {"x": torch.zeros(1)}, {"settings": {"num_layers": 2}})
    with pytest.raises(RecipeError, match=r"other\.safetensors does not tell the d_model, nhead, .* of its model"):
        load_lm(path)
    with pytest.raises(RecipeError, match="is damaged, or not what train or the demo wrote, or prune left of it"):
        load_lm(text)
    save_checkpoint(path, {"x": torch.zeros(1)}, {"settings": {}, "step": 3, "seconds": 1.0})
    with pytest.raises(RecipeError, match=r"other\.safetensors is a run that is not finished"):
        load_lm(path)


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_left_of_a_trained_model_tells_its_size(text, folder, capsys):
    assert train(text, "--steps", "4", "--batch", "2") == 0
    source = text.parent / "out" / ("" if folder else "model.safetensors")
    small = text.parent / ("small" if folder else "small.safetensors")
    smaller = text.parent / "smaller.safetensors"
    assert cli.main(["prune", str(source), "--kept", "8", "--out", str(small)]) == 0
    path = small / "model.safetensors" if folder else small
    assert cli.main(["prune", str(path), "--keep", "1,6", "--out", str(smaller)]) == 0
    model = load_lm(text.parent / "out")
    for file, keep in ((path, every_other(16, kept=8)), (smaller, [2, 12])):
        expected = extract(model, keep).state_dict()
        found = load_lm(file).state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_damaged_model_is_not_cut(text, capsys):
    assert train(text, "--steps", "4", "--batch", "2") == 0
    path = text.parent / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cli.main(["prune", str(path), "--kept", "8", "--out", str(text.parent / "small.safetensors")]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert not (text.parent / "small.safetensors").exists()


def test_equal_work_is_more_steps(text):
    assert train(text, "--steps", "8", "--p", "0.5", "--equal-work", "--batch", "1") == 0
    assert json.loads((text.parent / "out" / "metrics.json").read_text())["settings"]["steps"] == 16


def test_a_stopped_run_goes_on(text, monkeypatch, capsys):
    assert train(text, "--steps", "10", "--batch", "2", out="unbroken") == 0
    steps = []

    def interrupt(self, *arguments, step=torch.optim.AdamW.step):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    assert train(text, "--steps", "10", "--batch", "2") == 130
    assert "The same command goes on from here" in capsys.readouterr().err
    steps.clear()
    assert train(text, "--steps", "10", "--batch", "2", "--restart") == 130
    assert "The same command without --restart goes on from here" in capsys.readouterr().err
    capsys.readouterr()
    assert train(text, "--steps", "10", "--batch", "2") == 0
    assert "Going on after step 4 of 10." in capsys.readouterr().out
    assert len(steps) == 10
    found, expected = (
        json.loads((text.parent / out / "metrics.json").read_text())["bits_per_token"] for out in ("out", "unbroken")
    )
    assert found == expected


def test_a_finished_run_is_kept(text, capsys):
    out, arguments = text.parent / "out", ("--steps", "8", "--batch", "2")
    assert train(text, *arguments) == 0
    before = json.loads((out / "metrics.json").read_text())
    (out / "model.training.safetensors").write_bytes(b"of a run that was killed between its last two moves")
    assert train(text, *arguments) == 0
    assert "model.safetensors is trained already." in capsys.readouterr().out
    after = json.loads((out / "metrics.json").read_text())
    assert (after["training"], after["bits_per_token"]) == (before["training"], before["bits_per_token"])
    assert not (out / "model.training.safetensors").exists()


def test_a_cut_that_is_stopped_is_made_again(text, monkeypatch):
    def interrupt(*arguments, score=evaluation.bits_per_token):
        scored.append(1)
        if len(scored) == 3:
            signal.raise_signal(signal.SIGINT)
        return score(*arguments)

    scored = []
    monkeypatch.setattr(evaluation, "bits_per_token", interrupt)
    assert train(text, "--steps", "2", "--batch", "1") == 130
    assert len(scored) == 3
    assert {path.name for path in (text.parent / "out").iterdir()} == {"model.safetensors"}
    assert train(text, "--steps", "2", "--batch", "1") == 0


def test_other_settings_are_refused_and_restart_forgets(text, capsys):
    assert train(text, "--steps", "2", "--batch", "1") == 0
    assert train(text, "--steps", "3", "--batch", "1") == 2
    assert "was made with steps = 2, this call has steps = 3" in capsys.readouterr().err
    assert train(text, "--steps", "3", "--batch", "1", "--restart") == 0
    assert train(text, "--steps", "3", "--batch", "1", "--config", "words-16", "--p", "0.3") == 2
    named = capsys.readouterr().err
    assert "context = 64, " in named
    assert "depth = uniform(p=0.3)" in named
    assert train(text, "--steps", "3", "--batch", "1", "--config", "words-16", "--restart") == 0
    assert (text.parent / "out" / "vocabulary.json").exists()
    assert train(text, "--steps", "3", "--batch", "1", "--restart") == 0
    assert not (text.parent / "out" / "vocabulary.json").exists()


def test_restart_forgets_an_unfinished_run(text, capsys):
    (text.parent / "out").mkdir()
    (text.parent / "out" / "model.training.safetensors").write_bytes(b"of other settings")
    assert train(text, "--steps", "2", "--batch", "1") == 2
    assert "model.training.safetensors is damaged" in capsys.readouterr().err
    assert train(text, "--steps", "2", "--batch", "1", "--restart") == 0


def test_another_number_of_threads_is_refused(text, capsys):
    assert train(text, "--steps", "2", "--batch", "1") == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert train(text, "--steps", "2", "--batch", "1") == 2
    finally:
        torch.set_num_threads(threads)
    assert f"made with threads = {threads}, this call has threads = {threads + 1}" in capsys.readouterr().err


def test_it_says_how_many_tokens_a_step_has(text, capsys):
    assert train(text, "--steps", "2", "--batch", "2", "--accumulation", "3") == 0
    assert f"2 steps of {2 * 3 * 64} tokens" in capsys.readouterr().out


def test_plots_are_of_depths_and_of_training(monkeypatch):
    drawn = []
    monkeypatch.setattr(lm, "plot_curves", lambda curves, draw=lm.plot_curves: drawn.append(curves) or draw(curves))
    training = {"training_curve": [(5, 7.5, 12.0), (10, 6.5, 11.0)]}
    bits = {"2": 6.0, "1": 8.0}
    metrics = {"configuration": "x", "text": {"unit": "byte"}, "training": training, "bits_per_token": bits}
    assert set(lm.plots(metrics)) == {"depth.png", "training.png"}
    assert [list(curves.values()) for curves in drawn] == [[{2: 6.0, 1: 8.0}], [{5: 7.5, 10: 6.5}]]


@pytest.mark.parametrize(("train_bytes", "validation_bytes", "short"), [(64, 65, "training"), (65, 64, "validation")])
def test_both_parts_have_a_window(train_bytes, validation_bytes, short):
    train, validation = (np.zeros(length, np.uint8) for length in (train_bytes, validation_bytes))
    with pytest.raises(RecipeError, match=f"the {short} part has 64 bytes, expected more than the 64 of a window"):
        lm.training_of(lm.Options(), Corpus("x", train, validation))
    lm.training_of(lm.Options(), Corpus("x", np.zeros(65, np.uint8), np.zeros(65, np.uint8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "0.2", "--granularity", "sample"], "--heads and --chunks need --granularity batch"),
        (["--learned", "--chunks", "0.2"], "--p is 0 with --heads or --chunks, expected a mean rate above 0"),
        (["--learned", "--p", "0"], "--p is given as 0, expected a mean rate above 0 with --learned"),
        (["--heads", "0.2", "--equal-work"], r"heads are dropped at rate 0\.2, chunks at 0\.0: expected neither"),
        (
            ["--device", "cpu", "--config", "wikitext-103-16"],
            "the training part has .* words, expected more than the 3,072 of a window",
        ),
        (["--learned", "--p", "0.97"], r"the mean drop rate \(--p\) is 0.97, expected a number in \(0, 0.95\)"),
        (["--p", "1", "--equal-work"], r"uniform\(p=1.0\) runs no layer, expected some to run"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
    ],
)
def test_choices_that_do_not_fit_are_named(text, capsys, arguments, message):
    text.write_text(SENTENCE * 40 if "wikitext" in arguments[-1] else SENTENCE * 400)
    (text.parent / "out").mkdir()
    (text.parent / "out" / "model.safetensors").write_bytes(b"kept")
    assert train(text, *arguments, "--restart") == 2
    assert (text.parent / "out" / "model.safetensors").read_bytes() == b"kept"
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_for_gpus_is_not_begun_without_one(text, capsys):
    out = text.parent / "out"
    assert cli.main(["train", "lm", "--text", str(text), "--out", str(out), "--config", "wikitext-103-40"]) == 2
    assert "wikitext-103-40 is made for GPUs, and torch finds none here" in capsys.readouterr().err
    assert not out.exists()


def test_a_dataset_takes_no_text(text):
    with pytest.raises(RecipeError, match="--dataset is read word by word: give no --text"):
        lm.corpus_of(lm.Options(configuration="words-16", text=text, dataset="wikitext-2"))


def test_a_refused_call_leaves_no_folder(text, capsys):
    (text.parent / "folder").mkdir()
    assert train(text.parent / "folder", out="out") == 2
    assert "folder is a folder, expected a file, or --config words-16" in capsys.readouterr().err
    assert train(text.parent / "nowhere") == 2
    assert {path.name for path in text.parent.iterdir()} == {"folder", "text.txt"}


def test_words_need_a_text(tmp_path, capsys):
    assert cli.main(["train", "lm", "--config", "words-16", "--out", str(tmp_path / "out")]) == 2
    assert "words-16 reads words: give a text with --text FILE, or --dataset" in capsys.readouterr().err
    assert cli.main(["train", "lm", "--dataset", "wikitext-2", "--out", str(tmp_path / "out")]) == 2
    assert "--dataset is read word by word" in capsys.readouterr().err


def test_the_introduction_tells_every_rate(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("often often rare\n" * 3 + "often often seldom\n" * 197)
    recipe = Recipe(uniform(0.2), fade=True, heads=0.3, chunks=0.1, scale="inverse")
    for learned, layers in ((False, "uniform(p=0.2)"), (True, "learned, mean 0.2")):
        options = lm.Options("words-16", replace(recipe, learned=learned), path, changes={"steps": 7})
        corpus = lm.corpus_of(options)
        training = lm.training_of(options, corpus)
        told = lm.introduction(options, corpus, training, torch.device("cpu"))
        parameters = sum(weight.numel() for weight in training.model().parameters())
        assert "novel.txt, 720 words to learn from, vocabulary 5.\n" in told
        assert f"16 layers, {parameters:,} parameters; 7 steps of 576 tokens.\n" in told
        expected = f"Drop rates: layers {layers}, heads uniform(p=0.3), feed-forward chunks uniform(p=0.1)"
        assert f"{expected}, falling to 0 over the run; by batch, bernoulli, scale inverse.\n" in told
    few = words.from_text(path, min_count=4)
    told = lm.introduction(options, few, training, torch.device("cpu"))
    assert "720 words to learn from, 0.4% of them <unk>, vocabulary 4.\n" in told
