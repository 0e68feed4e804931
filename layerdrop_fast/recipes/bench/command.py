"""``layerdrop-fast bench``: what a training step of the user's size costs, by every way, on the user's machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerdrop_fast._progress import stage
from layerdrop_fast._provenance import provenance
from layerdrop_fast.recipes.bench.measure import ROUNDS, makers_of, measure
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.table import table
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY
from layerdrop_fast.recipes.files import RecipeError, write_atomically
from layerdrop_fast.recipes.stop_signal import StopSignal
from layerdrop_fast.recipes.training import Stopped


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    setting: Setting
    ways: Sequence[str] | None = None  # None: all that there are at the setting's granularity
    rounds: int = ROUNDS
    out: Path | None = None  # a JSON file


def run(options: Options) -> None:
    """Measures, prints the table and writes the file.

    Raises:
        RecipeError: something the user can mend. Stopped: Ctrl-C.
    """
    setting = options.setting
    makers = makers_of(setting.granularity)
    if unknown := [way for way in options.ways or () if way not in makers]:
        known = ", ".join(BY_GRANULARITY[setting.granularity])
        raise RecipeError(f"no way {unknown[0]!r} at granularity {setting.granularity!r}, expected some of: {known}")
    chosen = {way: make for way, make in makers.items() if options.ways is None or way in options.ways}
    about = provenance(["layerdrop-fast", *sys.argv[1:]])
    where = about["machine"] if setting.device == "cpu" else about["gpu"]
    print(f"One training step: {setting.title()}")
    print(f"{where}, threads: {about['threads']}, torch {about['torch']}, {about['date']}", flush=True)
    with StopSignal() as stop, stage("bench", 100) as show:

        def tell(done: int, total: int, what: str) -> None:
            if stop():
                raise Stopped
            show(100 * done // total, what)

        figures = measure(setting, chosen, rounds=options.rounds, tell=tell)
    print(f"\n{table(figures)}")
    if options.out is not None:
        content = {"provenance": about, "figures": [row.record() for row in figures.values()]}
        write_atomically(options.out, json.dumps(content, indent=1).encode() + b"\n")
        print(f"\n{options.out}")
