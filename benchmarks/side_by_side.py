"""Times several ways to the same result in turn, each turn beginning with another (A B C B C A ...), so that what the
machine does, and what one way leaves in the cache for the next, meets all of them."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

WARM_UP, ROUNDS = 3, 40
COPY = "a copy of as many bytes"

Call = Callable[[], object]


def compare(benchmark, ways: dict[str, Call], moved: int) -> None:
    """Times ``ways``, among them "ours", beside a copy of ``moved`` bytes, and puts into ``benchmark.extra_info``

    - milliseconds: median and quartiles of each;
    - times faster: how many times faster ours is than each other, of calls that stood side by side; of the copy, the
      share of its speed that ours reaches;
    - floor: the bytes that ours has to move, the bandwidth that the copy reached and the threads.

    pytest-benchmark's own row is ours.
    """
    # Half of the bytes are read, half written.
    source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.zeros(moved // 2, dtype=torch.uint8)
    ways = {**ways, COPY: lambda: target.copy_(source)}
    if benchmark.disabled:  # a smoke test: everything runs once
        for call in ways.values():
            call()
    else:
        seconds = _in_turn(ways)
        ours = seconds["ours"]
        benchmark.extra_info["milliseconds"] = {
            name: _spread([1e3 * second for second in times]) for name, times in seconds.items()
        }
        benchmark.extra_info["times faster"] = {
            name: _spread([b / a for a, b in zip(ours, times, strict=True)])
            for name, times in seconds.items()
            if times is not ours
        }
        bandwidth = moved / median(seconds[COPY]) / 1e9
        benchmark.extra_info["floor"] = {"bytes": moved, "GB/s": bandwidth, "threads": torch.get_num_threads()}
    benchmark(ways["ours"])


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
