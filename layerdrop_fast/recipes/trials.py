"""The search behind the demo's recipe: several ways to drop layers, at the same work, on several seeds.

python -m layerdrop_fast.recipes.trials --out trials.json

Every result is written when it is there; a second call does only what is missing. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from layerdrop_fast.recipes.demo import DENSE_STEPS, EVALUATION_WINDOWS
from layerdrop_fast.recipes.evaluation import depth_curve
from layerdrop_fast.recipes.pool import run_missing
from layerdrop_fast.recipes.text import bigram_bits_per_byte, standard_library, validation_windows
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Training, train
from layerdrop_fast.schedule import alternating, linear, uniform

TRIALS = {
    "dense": DENSE,
    "uniform 0.2": Recipe(uniform(0.2)),
    "uniform 0.2, inverse": Recipe(uniform(0.2), scale="inverse"),
    "linear to 0.4": Recipe(linear(0.4)),
    "linear to 0.4, inverse": Recipe(linear(0.4), scale="inverse"),
    "linear to 0.4, decreasing, inverse": Recipe(linear(0.4), fade=True, scale="inverse"),
    "linear to 0.6, inverse": Recipe(linear(0.6), scale="inverse"),
    "alternating 0.4, inverse": Recipe(alternating(0.4), scale="inverse"),
    "linear to 0.4, systematic, inverse": Recipe(linear(0.4), scale="inverse", sampling="systematic"),
}


def shown_depths(num_layers: int) -> list[int]:
    """The depths that the table shows: all, 3/4, 1/2, 1/4 and 1/8 of the layers, and one more than the half."""
    eighths = {max(1, num_layers * part // 8) for part in (8, 6, 4, 2, 1)}
    return sorted(eighths | {min(num_layers, num_layers // 2 + 1)}, reverse=True)


def run_trial(name: str, seed: int, size: ModelSize, dense_steps: int) -> dict[str, Any]:
    """Trains one model on one thread and scores it at every depth."""
    torch.set_num_threads(1)
    recipe = TRIALS[name]
    training = Training(size, recipe, recipe.steps_of_equal_work(size.num_layers, dense_steps), seed=seed)
    corpus = standard_library()
    scored = validation_windows(corpus.validation, count=EVALUATION_WINDOWS, length=size.context + 1)
    trained = train(training, corpus.train)
    return {
        "trial": name,
        "seed": seed,
        "settings": training.settings(),
        "text": {"name": corpus.name, "sha256": corpus.sha256},
        "bigram_bits_per_byte": bigram_bits_per_byte(corpus.train, scored),
        "layers_run": trained.layers_run,
        "share_of_layers_run": trained.layers_run / (training.steps * size.num_layers),
        "bits_per_byte": {str(depth): bits for depth, bits in depth_curve(trained.model, scored).items()},
        "seconds": trained.seconds,
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The mean of each trial over its seeds, and each seed's result, by depth and over all depths."""
    depths = shown_depths(max(map(int, results[0]["bits_per_byte"])))
    lines = [
        f"| recipe | layers run | steps | {' | '.join(f'{depth} layers' for depth in depths)} | mean of all depths |",
        f"|---|--:|--:|{'--:|' * len(depths)}--:|",
    ]
    for name in TRIALS:
        runs = sorted((run for run in results if run["trial"] == name), key=lambda run: int(run["seed"]))
        if not runs:
            continue
        columns = [[run["bits_per_byte"][str(depth)] for run in runs] for depth in depths]
        columns.append([fmean(run["bits_per_byte"].values()) for run in runs])
        cells = [f"**{fmean(seeds):.3f}** ({', '.join(f'{bits:.3f}' for bits in seeds)})" for seeds in columns]
        share = fmean(run["share_of_layers_run"] for run in runs)
        lines.append(f"| {name} | {share:.0%} | {runs[0]['settings']['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m layerdrop_fast.recipes.trials", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON")
    parser.add_argument("--steps", type=int, default=DENSE_STEPS, help="steps of the dense model (%(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="depth (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds (%(default)s)")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME", help="some only")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, one thread each (%(default)s)")
    options = parser.parse_args(arguments)

    size = ModelSize(num_layers=options.layers)
    command = ["python", "-m", "layerdrop_fast.recipes.trials", *(sys.argv[1:] if arguments is None else arguments)]
    results = run_missing(
        options.out,
        {(name, seed): (name, seed, size, options.steps) for seed in options.seeds for name in options.trials},
        run_trial,
        lambda run: (run["trial"], run["seed"]),
        jobs=options.jobs,
        command=command,
        tell=lambda run: print(f"{run['trial']}, seed {run['seed']}: {run['bits_per_byte']}", flush=True),
    )
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
