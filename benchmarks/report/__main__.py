"""The command line."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.goals import verdicts
from benchmarks.report.page import goals, missing, publish
from benchmarks.report.plots import plots
from benchmarks.report.read import read
from layerdrop_fast.recipes.files import RecipeError

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.report", description="Tables, plots and goals from results.")
    parser.add_argument("folder", type=Path, help="where `make bench RESULTS=...` put them")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/ (default: this checkout)")
    chosen = parser.parse_args(arguments)
    try:
        results = read(chosen.folder)
        pictures = plots(results)
        written = publish(chosen.root, results, pictures)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(goals(verdicts(results)))
    print()
    for path in written:
        print(path.relative_to(chosen.root))
    for source in dict.fromkeys(contest.source for contest in results.contests):
        suites = dict.fromkeys(contest.suite for contest in results.contests if contest.source == source)
        print(f"{', '.join(suites)}: commit {source.commit}, {source.file}")
    for line in missing(results, pictures):
        print(f"missing: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
