"""Many runs beside each other, each result kept in one JSON file as soon as it is there."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from layerdrop_fast._provenance import provenance
from layerdrop_fast.recipes.files import read_bytes, write_atomically

Result = dict[str, Any]


def run_missing(
    out: Path,
    wanted: Iterable[tuple[Any, ...]],
    run: Callable[..., Result],
    done: Callable[[Result], tuple[Any, ...]],
    *,
    jobs: int,
    command: Sequence[str],
    tell: Callable[[Result], None],
) -> list[Result]:
    """``run(*arguments)`` for what the file does not hold yet, in processes of their own; returns all results.

    Args:
        out: the file; made where there is none.
        wanted: arguments that can be pickled.
        done: the arguments that a result came from.
        jobs: runs at a time.
        command: what is noted in the file.
        tell: called with each new result.
    """
    results: list[Result] = json.loads(read_bytes(out))["results"] if out.exists() else []
    there = {done(result) for result in results}
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, *arguments) for arguments in wanted if arguments not in there]
        for future in as_completed(futures):
            results.append(future.result())
            content = {"provenance": {**provenance(command), "threads": "1"}, "results": results}
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())
            tell(results[-1])
    return results
