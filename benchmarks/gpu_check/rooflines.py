"""Each row kernel, forward and backward, beside a copy of the bytes that it cannot do without; and the plan.

What counts most comes first: a cut takes the end. A kernel agrees with the reference at the size at which it is timed.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.check import Check, use_the_kernels
from layerdrop_fast import _extension, ops
from layerdrop_fast.reference import act_linear, gather_norm, norm_linear, scatter_residual
from layerdrop_fast.reference import scatter_residual_gather_norm as both
from layerdrop_fast.triton.row_work import RowWork
from layerdrop_fast.triton.timing import Device, check_agreement, listed, spread

OPS = (
    "scatter_residual_gather_norm",
    "scatter_residual_gather_norm_bwd",
    "scatter_residual_gather_norm_",
    "scatter_residual_gather_norm_bwd_",
    "act",
    "act_bwd",
    "gather_norm",
    "gather_norm_bwd",
    "scatter_residual",
    "scatter_residual_",
    "scatter_residual_bwd",
    "norm_linear_bwd",
)
REFERENCE = {
    op: getattr(module, op)
    for module in (act_linear, gather_norm, norm_linear, scatter_residual, both)
    for op in OPS
    if hasattr(module, op)
}
CHANNELS = (4096, 1024, 2048, 8192, 512)
SAMPLES, POSITIONS, ROUNDS = 32, 512, 20
PLANS = {"40 x 64": (40, 64), "40, batch granularity": (40, None), "1000 x 1024": (1000, 1024)}
DRAWS = 100
COMPILERS = 8  # processes


def works(dry: bool) -> Iterator[RowWork]:
    channels, samples, positions = ((64,), 4, 1) if dry else (CHANNELS, SAMPLES, POSITIONS)
    for width, dtype, share, op in itertools.product(channels, (torch.bfloat16, torch.float32), (2, 1), OPS):
        # Weights have no samples that could be dropped; a dry run is content with one share of each dtype.
        if (op != "norm_linear_bwd" or share == 1) and (not dry or share == dtype.itemsize // 2):
            yield RowWork(op, samples, positions, width, dtype, kept=samples // share)


def run(check: Check) -> dict[str, Any]:
    device = check.device
    large = 4 << 10 if check.dry else 8 << 30
    seconds = device.in_turn({"copy": device.copy(large, 1)}, 1 if check.dry else ROUNDS)["copy"]
    result: dict[str, Any] = {
        f"copy of {large} bytes, GB/s": spread([large / taken / 1e9 for taken in seconds]),
        "plans": plans(device, check.dry),
        "kernels": [],
    }
    check.save(result)
    compile_all([replace(work, positions=16) for work in works(check.dry)], check.dry)
    for work in works(check.dry):
        if check.left() < 5:
            break
        result["kernels"].append(measure(work.grown(4 * device.cache_bytes), device, 1 if check.dry else ROUNDS))
        check.save(result)
    result["left out for lack of time"] = sum(1 for _ in works(check.dry)) - len(result["kernels"])
    return result


def plans(device: Device, dry: bool) -> dict[str, Any]:
    """Microseconds of one, of a graph of DRAWS."""
    if _extension.cuda_missing and not dry:
        return {"absent": f"CUDA kernels {_extension.cuda_missing}"}
    found, draws = {}, 2 if dry else DRAWS
    for (name, (layers, batch)), sampling in itertools.product(PLANS.items(), ("bernoulli", "systematic")):
        counters = torch.tensor([1, 2, 3], device=device.device)
        rates = torch.linspace(0, 0.5, layers, dtype=torch.float64, device=device.device)
        draw = functools.partial(ops.draw_plan, counters, rates, batch, sampling=sampling, advance=True)
        graph = device.capture(functools.partial(repeat, draw, draws))
        seconds = device.in_turn({"plan": graph}, 1 if dry else ROUNDS)["plan"]
        found[f"{name}, {sampling}"] = spread([1e6 * taken / draws for taken in seconds])
    return found


def repeat(draw: Callable[[], Any], times: int) -> list[Any]:
    return [draw() for _ in range(times)]


def compile_all(all_works: list[RowWork], dry: bool) -> None:
    """Into Triton's cache on disk, by several processes: a kernel takes about a second."""
    workers = 1 if dry else max(1, min(COMPILERS, (os.cpu_count() or 2) - 1))
    some = all_works[:1] if dry else all_works  # in the interpreter there is nothing to compile
    with ProcessPoolExecutor(workers, get_context("spawn"), use_the_kernels, (dry,)) as pool:
        for _ in pool.map(call_once, some):
            pass


def call_once(work: RowWork) -> None:
    device = Device()
    call(work.op, work.arguments(device.device))
    device.synchronise()


def call(op: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(torch.ops.layerdrop_fast, op)(*arguments)


def measure(work: RowWork, device: Device, rounds: int) -> dict[str, Any]:
    """Time, bytes, and the share of the speed of copies of as many bytes, which take turns with it."""
    moved = work.moved()
    times = device.repetitions(moved)
    sets = [work.arguments(device.device) for _ in range(times)]
    check_result(work, sets[0])
    replays = {
        "ours": device.capture(lambda: [call(work.op, arguments) for arguments in sets]),
        "copy": device.copy(moved, times),
    }
    seconds = device.in_turn(replays, rounds)
    ours, copy = ([taken / times for taken in seconds[name]] for name in ("ours", "copy"))
    return {
        **{name: value for name, value in asdict(work).items() if name != "dtype"},
        "dtype": str(work.dtype).removeprefix("torch."),
        "bytes": moved,
        "calls": times,
        "microseconds": spread([1e6 * taken for taken in ours]),
        "copy, microseconds": spread([1e6 * taken for taken in copy]),
        "copy, GB/s": moved / spread(copy)["median"] / 1e9,
        "share of copy": spread([b / a for a, b in zip(ours, copy, strict=True)]),
    }


def check_result(work: RowWork, arguments: tuple[Any, ...]) -> None:
    """Disagreement unless it is the reference's, on another stream where the op writes its own."""
    got, expected = (
        results(function, work.op, arguments)
        for function in (getattr(torch.ops.layerdrop_fast, work.op), REFERENCE[work.op])
    )
    check_agreement(str(work), got, expected)


def results(function: Any, op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an op returns, after what it writes."""
    written = [arguments[0].clone()] if op.endswith("_") else []
    return written + listed(function(*written, *arguments[len(written) :]))
