"""``layerdrop-fast train lm``: a language model with LayerDrop on any text, and what it is worth at every depth."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerdrop_fast._progress import stage
from layerdrop_fast._provenance import machine
from layerdrop_fast.prune.data_driven import check_target_rate
from layerdrop_fast.prune.plots import plot_curves
from layerdrop_fast.recipes import words
from layerdrop_fast.recipes.configurations import CONFIGURATIONS
from layerdrop_fast.recipes.evaluation import depth_curve
from layerdrop_fast.recipes.files import RecipeError, locked, write_atomically
from layerdrop_fast.recipes.run import device_of, environment_of, remove, reproducible, trained_in
from layerdrop_fast.recipes.stop_signal import StopSignal
from layerdrop_fast.recipes.text import Corpus, from_file, standard_library, validation_windows
from layerdrop_fast.recipes.training import DENSE, Recipe, Training

EVALUATION_WINDOWS = 512
NAME = "model"
IN_WORDS = {"layer": "layers", "branch": "branches", "head": "heads", "ffn_chunk": "feed-forward chunks"}
RESULTS = ("metrics.json", "depth.png", "training.png", "vocabulary.json")


@dataclass(frozen=True)
class Options:
    """What the command line sets; None leaves a configuration's own."""

    configuration: str = "bytes-16"
    recipe: Recipe = DENSE
    text: Path | None = None
    dataset: str | None = None
    out: Path = Path("out/lm")
    restart: bool = False
    equal_work: bool = False  # as many more steps as dropped layers save
    device: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # of the Training: steps, seed, batch, ...


def run(options: Options) -> None:
    """Trains, or takes up a training, cuts the model to every depth, prints and plots what it is worth there.

    Raises:
        RecipeError: something the user can mend; nothing that was saved is lost. Stopped: Ctrl-C; what was done is
            saved.
    """
    missing = [name for name in ("matplotlib", "rich", "safetensors") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"train needs {', '.join(missing)}: pip install 'layerdrop_fast[recipes]'")
    device = device_of(options.device)
    if CONFIGURATIONS[options.configuration].for_gpus and device.type == "cpu" and options.device is None:
        raise RecipeError(
            f"{options.configuration} is made for GPUs, and torch finds none here: give --device cpu to train it on a "
            "CPU all the same"
        )
    corpus = corpus_of(options)
    training = training_of(options, corpus)
    with StopSignal() as stop, locked(options.out):
        if options.restart:
            for name in (f"{NAME}.safetensors", f"{NAME}.training.safetensors", *RESULTS):
                remove(options.out / name)
        print(introduction(options, corpus, training, device), flush=True)
        with reproducible(device):
            environment = environment_of(corpus, device) | {"threads": torch.get_num_threads()}
            model, entry = trained_in(
                options.out,
                NAME,
                training,
                corpus.train,
                device=device,
                environment=environment,
                should_stop=stop,
                title=options.configuration,
            )
            begun = time.monotonic()
            scored = validation_windows(corpus.validation, count=EVALUATION_WINDOWS, length=training.size.context + 1)
            layers = training.size.num_layers
            with stage("cut", layers) as show:
                curve = depth_curve(
                    model,
                    scored,
                    on_depth=lambda depth, bits: show(layers + 1 - depth, f"depth {depth}: {bits:.3f} bits/token"),
                    should_stop=stop,
                )
        metrics = {
            "configuration": options.configuration,
            "settings": training.settings() | environment,
            "machine": machine(device),
            "text": {"name": corpus.name, "unit": corpus.unit, "vocabulary": corpus.vocab_size}
            | {"train_tokens": len(corpus.train), "scored_tokens": scored[:, 1:].size},
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "training": entry,
            "bits_per_token": {str(depth): bits for depth, bits in curve.items()},
            "seconds": {"train": entry["seconds"], "cut": time.monotonic() - begun},
        }
        files = {"metrics.json": json.dumps(metrics, indent=1).encode(), **plots(metrics)}
        if corpus.words is not None:
            files["vocabulary.json"] = json.dumps(corpus.words, ensure_ascii=False, indent=0).encode()
        for name, content in files.items():
            write_atomically(options.out / name, content)
        print(table(metrics))
        print(f"\nWritten: {options.out}/{NAME}.safetensors, {', '.join(files)}", flush=True)


def corpus_of(options: Options) -> Corpus:
    """The text in the tokens of the configuration."""
    by_words = CONFIGURATIONS[options.configuration].words
    if options.text is not None and options.text.is_dir() and not by_words:
        raise RecipeError(f"{options.text} is a folder, expected a file, or --config words-16, which reads WikiText's")
    if options.dataset is not None:
        if options.text is not None or not by_words:
            raise RecipeError("--dataset is read word by word: give no --text, and a configuration that reads words")
        return words.wikitext(options.dataset)
    if by_words:
        if options.text is None:
            raise RecipeError(f"{options.configuration} reads words: give a text with --text FILE, or --dataset")
        return words.from_text(options.text)
    return standard_library() if options.text is None else from_file(options.text)


def training_of(options: Options, corpus: Corpus) -> Training:
    """What is trained, on this text."""
    training = CONFIGURATIONS[options.configuration].of(corpus.vocab_size)
    training = replace(training, recipe=options.recipe, **options.changes)
    try:
        if options.equal_work:
            steps = options.recipe.steps_of_equal_work(training.size.num_layers, training.steps)
            training = replace(training, steps=steps)
        _parameters(training)
        if training.recipe.learned:
            check_target_rate(training.mean_rate, "the mean drop rate (--p)")
    except ValueError as error:  # choices that do not go together
        raise RecipeError(str(error)) from error
    for name, part in (("training", corpus.train), ("validation", corpus.validation)):
        if len(part) <= training.size.context:
            raise RecipeError(
                f"{corpus.name}: the {name} part has {len(part):,} {corpus.unit}s, expected more than the "
                f"{training.size.context:,} of a window"
            )
    return training


def introduction(options: Options, corpus: Corpus, training: Training, device: torch.device) -> str:
    """What is about to happen, in a few lines."""
    size = training.size
    recipe = training.recipe
    rates = {IN_WORDS[name]: str(schedule.depth) for name, schedule in recipe.schedule(size.num_layers, 1).items()}
    if recipe.learned:
        rates[IN_WORDS[recipe.target]] = f"learned, mean {training.mean_rate:.3g}"
    listed = ", ".join(f"{name} {rate}" for name, rate in rates.items())
    fade = ", falling to 0 over the run" if recipe.fade else ""
    tokens = training.batch * training.accumulation * size.context
    return (
        f"{options.configuration}: {CONFIGURATIONS[options.configuration].about}\n"
        f"Text: {corpus.name}, {len(corpus.train):,} {corpus.unit}s to learn from{_unknown(corpus)}, "
        f"vocabulary {corpus.vocab_size:,}.\n"
        f"{size.num_layers} layers, {_parameters(training):,} parameters; "
        f"{training.steps:,} steps of {tokens:,} tokens.\n"
        f"Drop rates: {listed}{fade}; by {recipe.granularity}, {recipe.sampling}, scale {recipe.scale}.\n"
        f"On {machine(device)}, threads: {torch.get_num_threads()}."
    )


def _parameters(training: Training) -> int:
    """How many weights the model has, none of which is made."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in training.model().parameters())


def _unknown(corpus: Corpus) -> str:
    """How many words stand for rare ones."""
    if corpus.words is None:
        return ""
    share = float(np.mean(corpus.train == corpus.words.index(words.UNKNOWN)))
    return f", {share:.1%} of them {words.UNKNOWN}" if share else ""


def table(metrics: dict[str, Any]) -> str:
    """Bits per token and perplexity by depth."""
    unit = metrics["text"]["unit"]
    lines = [f"Validation after a cut by Every Other, no retraining\nlayers  bits/{unit}  perplexity"]
    for depth, bits in metrics["bits_per_token"].items():
        lines.append(f"{depth:>6s}  {bits:{5 + len(unit)}.3f}  {_perplexity(bits):10,.2f}")
    return "\n" + "\n".join(lines)


def _perplexity(bits: float) -> float:
    return float(np.exp2(min(bits, 1000.0)))


def plots(metrics: dict[str, Any]) -> dict[str, bytes]:
    """The plots, by file name."""
    unit, curve = metrics["text"]["unit"], metrics["training"]["training_curve"]
    axes = plot_curves({metrics["configuration"]: {int(d): bits for d, bits in metrics["bits_per_token"].items()}})
    axes.set_ylabel(f"validation bits/{unit}")
    training = plot_curves({"training, with dropped layers": {step: bits for step, bits, _ in curve}})
    training.set_xlabel("step")
    training.set_ylabel(f"bits/{unit}")
    return {"depth.png": _png(axes.figure), "training.png": _png(training.figure)}


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
