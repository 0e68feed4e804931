"""python -m layerdrop_fast.recipes.experiments --out results.json [--text FILE] [--seeds 0 1 2] [--networks NAME ...]

Every result is written when it is there; a second call does only what is missing. ``--report FOLDER`` draws the plots
and prints the tables of what there is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from layerdrop_fast.recipes.experiments.runs import NETWORKS, STEPS, run
from layerdrop_fast.recipes.experiments.summary import comparable, plots, tables
from layerdrop_fast.recipes.files import RecipeError, write_atomically
from layerdrop_fast.recipes.pool import read_results, run_missing
from layerdrop_fast.recipes.text import from_file, standard_library

SEEDS = [0, 1, 2]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m layerdrop_fast.recipes.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = f"some of {', '.join(map(repr, NETWORKS))} (default: all)"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, JSON")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text (default: Python's standard library)")
    parser.add_argument("--steps", type=_count, default=STEPS, help="training steps (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help=listed)
    parser.add_argument("--jobs", type=_count, default=2, help="networks at a time, one thread each (%(default)s)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only report what is there: plots go here")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    if options.report is None:
        text = (standard_library() if options.text is None else from_file(options.text)).sha256
        run_missing(
            options.out,
            {
                (name, seed, text, options.steps): (name, seed, options.text, options.steps)
                for seed in options.seeds
                for name in options.networks
            },
            run,
            lambda result: (result["network"], result["seed"], result["text"]["sha256"], result["steps"]),
            jobs=options.jobs,
            command=["python", "-m", "layerdrop_fast.recipes.experiments", *_named(options)],
            tell=lambda result: print(f"{result['network']}, seed {result['seed']}: {result['curve']}", flush=True),
        )
    results = comparable(read_results(options.out))
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        for name, content in plots(results).items():
            write_atomically(options.report / name, content)
    print(tables(results))
    return 0


def _named(options: argparse.Namespace) -> list[str]:
    """The same call, with files by their names: paths say nothing to others."""
    text = [] if options.text is None else ["--text", options.text.name]
    steps = [] if options.steps == STEPS else ["--steps", str(options.steps)]
    seeds = [] if options.seeds == SEEDS else ["--seeds", *map(str, options.seeds)]
    networks = [] if options.networks == list(NETWORKS) else ["--networks", *map(repr, options.networks)]
    return ["--out", options.out.name, *text, *steps, *seeds, *networks]


if __name__ == "__main__":
    sys.exit(main())
