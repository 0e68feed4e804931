"""Whole training steps beside their targets: throughput, memory, the limit, small batches."""

from collections.abc import Iterator
from typing import Any

P = 0.5
# Of an H200 at p = 0.5: how many times as fast as which way, at which granularities, compiled or not.
FASTER = (
    ("skip", 1.5, ("batch",), False),
    ("skip", 1.15, ("batch",), True),
    ("subset", 1.3, ("sample",), False),
    ("masked", 2.6, ("batch", "sample"), False),
)
PEAK = 0.62  # of skip's
OF_LIMIT = 1.02
GRAPHED = 3.0

Target = tuple[str, str, bool | None]


def contests(result: dict[str, Any]) -> Iterator[str]:
    """A table each."""
    for figures in restored(result):
        from layerdrop_fast.recipes.bench.table import table

        yield f"\n{next(iter(figures.values())).setting.title()}"
        yield table(figures)
    yield from (f"left out: {what}" for what in result.get("left out", []))


def small_batches(result: dict[str, Any]) -> Iterator[str]:
    for row in result.get("rows", []):
        times = ", ".join(f"{way} {of['median']:.2f}" for way, of in row["milliseconds"].items())
        yield f"\n{row['size']}: a step, ms\n  {times}"


def restored(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Figures of each contest, by way."""
    for contest in result.get("contests", []):
        from layerdrop_fast.recipes.bench.measure import figures_of

        yield {record["way"]: figures_of(record) for record in contest["figures"]}


def targets(found: dict[str, Any]) -> Iterator[Target]:
    """Goal, what was measured, whether it was hit; None where not all of it was measured."""
    at = {}
    for figures in restored(found.get("steps", {})):
        setting = next(iter(figures.values())).setting
        if setting.p == P:
            at[setting.granularity, setting.compiled] = figures
    for other, least, granularities, compiled in FASTER:
        how = "torch.compile" if compiled else "eager"
        ratios = {of: ratio(at.get((of, compiled)), other, "ours", "time") for of in granularities}
        yield verdict(f"a step of 40 layers, p = {P}, {how}: >= {least} x {other}", ratios, least)
    of_skip = {"batch": ratio(at.get(("batch", False)), "ours", "skip", "peak_bytes")}
    yield verdict(f"activation peak: <= {PEAK} x skip", of_skip, PEAK, most=True)
    for what, name in (("time", "time"), ("saved_bytes", "saved bytes")):
        of_limit = {of: ratio(at.get((of, False)), "ours", "limit", what) for of in ("batch", "sample")}
        yield verdict(f"{name} of a step: <= {OF_LIMIT} x the limit", of_limit, OF_LIMIT, most=True)
    rows = found.get("small_batch", {}).get("rows", [])
    graphed = {f"{row['granularity']} {way}": of["median"] for row in rows for way, of in row["times faster"].items()}
    yield verdict(f"4 x 128 tokens, graphed: >= {GRAPHED} x eager", graphed or {"": None}, GRAPHED)


def ratio(figures: dict[str, Any] | None, way: str, other: str, what: str) -> float | None:
    """Of a way's time or bytes to another's; None where one is missing."""
    from layerdrop_fast.recipes.bench.table import times

    if figures is None or not {way, other} <= figures.keys():
        return None
    a, b = figures[way], figures[other]
    return times(a, b) if what == "time" else float(getattr(a, what) / getattr(b, what))


def verdict(goal: str, ratios: dict[str, float | None], bound: float, *, most: bool = False) -> Target:
    known = {name: value for name, value in ratios.items() if value is not None}
    said = ", ".join(f"{name} {value:.3f}" if most else f"{name} {value:.2f}" for name, value in known.items())
    if len(known) < len(ratios):
        return goal, said, None
    return goal, said, all(value <= bound if most else value >= bound for value in known.values())
