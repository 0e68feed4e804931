"""Shows how far a run is: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeAlias

SECONDS_BETWEEN_LINES = 10.0

# Called with how much of the stage is done and a note about it.
Update: TypeAlias = Callable[[int, str], None]


@contextmanager
def stage(title: str, total: int) -> Iterator[Update]:
    """Shows one stage of a run while the block goes through it."""
    with _bar(title, total) if sys.stdout.isatty() and find_spec("rich") else _lines(title, total) as update:
        yield update


@contextmanager
def _bar(title: str, total: int) -> Iterator[Update]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # All that fits in 80 columns.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(f"{title:<15}", total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Update]:
    begun = last = time.monotonic()

    def update(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last > SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title}: {done}/{total}  {note}  {now - begun:.0f} s", flush=True)

    yield update
