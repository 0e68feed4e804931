"""Many runs beside each other; each result is kept in one JSON file, with its commit and machine, once it is there."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from layerdrop_fast._provenance import provenance
from layerdrop_fast.recipes.files import RecipeError, read_bytes, write_atomically

Result = dict[str, Any]


def read_results(path: Path) -> list[Result]:
    """What a file holds.

    Raises:
        RecipeError: it cannot be read, or is no file of results.
    """
    try:
        found: list[Result] = json.loads(read_bytes(path))["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is no file of results: {error!r}") from error
    if not isinstance(found, list) or not all(isinstance(result, dict) for result in found):
        raise RecipeError(f"{path} is no file of results: results are {str(found)[:40]}, expected a list of objects")
    return found


def run_missing(
    out: Path,
    wanted: Mapping[Hashable, tuple[Any, ...]],
    run: Callable[..., Result],
    key: Callable[[Result], Hashable],
    *,
    jobs: int,
    command: Sequence[str],
    tell: Callable[[Result], None],
) -> list[Result]:
    """``run(*arguments)`` for what the file does not hold yet, each in its own process; returns all results.

    Args:
        out: the file; made where there is none.
        wanted: arguments that can be pickled, by the key of their result.
        key: of a result.
        jobs: runs at a time.
        command: what is noted in the file.
        tell: called with each new result.

    Raises:
        RecipeError: the file is no such file. What the first run that failed raised, when all others have ended.
    """
    results = read_results(out) if out.exists() else []
    there = {key(result) for result in results}
    failed: list[BaseException] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_alone, run, arguments) for name, arguments in wanted.items() if name not in there]
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed.append(error)
                    continue
                here = {**provenance(command), "threads": "1"}
                results.append({**future.result(), "commit": here["commit"], "machine": here["machine"]})
                content = {"provenance": here, "results": results}
                out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())
                tell(results[-1])
        finally:  # after Ctrl-C what has not begun does not begin
            pool.shutdown(cancel_futures=True)
    if failed:
        raise failed[0]
    return results


def _alone(run: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """In a process of its own, whose memory ends with it: malloc keeps what many runs in a row have freed."""
    # A fresh one: torch's threads do not survive a fork.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *arguments).result()
