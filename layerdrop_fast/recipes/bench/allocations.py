"""The memory that a call allocates, over its course."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile

# What the profiler says on stderr of every profile: that it starts and stops, and that it has not seen all.
CHATTER = (b"USDT:", b"profiling started, profiler results will not include")


@dataclass(frozen=True)
class Course:
    """Bytes that were allocated since the beginning and are held still, after every allocation and release."""

    seconds: tuple[float, ...]  # since the first
    bytes: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.bytes, default=0)

    def thinned(self, points: int) -> Course:
        """At most ``points`` points, the highest of each stretch."""
        size = -(-len(self.bytes) // points)
        starts = range(0, len(self.bytes), size) if size else ()
        chosen = [max(range(start, min(start + size, len(self.bytes))), key=self.bytes.__getitem__) for start in starts]
        return Course(tuple(self.seconds[i] for i in chosen), tuple(self.bytes[i] for i in chosen))


def course_of(call: Callable[[], object], device: torch.device) -> Course:
    """What ``call`` allocates on a device, as torch's allocator tells the profiler.

    Whatever ``call`` returns is released behind the last point. What was there before counts for nothing, also when it
    is released.
    """
    on_gpu = device.type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _without(CHATTER), profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        returned = call()
        if on_gpu:
            torch.accelerator.synchronize(device)
    del returned
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return _course(_allocations(profiler.profiler.kineto_results.experimental_event_tree(), on_gpu))


def _course(found: Iterable[tuple[int, int, int]]) -> Course:
    events = sorted(found)
    seconds, held, now = [], [], 0
    sizes: dict[int, int] = {}
    for at, address, size in events:
        if size < 0 and address not in sizes:  # it was there before
            continue
        now += sizes.setdefault(address, size) if size > 0 else -sizes.pop(address)
        seconds.append((at - events[0][0]) / 1e9)
        held.append(now)
    return Course(tuple(seconds), tuple(held))


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of a device that ``call`` holds beyond what was there before: on a GPU as the allocator counts."""
    if device.type != "cuda":
        return course_of(call, device).peak
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _allocations(events: Iterable[Any], on_gpu: bool) -> Iterator[tuple[int, int, int]]:
    """When, where and how much; releases are negative."""
    for event in events:
        found = event.extra_fields
        if isinstance(found, _ExtraFields_Allocation) and found.alloc_size and (found.device.type != "cpu") == on_gpu:
            yield event.start_time_ns, found.ptr, found.alloc_size
        yield from _allocations(event.children, on_gpu)


@contextmanager
def _without(parts: Sequence[bytes]) -> Iterator[None]:
    """Keeps lines that contain one of these from stderr, C++'s included; the others come when the block ends."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            for line in file:
                if not any(part in line for part in parts):
                    os.write(2, line)
