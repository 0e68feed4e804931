"""Reads what pytest-benchmark stored of the suites that are reported, or says why it may not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerdrop_fast.recipes.bench.allocations import Course
from layerdrop_fast.recipes.bench.measure import Figures, figures_of
from layerdrop_fast.recipes.files import RecipeError, read_bytes

SUITES = ("step", "depth", "memory", "parts")
VERSIONS = {
    "python": "Python",
    "torch": "torch",
    "numpy": "numpy",
    "triton": "triton",
    "layerdrop_fast": "layerdrop_fast",
}
HARDWARE = ("machine", "gpu", "driver")
# Where each piece of provenance stands in a file.
WANTED = [
    *(("machine_info", name) for name in (*HARDWARE, *VERSIONS)),
    ("commit_info", "id"),
    ("commit_info", "dirty"),
    *(("run", name) for name in ("command", "commit", "failed", "exit status")),
    ("datetime",),
]


@dataclass(frozen=True)
class Source:
    """A file, and where its numbers come from."""

    file: str
    date: str
    commit: str
    command: str
    about: Mapping[str, str] = field(hash=False)  # hardware and versions

    def line(self, threads: int) -> str:
        """In Markdown."""
        gpu = "" if self.about["gpu"] == "none" else f"{self.about['gpu']}, driver {self.about['driver']}, "
        versions = ", ".join(f"{name} {self.about[name]}" for name in VERSIONS if self.about[name] != "none")
        return (
            f"{gpu}{self.about['machine']}, threads: {threads}; {versions}; commit `{self.commit[:12]}`, "
            f"{self.date[:10]}; `{self.command}`, `{self.file}`"
        )


@dataclass(frozen=True)
class Contest:
    """Ways that took turns with each other, all from one file."""

    suite: str
    source: Source
    threads: int
    figures: tuple[Figures, ...]
    courses: Mapping[str, Course]  # by way; of suite "memory"

    @property
    def provenance(self) -> str:
        return self.source.line(self.threads)

    def by_layers(self) -> dict[int, dict[str, Figures]]:
        """Figures by depth and way."""
        found: dict[int, dict[str, Figures]] = {}
        for row in self.figures:
            found.setdefault(row.setting.layers, {})[row.way] = row
        return found

    def by_rate(self) -> dict[float, dict[str, Figures]]:
        """Figures by drop rate and way."""
        found: dict[float, dict[str, Figures]] = {}
        for row in self.figures:
            found.setdefault(row.setting.p, {})[row.way] = row
        return found

    def groups(self) -> list[dict[str, Figures]]:
        """Figures by way, of each setting."""
        if self.suite == "depth":
            return list(self.by_layers().values())
        return list(self.by_rate().values()) if self.suite == "parts" else [self.by_way()]

    def by_way(self) -> dict[str, Figures]:
        return {row.way: row for row in self.figures}


@dataclass(frozen=True)
class Results:
    """All contests of one kind of device."""

    device: str
    contests: tuple[Contest, ...]

    def suite(self, name: str) -> list[Contest]:
        return [contest for contest in self.contests if contest.suite == name]

    def only(self, suite: str) -> Contest | None:
        """The contest of a suite that has one."""
        return next(iter(self.suite(suite)), None)

    def step(self, granularity: str, p: float, dtype: str = "float32", compiled: bool = False) -> Contest | None:
        wanted = (granularity, p, dtype, compiled)
        for contest in self.suite("step"):
            of = contest.figures[0].setting
            if (of.granularity, of.p, of.dtype, of.compiled) == wanted:
                return contest
        return None


def read(folder: Path) -> Results:
    """The latest results of each contest below a folder; of a GPU where there are any, else of the CPU.

    Raises:
        RecipeError: names the file that cannot be used, and why.
    """
    if not folder.is_dir():
        raise RecipeError(f"no folder {folder}: `make bench RESULTS={folder}` makes it")
    files = [found for path in sorted(folder.rglob("*.json")) if (found := _load(path, folder))]
    files.sort(key=lambda found: found[0].date)
    for (earlier, _), (later, _) in pairwise(files):
        if unlike := [name for name in HARDWARE if earlier.about[name] != later.about[name]]:
            raise RecipeError(f"{earlier.file} and {later.file} are of different machines: {', '.join(unlike)} differ")
    latest: dict[tuple[str, str], dict[str, tuple[Source, dict[str, Any]]]] = {}
    for source, benchmarks in files:
        for benchmark in benchmarks:
            latest.setdefault(_contest(benchmark), {})[benchmark["fullname"]] = (source, benchmark)
    contests = [_together(suite, list(found.values())) for (suite, _), found in latest.items()]
    if not contests:
        raise RecipeError(f"no results of {', '.join(SUITES)} below {folder}: `make bench RESULTS={folder}` makes some")
    devices = [contest.figures[0].setting.device.partition(":")[0] for contest in contests]
    device = "cuda" if "cuda" in devices else "cpu"
    return Results(device, tuple(contest for contest, on in zip(contests, devices, strict=True) if on == device))


def _load(path: Path, folder: Path) -> tuple[Source, list[dict[str, Any]]] | None:
    """What a file holds of our suites; None: nothing."""
    name = str(path.relative_to(folder))
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise RecipeError(f"{name} is no JSON: {error}") from error
    listed = content.get("benchmarks") if isinstance(content, dict) else None
    rows = listed if isinstance(listed, list) else []
    benchmarks = [row for row in rows if isinstance(row, dict) and _suite(row) in SUITES]
    return (_source(content, name), benchmarks) if benchmarks else None


def _source(content: dict[str, Any], name: str) -> Source:
    """Raises RecipeError unless the file is of a green run and says where it comes from."""
    if missing := [".".join(keys) for keys in WANTED if _at(content, keys) is None]:
        raise RecipeError(f"{name} does not say where its numbers come from: {', '.join(missing)} missing")
    run, commit = content["run"], content["commit_info"]
    if run["failed"] or run["exit status"]:
        raise RecipeError(
            f"{name} is of a red run: {run['failed']} tests failed, exit status {run['exit status']}; mend what "
            "failed, measure again, remove the file"
        )
    if commit["dirty"]:
        raise RecipeError(f"{name} is of a working tree with changes: commit_info.dirty; commit, then measure again")
    if not re.fullmatch("[0-9a-f]{40}", commit["id"]):
        raise RecipeError(f"{name} is of no commit: commit_info.id is {commit['id']!r}; measure in a checkout")
    if run["commit"] != commit["id"]:
        raise RecipeError(f"{name} began at commit {run['commit']} and ended at {commit['id']}; measure again")
    about = {key: content["machine_info"][key] for key in (*HARDWARE, *VERSIONS)}
    return Source(name, content["datetime"], commit["id"], run["command"], about)


def _at(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _suite(benchmark: dict[str, Any]) -> str:
    return Path(str(benchmark.get("fullname")).partition("::")[0]).stem.removeprefix("test_")


def _contest(benchmark: dict[str, Any]) -> tuple[str, str]:
    """Of "step" those whose names differ in nothing but the way take turns, of the other suites all."""
    suite, name = _suite(benchmark), str(benchmark["fullname"])
    way = str(_at(benchmark, ("extra_info", "figures", "way")))
    return suite, name.removesuffix(f"-{way}]") if suite == "step" else ""


def _together(suite: str, found: list[tuple[Source, dict[str, Any]]]) -> Contest:
    sources = list(dict.fromkeys(source for source, _ in found))
    if len(sources) > 1:
        ways = "; ".join(
            f"{source.file} has {', '.join(_parameters(row) for of, row in found if of == source)}"
            for source in sources
        )
        raise RecipeError(
            f"one contest of {suite} comes from several runs, and ratios pair the turns of one: {ways}; measure all "
            "of it again, or remove a file"
        )
    (source,) = sources
    figures = tuple(_figures(row, source) for _, row in found)
    courses = dict(_courses(found))
    if suite == "memory" and (without := [row.way for row in figures if row.way not in courses]):
        raise RecipeError(f"{source.file}: {', '.join(without)} of memory without extra_info.course")
    if len({len(row.seconds) for row in figures}) > 1:
        raise RecipeError(f"{source.file}: the ways of one contest of {suite} took different numbers of turns")
    threads = {_at(row, ("extra_info", "threads")) for _, row in found}
    if len(threads) > 1 or None in threads:
        raise RecipeError(f"{source.file}: {suite} does not say on how many threads: extra_info.threads")
    return Contest(suite, source, threads.pop(), figures, courses)


def _parameters(benchmark: dict[str, Any]) -> str:
    return str(benchmark["fullname"]).partition("[")[2].removesuffix("]")


def _figures(benchmark: dict[str, Any], source: Source) -> Figures:
    try:
        return figures_of(benchmark["extra_info"]["figures"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{source.file}: {benchmark['fullname']} has no usable extra_info.figures: {error!r}"
        ) from error


def _courses(found: list[tuple[Source, dict[str, Any]]]) -> Iterator[tuple[str, Course]]:
    for _, row in found:
        if course := row["extra_info"].get("course"):
            yield row["extra_info"]["figures"]["way"], Course(tuple(course["seconds"]), tuple(course["bytes"]))
