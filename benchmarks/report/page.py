"""Text between markers: <!-- report:NAME --> ... <!-- /report:NAME -->"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.report.goals import Verdict, verdicts
from benchmarks.report.plots import PLOTS, Picture
from benchmarks.report.read import SUITES, Contest, Results
from layerdrop_fast.recipes.bench.measure import Figures
from layerdrop_fast.recipes.bench.table import notes, rows
from layerdrop_fast.recipes.files import RecipeError, write_atomically

README, PAGE = "README.md", "docs/performance.md"
PICTURES = "docs/performance"
P = 0.5  # of the README's tables
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
ABSENT = "Not measured on this machine."


def publish(root: Path, results: Results, pictures: Mapping[str, Picture]) -> list[Path]:
    """Writes texts and pictures below ``root``; all is made before the first is written.

    Results of a GPU go to blocks and a folder of their own, whose names begin with "gpu".

    Raises:
        RecipeError: a file lacks a marker; nothing is written then.
    """
    on_gpu = results.device != "cpu"
    prefix, folder = ("gpu-", f"{PICTURES}/gpu") if on_gpu else ("", PICTURES)
    contents = {
        root / README: {"step-table": step_table(results)},
        root / PAGE: {
            "goals": goals(verdicts(results)),
            "all-tables": all_tables(results),
            **{name: picture(name, pictures, folder) for name in PLOTS},
        },
    }
    texts = {path: _filled(path, blocks, prefix, root) for path, blocks in contents.items()}
    files = {root / folder / f"{name}.png": drawn.png for name, drawn in pictures.items()}
    files |= {path: text.encode() for path, text in texts.items()}
    (root / folder).mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def missing(results: Results, pictures: Iterable[str]) -> list[str]:
    """What the results do not allow, a line each."""
    suites = [f"suite {suite}: no results" for suite in SUITES if not results.suite(suite)]
    return [*suites, *(f"plot {name}: needs {PLOTS[name].suite}" for name in PLOTS if name not in pictures)]


def replaced(text: str, name: str, block: str, file: str) -> str:
    """The text with another block between the markers of a name.

    Raises:
        RecipeError: there is not exactly one pair of them.
    """
    begin, end = f"<!-- report:{name} -->", f"<!-- /report:{name} -->"
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(end)
    again = any(marker in part for marker in (begin, end) for part in (before, inside, after))
    if not found or not closed or again:
        raise RecipeError(f"{file} needs {begin} and {end}, one of each, in this order")
    return f"{before}{begin}\n{block.strip()}\n{end}{after}"


def _filled(path: Path, blocks: dict[str, str], prefix: str, root: Path) -> str:
    file = str(path.relative_to(root))
    try:
        text = path.read_text()
    except OSError as error:
        raise RecipeError(f"cannot read {file}: {error.strerror}") from error
    for name, block in blocks.items():
        text = replaced(text, prefix + name, block, file)
    return text


def picture(name: str, pictures: Mapping[str, Picture], folder: str) -> str:
    """A plot and where its numbers come from, as the page in docs/ has it."""
    if name not in pictures:
        return ABSENT
    sources = dict.fromkeys(contest.provenance for contest in pictures[name].contests)
    return "\n\n".join([f"![{PLOTS[name].alt}]({folder.removeprefix('docs/')}/{name}.png)", *sources])


def step_table(results: Results) -> str:
    """The ways at one rate, at both granularities."""
    found = [results.step(granularity, P, DTYPE[results.device]) for granularity in ("batch", "sample")]
    contests = [contest for contest in found if contest]
    if not contests:
        return ABSENT
    tables = [f"{_title(contest.by_way())}\n{rows(contest.by_way())}" for contest in contests]
    names = list(dict.fromkeys(way for contest in contests for way in contest.by_way()))
    sources = dict.fromkeys(contest.provenance for contest in contests)
    return "\n\n".join([_code("\n\n".join([*tables, notes(names)])), *sources])


def all_tables(results: Results) -> str:
    """Every contest, below the run that it comes from, and what the ways do."""
    by_source: dict[str, list[Contest]] = {}
    for contest in results.contests:
        by_source.setdefault(contest.provenance, []).append(contest)
    parts = []
    for source, contests in by_source.items():
        parts.append(source)
        for contest in contests:
            parts.append(_code("\n\n".join(f"{_title(ways)}\n{rows(ways)}" for ways in contest.groups())))
    names = list(dict.fromkeys(row.way for contest in results.contests for row in contest.figures))
    return "\n\n".join([*parts, _code(notes(names))])


def goals(found: list[Verdict]) -> str:
    """A row a goal and place."""
    judged = [verdict for verdict in found if verdict.hit is not None]
    hit = sum(bool(verdict.hit) for verdict in judged)
    unmeasured = sum(verdict.bounded and not verdict.judged for verdict in found)
    lines = [
        f"{hit} of {len(judged)} hit" + (f", {unmeasured} not measured" if unmeasured else "") + ".",
        "",
        "| goal | where | wanted | measured | |",
        "|---|---|--:|--:|---|",
    ]
    last = None
    for verdict in found:
        title = verdict.goal.title()
        lines.append(
            f"| {title if title != last else ''} | {verdict.where} | {verdict.goal.bounds()} | {verdict.figure()} | "
            f"{verdict.said()} |"
        )
        last = title
    return "\n".join(lines)


def _title(ways: dict[str, Figures]) -> str:
    return next(iter(ways.values())).setting.title()


def _code(text: str) -> str:
    return f"```\n{text}\n```"
