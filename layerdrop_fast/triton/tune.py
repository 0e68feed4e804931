"""Measures the neighbours of the rule's configurations on this GPU and writes down those that are faster.

What it writes is preferred from then on by every process that starts (``configurations.chosen``); nothing is tuned
unless this is asked for.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from layerdrop_fast._progress import stage
from layerdrop_fast._provenance import provenance
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.triton.configurations import (
    OPS,
    Configuration,
    configuration,
    entry,
    gpu_of,
    preferred,
    tuned_file,
    write_tuned,
)
from layerdrop_fast.triton.norm_linear import PART
from layerdrop_fast.triton.row_work import RowWork
from layerdrop_fast.triton.timing import Device, check_agreement, listed, spread

CHANNELS = (1024, 2048, 4096)
MOST_THREADS, MOST_TILE = 1024, 64 << 10
ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What to tune: every op by default. ``file`` None: where ``chosen`` looks for it."""

    ops: Sequence[str] = OPS
    channels: Sequence[int] = CHANNELS
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    file: Path | None = None
    samples: int = 32
    positions: int = 512
    rounds: int = ROUNDS


@dataclasses.dataclass(frozen=True)
class Found:
    """Microseconds a call, medians, of the rule and of the fastest."""

    key: str
    rule: Configuration
    fastest: Configuration
    rule_us: float
    fastest_us: float
    tried: int

    def line(self) -> str:
        what = "the rule" if self.fastest == self.rule else _short(self.fastest)
        return f"{self.key:<48}{_short(self.rule):>18}{self.rule_us:>10.1f}{what:>18}{self.fastest_us:>10.1f}"


HEADER = f"{'op, channels, dtype':<48}{'rule':>18}{'us':>10}{'fastest':>18}{'us':>10}"


def _short(config: Configuration) -> str:
    return f"{config.rows}x{config.block_d} w{config.num_warps} s{config.num_stages}"


def candidates(op: str, channels: int, dtype: torch.dtype, arch: str) -> list[Configuration]:
    """The rule, then its neighbours: rows x 1/2, 2, 4, warps x 1/2, 2, stages where there is a loop."""
    rule = configuration(op, channels, dtype, arch)
    loops = op == "norm_linear_bwd" or (rule.block_d < channels and "norm" in op)
    most_rows = PART if op == "norm_linear_bwd" else MOST_TILE
    most_warps = MOST_THREADS // (64 if arch.startswith("gfx") else 32)
    found = [rule]
    for rows, warps, stages in itertools.product((1.0, 0.5, 2.0, 4.0), (1.0, 0.5, 2.0), (1, 2, 3) if loops else (1,)):
        near = dataclasses.replace(
            rule, rows=int(rule.rows * rows), num_warps=int(rule.num_warps * warps), num_stages=stages
        )
        if (
            near not in found
            and 1 <= near.rows <= most_rows
            and 1 <= near.num_warps <= most_warps
            and near.rows * near.block_d * dtype.itemsize <= MOST_TILE
        ):
            found.append(near)
    return found


def tune(options: Options, device: Device) -> Iterator[Found]:
    """One op, number of channels and dtype after the other; each is written before the next begins."""
    path = options.file or tuned_file(device.name)
    for op, channels, dtype in itertools.product(options.ops, options.channels, options.dtypes):
        work = RowWork(op, options.samples, options.positions, channels, dtype, kept=options.samples // 2)
        found = measure(work.grown(4 * device.cache_bytes), device, options.rounds)
        if found.fastest != found.rule:
            write_tuned(path, {found.key: found.fastest}, provenance(["layerdrop-fast", "tune"]))
        yield found


def measure(work: RowWork, device: Device, rounds: int = ROUNDS) -> Found:
    """Times each candidate in turn with the rule. It is faster where their quartiles lie apart.

    Raises:
        Disagreement: one of them gives other results than the rule.
    """
    of = work.op, work.channels, work.dtype
    sets = [work.arguments(device.device) for _ in range(device.repetitions(work.moved()))]
    call = getattr(torch.ops.layerdrop_fast, work.op)

    def calls(candidate: Configuration, given: Sequence[tuple[Any, ...]]) -> list[Any]:
        with preferred(candidate, *of, device.device):
            return [call(*arguments) for arguments in given]

    def microseconds(seconds: list[float]) -> dict[str, float]:
        return spread([1e6 * second / len(sets) for second in seconds])

    rule, *others = candidates(*of, gpu_of(device.device)[1])
    expected = listed(calls(rule, sets[:1])[0])
    usual = device.capture(functools.partial(calls, rule, sets))
    rule_us = microseconds(device.in_turn({"rule": usual}, rounds)["rule"])["median"]
    found = Found(entry(*of), rule, rule, rule_us, rule_us, 1)
    for candidate in others:
        try:
            got = listed(calls(candidate, sets[:1])[0])
        except OutOfResources:
            continue
        check_agreement(f"{entry(*of)} with {candidate}", got, expected)
        replays = {"rule": usual, "candidate": device.capture(functools.partial(calls, candidate, sets))}
        before, after = map(microseconds, device.in_turn(replays, rounds).values())
        found = dataclasses.replace(found, tried=found.tried + 1)
        faster = after["median"] / before["median"] < found.fastest_us / found.rule_us
        if faster and after["quartile 3"] < before["quartile 1"]:
            found = dataclasses.replace(found, fastest=candidate, rule_us=before["median"], fastest_us=after["median"])
    return found


def run(options: Options) -> None:
    """What the command does: a table on the terminal, the file of this GPU.

    Raises:
        RecipeError: there is no GPU.
    """
    device = Device()
    if not device.is_gpu:
        raise RecipeError("tune measures kernels on a GPU, and torch finds none: run it on the machine that trains")
    total = len(options.ops) * len(options.channels) * len(options.dtypes)
    rows = []
    with stage("tuning", total) as update:
        for done, found in enumerate(tune(options, device), 1):
            rows.append(found)
            update(done, found.key)
    print("\n".join([HEADER, *(found.line() for found in rows)]))
    faster = sum(found.fastest != found.rule for found in rows)
    path = options.file or tuned_file(device.name)
    print(f"{faster} of {total} faster than the rule" + (f": written to {path}" if faster else ": nothing is written"))
    sys.stdout.flush()
