"""Time on a GPU: what was launched once is captured and replayed, so that the host has no part in it.

On the CPU, where Triton's interpreter runs kernels, a replay calls the work again: that shows that it works, its time
says nothing about a GPU.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
# A graph whose calls move so many bytes takes far longer than the microsecond that events resolve.
LEAST_BYTES = 1 << 30
# Last places by which two right answers differ: float32 is summed in another order, the others are rounded once.
TOLERANCE = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}


class Disagreement(Exception):
    """Two ways to one result that do not give it."""


class Replay:
    """Work that has been captured: called, it runs again, and writes what it returned anew."""

    def __init__(self, work: Callable[[], Any], graph: torch.cuda.CUDAGraph | None, returned: Any) -> None:
        # A graph knows addresses alone: who holds the work holds what it reads.
        self._work, self._graph, self.returned = work, graph, returned

    def __call__(self) -> None:
        if self._graph is None:
            self.returned = self._work()
        else:
            self._graph.replay()


class Device:
    """The GPU that torch would use, or the CPU where it has none."""

    def __init__(self) -> None:
        self.is_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.is_gpu else torch.device("cpu")
        self.name = torch.cuda.get_device_name() if self.is_gpu else ""
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size if self.is_gpu else 0
        self._far: Tensor | None = None

    def synchronise(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Another stream than the default one, as capture needs it."""
        if not self.is_gpu:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def repetitions(self, moved: int) -> int:
        """How many calls of so many bytes, each on tensors of its own, stand in one graph."""
        return max(2, -(-LEAST_BYTES // moved)) if self.is_gpu else 1

    def capture(self, work: Callable[[], Any]) -> Replay:
        """A CUDA graph of what ``work`` launches, which runs once before, since loading kernels cannot be captured.

        What it keeps until it returns lies in memory of its own.
        """
        with self.side_stream():
            returned = work()
        if not self.is_gpu:
            return Replay(work, None, returned)
        del returned
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = work()
        return Replay(work, graph, returned)

    def seconds(self, replay: Replay) -> float:
        """Of one replay. What it reads is no longer in the L2 cache."""
        if not self.is_gpu:
            begin = time.perf_counter()
            replay()
            return time.perf_counter() - begin
        if self._far is None:
            self._far = torch.ones(2 * self.cache_bytes, dtype=torch.float32, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: nothing dirty is left for the replay to write back. The host gets ahead meanwhile.
        self._far.sum()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def in_turn(self, replays: dict[str, Replay], rounds: int) -> dict[str, list[float]]:
        """Seconds of each, A B C B C A ..., so that what the machine does meets all of them."""
        seconds: dict[str, list[float]] = {name: [] for name in replays}
        order = list(replays)
        warm_up = WARM_UP if self.is_gpu else 0
        for turn in range(warm_up + rounds):
            order.append(order.pop(0))
            for name in order:
                taken = self.seconds(replays[name])
                if turn >= warm_up:
                    seconds[name].append(taken)
        return seconds

    def copy(self, moved: int, times: int) -> Replay:
        """Copies that read and write ``moved`` bytes together, ``times`` of them, each between buffers of its own."""
        size = max(moved // 2, 1)
        buffers = [
            tuple(torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device) for _ in range(2))
            for _ in range(times)
        ]
        return self.capture(lambda: [target.copy_(source) for source, target in buffers])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, the ends where there are too few values for quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 3 else (min(values), 0.0, max(values))
    return {"median": median(values), "quartile 1": low, "quartile 3": high}


def distance(a: Tensor, b: Tensor) -> float:
    """How far a is from b, in units of the last place of its dtype: of the norms, and of the largest elements."""
    if not a.numel():
        return 0.0
    wide = torch.promote_types(a.dtype, torch.float32)
    difference, expected = a.detach().to(wide) - b.detach().to(wide), b.detach().to(wide)
    unit = torch.finfo(a.dtype).eps
    pairs = (difference.norm(), expected.norm()), (difference.abs().max(), expected.abs().max())
    # A NaN makes the first NaN, which max keeps.
    return max(float(of / base) / unit if float(of) != 0 else 0.0 for of, base in pairs)


def check_agreement(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], roundings: float = 1.0) -> None:
    """Raises Disagreement where one is further from its counterpart than so many roundings explain."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Disagreement(f"{what}, result {i}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}")
        allowed = TOLERANCE[a.dtype] * roundings
        if not (apart := distance(a, b)) <= allowed:
            raise Disagreement(f"{what}, result {i}: {apart:.3g} last places apart, {allowed:.3g} allowed")


def listed(returned: Any) -> list[Tensor]:
    """What an op returns, however many there are."""
    return [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
