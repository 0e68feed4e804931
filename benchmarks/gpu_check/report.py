"""A short table of the records of a run, beside the targets; of a red one its failure alone."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.gpu_check import steps_report

Record = dict[str, Any]

# Of an H200.
COPY_SHARE, WIDE = 0.90, 1024
FASTER = {"eager": 3.0, "torch.compile": 1.2}
PLAN_US, PLAN = 10.0, "40 x 64"


def line(record: Record) -> str:
    """One stage."""
    result, left = record["result"], "left out for lack of time"
    note = {
        "tests": lambda: f"{result['passed']} passed, {result.get('skipped', 0)} skipped, {result['left']} {left}",
        "sanitizer": lambda: "; ".join(f"{tool}: {said}"[:100] for tool, said in result.items()),
        "comparison": lambda: f"{len(result['rows'])} sizes, {result[left]} {left}",
        "rooflines": lambda: f"{len(result['kernels'])} kernels, {result[left]} {left}",
        "steps": lambda: f"{len(result['contests'])} contests, {len(result['left out'])} left out",
        "small_batch": lambda: f"{len(result['rows'])} sizes",
        "tuning": lambda: f"{len(result['tuned'])} measured",
    }.get(record["stage"])
    said = note() if note and record["state"] == "ok" else result.get("absent", "")
    time = f"{record['seconds']:>5.0f} s of {record['budget']:<4}"
    return f"{record['stage']:<16} {record['state']:<8} {time} {said}".rstrip()


def table(records: list[Record]) -> str:
    """Stages, then kernels, comparisons, whole steps, and targets."""
    lines = [*measured_on(records), *(line(record) for record in records)]
    if red := [record["stage"] for record in records if record["state"] == "red"]:
        return "\n".join([*lines, f"RED: {', '.join(red)}; no speeds"])
    found = {record["stage"]: record["result"] for record in records}
    dry = any(record["dry"] for record in records)
    if dry:
        lines.append("DRY: times on a CPU, some in Triton's interpreter, which say nothing about a GPU")
    lines += kernels(found.get("rooflines", {}).get("kernels", []))
    lines += comparisons(found.get("comparison", {}))
    lines += steps_report.contests(found.get("steps", {}))
    lines += steps_report.small_batches(found.get("small_batch", {}))
    lines += ["", "target for an H200" + " " * 42 + "measured"]
    whole_steps = bool({"graphed_step", "steps", "small_batch"} & found.keys())
    goals = [*targets(found)] if not whole_steps or {"comparison", "rooflines"} & found.keys() else []
    goals += steps_report.targets(found) if whole_steps else []
    for goal, measured, hit in goals:
        verdict = "dry" if dry else "not measured" if hit is None else "hit" if hit else "MISSED"
        lines.append(f"{goal:<60}{measured:<52}{verdict}")
    return "\n".join(lines)


def measured_on(records: list[Record]) -> Iterator[str]:
    """One line, of the last record."""
    for provenance in [record["provenance"] for record in records if "provenance" in record][-1:]:
        versions = ", ".join(f"{name} {provenance[name]}" for name in ("driver", "torch", "triton", "commit", "date"))
        yield f"{provenance['gpu']}: {versions}"


def kernels(rows: list[Record]) -> Iterator[str]:
    """Shares of the copy's bandwidth, a line a kernel, a column a width; the GB/s are the widest column's copy."""
    widths = sorted({row["channels"] for row in rows})
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for share, name in ((False, "half kept"), (True, "all kept")):
            chosen = [row for row in rows if row["dtype"] == dtype and (row["kept"] == row["samples"]) is share]
            if not chosen:
                continue
            copies = [row["copy, GB/s"] for row in chosen]
            title = f"share of copy bandwidth, {dtype}, {name}"
            yield f"\n{title:<48}" + "".join(f"{width:>8}" for width in widths)
            for op in dict.fromkeys(row["op"] for row in chosen):
                share_at = {row["channels"]: row["share of copy"]["median"] for row in chosen if row["op"] == op}
                cells = (f"{share_at[width]:>8.2f}" if width in share_at else f"{'-':>8}" for width in widths)
                yield f"{op:<48}" + "".join(cells)
            yield f"a copy, GB/s: {min(copies):.0f} to {max(copies):.0f}"


def comparisons(result: Record) -> Iterator[str]:
    for row in result.get("rows", []):
        yield f"\n{row['work']}, {row['size']}: ours, ms, and how many times as fast as the others"
        for what in ("forward", "forward and backward"):
            faster = ", ".join(f"{name} {of['median']:.2f}x" for name, of in row[what]["times faster"].items())
            yield f"  {what:<22}{row[what]['milliseconds']['ours']['median']:>8.3f}  {faster}"
    yield from (f"left out: {name}: {why[:300]}" for name, why in result.get("left out", {}).items())


def targets(found: dict[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    """Goal, what was measured, whether it was hit; None where nothing was measured."""
    rows = [row for row in found.get("rooflines", {}).get("kernels", []) if row["channels"] >= WIDE]
    shares = [(row["share of copy"]["median"], f"{row['op']} {row['channels']} {row['dtype']}") for row in rows]
    good = sum(share >= COPY_SHARE for share, _ in shares)
    goal = f"each row kernel, D >= {WIDE}: >= {COPY_SHARE:.2f} of copy bandwidth"
    said = f"{good} of {len(shares)}; least {min(shares)[0]:.2f}, {min(shares)[1]}" if shares else ""
    yield goal, said, good == len(shares) if shares else None
    for other, least in FASTER.items():
        for what in ("forward", "forward and backward"):
            ratios = list(times_faster(found, what, other))
            said = f"{min(ratios):.2f}x to {max(ratios):.2f}x, {len(ratios)} sizes" if ratios else ""
            yield f"fused op, {what}: >= {least} x {other}", said, min(ratios) >= least if ratios else None
    plans = found.get("rooflines", {}).get("plans", {})
    times = [of["median"] for name, of in plans.items() if name.startswith(PLAN)]
    said = " and ".join(f"{microseconds:.1f}" for microseconds in times) + " us" if times else plans.get("absent", "")
    yield f"a plan of {PLAN}: <= {PLAN_US:.0f} us", said, max(times) <= PLAN_US if times else None


def times_faster(found: dict[str, Any], what: str, other: str) -> Iterable[float]:
    for row in found.get("comparison", {}).get("rows", []):
        if row["work"].startswith("add") and other in row[what]["times faster"]:
            yield row[what]["times faster"][other]["median"]
