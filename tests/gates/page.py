"""The tables of docs/kernels.md."""

import re
from pathlib import Path

import torch
import triton

from layerdrop_fast.triton import KERNELS
from layerdrop_fast.triton.row_work import RowWork
from tests.gates.aot import ARCHS, Code
from tests.gates.gates import HALF, Gate

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
# What a copy moved on an H200, read and written.
COPY = 4.3e12  # bytes a second
SIZE = {"samples": 32, "positions": 512, "channels": 1024, "dtype": HALF}


def tables(found: dict[Gate, Code]) -> dict[str, str]:
    """By the names of the page's places."""
    return {"traffic": traffic(), "code": code(found), "compiler": f"triton {triton.__version__}"}


def traffic() -> str:
    lines = [
        "| op | MiB, all kept | floor, µs | MiB, half kept | floor, µs | measured, µs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for op in KERNELS:
        moved = [RowWork(op, **SIZE, kept=kept).moved() for kept in (32, 16)]
        cells = [f"{value / 2**20:.1f} | {1e6 * value / COPY:.1f}" for value in moved]
        lines.append(f"| `{op}` | {' | '.join(cells)} | |")
    return "\n".join(lines)


def code(found: dict[Gate, Code]) -> str:
    """A line for each op, width and dtype."""
    lines = [
        f"| op | D | dtype | tile | threads | {' | '.join(ARCHS)} | 16-byte loads, stores | shared, bytes |",
        f"|---|--:|---|--:|--:|{'--:|' * len(ARCHS)}--:|--:|",
    ]
    grouped: dict[tuple[str, int, torch.dtype, str], dict[str, Gate]] = {}
    for gate in found:
        name = gate.op if gate.activation == "gelu" else f"{gate.op}, {gate.activation}"
        grouped.setdefault((name, gate.channels, gate.dtype, gate.activation), {})[gate.arch] = gate
    for (name, channels, dtype, _), gates in grouped.items():
        gate = gates["sm_90"]
        launch, here = gate.launch(), found[gate]
        registers = [str(found[gates[arch]].registers) if arch in gates else "" for arch in ARCHS]
        wide = f"{here.wide_loads // 16}, {here.wide_stores // 16}"
        tile = f"{launch.arguments['ROWS']} x {launch.arguments['BLOCK_D']}"
        cells = [f"`{name}`", f"{channels:,}", str(dtype).removeprefix("torch."), tile, str(launch.threads)]
        lines.append(f"| {' | '.join([*cells, *registers, wide, str(here.shared)])} |")
    return "\n".join(lines)


def filled(page: str, values: dict[str, str]) -> str:
    """The page with ``values`` between the comments that name them."""
    for name, value in values.items():
        pattern = rf"(<!-- {name} -->)(.*?)(<!-- /{name} -->)"
        gap = "\n" if "\n" in value else ""
        page, count = re.subn(pattern, lambda m, v=value, g=gap: m[1] + g + v + g + m[3], page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE.name}: expected <!-- {name} --> and <!-- /{name} --> once, found {count}")
    return page


def compiler_of(page: str) -> str:
    """What the page's figures were compiled with."""
    (found,) = re.findall(r"<!-- compiler -->(.*?)<!-- /compiler -->", page)
    return str(found)
