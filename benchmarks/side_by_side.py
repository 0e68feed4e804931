"""Times several ways to the same result in turn, each turn beginning with another (A B C B C A ...), so that what the
machine does, and what one way leaves in the cache for the next, meets all of them."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

WARM_UP, ROUNDS = 3, 40

Call = Callable[[], object]


def compare(benchmark, ways: dict[str, Call], floor: Call) -> None:
    """Times ``ways``, among them "ours", beside ``floor``, and puts into ``benchmark.extra_info``

    each way's median and quartiles, how many times faster ours is than each other (of calls that stood side by side),
    and the floor's time over ours. pytest-benchmark's own row is ours.
    """
    if benchmark.disabled:  # a smoke test: everything runs once
        for call in (*ways.values(), floor):
            call()
        benchmark(ways["ours"])
        return
    seconds = _in_turn({**ways, "a copy of as many bytes": floor})
    ours = seconds["ours"]
    benchmark.extra_info["milliseconds"] = {name: _spread([1e3 * s for s in times]) for name, times in seconds.items()}
    benchmark.extra_info["times faster"] = {
        name: _spread([b / a for a, b in zip(ours, times, strict=True)])
        for name, times in seconds.items()
        if times is not ours
    }
    benchmark(ways["ours"])


def copy_of(size: int) -> Call:
    """Moves ``size`` bytes, half of them read and half written."""
    source, target = torch.ones(size // 2, dtype=torch.uint8), torch.zeros(size // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


def _in_turn(ways: dict[str, Call]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(WARM_UP + ROUNDS):
        order.append(order.pop(0))
        for name in order:
            call = ways[name]
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "quartile 1": low, "quartile 3": high}
