"""The networks of the experiments, trained on one thread each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerdrop_fast.recipes.experiments import measures
from layerdrop_fast.recipes.text import Corpus, bigram_bits_per_byte, from_file, standard_library, validation_windows
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Trained, Training, train
from layerdrop_fast.schedule import linear, uniform

SIZE = ModelSize(nhead=4)  # 16 layers, d 64, byte by byte: the demo's, with heads enough to drop some
STEPS = 1200
WINDOWS = 512  # validation windows; every second one chooses layers where that is needed, the others judge


@dataclass(frozen=True)
class Network:
    """How a network is trained, and what is measured of it besides its value at every depth."""

    recipe: Recipe
    equal_work: bool = False  # as many more steps as dropped layers save; else the same number of steps
    strategies: bool = False  # cut to half by every strategy (figure 4, right)
    layers: bool = False  # how much each layer is missed (figure 5); of seed 0 also every half that can be left
    parts: bool = False  # half of its heads, chunks, branches, layers taken out (figure 4, left)


NETWORKS = {
    "dense": Network(DENSE, strategies=True, layers=True, parts=True),
    "layers 0.2": Network(Recipe(uniform(0.2)), strategies=True, layers=True, parts=True),
    "layers 0.5": Network(Recipe(uniform(0.5)), strategies=True, layers=True),
    "data-driven 0.5": Network(Recipe(uniform(0.5), learned=True), strategies=True),
    "uniform 0.15, equal work": Network(Recipe(uniform(0.15)), equal_work=True),
    "2026 recipe, equal work": Network(
        Recipe(linear(0.6), fade=True, granularity="sample", scale="inverse"), equal_work=True
    ),
    "heads 0.2": Network(Recipe(uniform(0.0), heads=0.2), parts=True),
    "chunks 0.2": Network(Recipe(uniform(0.0), chunks=0.2), parts=True),
    "branches 0.2": Network(Recipe(uniform(0.2), target="branch"), parts=True),
    "layers and heads 0.2": Network(Recipe(uniform(0.2), heads=0.2), parts=True),
    "branches and heads 0.2": Network(Recipe(uniform(0.2), target="branch", heads=0.2), parts=True),
}


def training_of(name: str, seed: int, steps: int, size: ModelSize = SIZE) -> Training:
    """What is trained under this name."""
    network = NETWORKS[name]
    if network.equal_work:
        steps = network.recipe.steps_of_equal_work(size.num_layers, steps)
    return Training(size, network.recipe, steps, seed=seed)


def run(name: str, seed: int, text: Path | None, steps: int, size: ModelSize = SIZE) -> dict[str, Any]:
    """Trains a network and measures it; ``text`` None is the standard library."""
    torch.set_num_threads(1)
    corpus = standard_library() if text is None else from_file(text)
    training = training_of(name, seed, steps, size)
    trained = train(training, corpus.train)
    return {
        "network": name,
        "seed": seed,
        "steps": steps,
        "settings": training.settings(),
        "text": {"name": corpus.name, "sha256": corpus.sha256},
        "share_of_layers_run": trained.layers_run / (training.steps * size.num_layers),
        "seconds": trained.seconds,
        **measured(NETWORKS[name], trained, corpus, size, seed),
    }


def measured(network: Network, trained: Trained, corpus: Corpus, size: ModelSize, seed: int) -> dict[str, Any]:
    """What is told of a network."""
    model = trained.model.eval()
    scored = validation_windows(corpus.validation, count=WINDOWS, length=size.context + 1)
    chosen_on, judged_on = scored[::2], scored[1::2]
    found: dict[str, Any] = {
        "bigram": bigram_bits_per_byte(corpus.train, scored),
        "curve": measures.curve(model, scored),
    }
    if trained.learned is not None:
        found["learned_rates"] = trained.learned.rates.tolist()
    if network.strategies:
        found["strategies"] = measures.strategies(model, trained.learned, chosen_on, judged_on)
    if network.layers:
        found["importance"] = measures.importance(model, chosen_on, seed)
    if network.layers and seed == 0:
        found["halves"] = measures.halves(model, chosen_on, judged_on)
    if network.parts:
        found["parts"] = measures.parts(model, scored)
    return found
