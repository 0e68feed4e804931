"""What is allocated over the course of a call."""

import os

import pytest
import torch

from layerdrop_fast.recipes.bench.allocations import Course, _course, course_of, peak_of

CPU = torch.device("cpu")
MIB = 2**20


def test_a_course_counts_what_comes_and_goes():
    def call():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        return second, torch.empty(MIB, dtype=torch.uint8)

    course = course_of(call, CPU)
    assert list(course.bytes) == [3 * MIB, 5 * MIB, 2 * MIB, 3 * MIB]
    assert course.peak == 5 * MIB
    assert course.seconds[0] == 0
    assert list(course.seconds) == sorted(course.seconds)


def test_what_was_there_before_counts_for_nothing_also_when_it_is_released():
    held = [torch.empty(MIB, dtype=torch.uint8)]

    def call():
        held.clear()
        return torch.empty(2 * MIB, dtype=torch.uint8)

    assert list(course_of(call, CPU).bytes) == [2 * MIB]


def test_a_release_of_what_was_there_before_is_passed_over():
    """A GPU's allocator tells of these too."""
    new, old = 0x10, 0x20
    events = [(9_000, new, 5), (7_000, old, -3), (11_000, new, -5), (13_000, old, 2), (5_000, old, -3)]
    assert _course(events) == Course((4e-6, 6e-6, 8e-6), (5, 0, 2))


def test_nothing_is_a_course_too():
    assert course_of(lambda: None, CPU) == Course((), ())
    assert Course((), ()).peak == 0
    assert Course((), ()).thinned(10) == Course((), ())


@pytest.mark.parametrize("points", [1, 3, 4, 100])
def test_thinning_keeps_the_peaks(points):
    course = Course(tuple(range(10)), (1, 5, 2, 2, 9, 1, 1, 4, 3, 7))
    thin = course.thinned(points)
    assert len(thin.bytes) <= points
    assert thin.peak == course.peak
    assert all(course.bytes[second] == size for second, size in zip(thin.seconds, thin.bytes, strict=True))
    assert course.thinned(4).bytes == (5, 9, 4, 7)


def test_the_peak_is_the_highest_point():
    def call():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        return torch.empty(2 * MIB, dtype=torch.uint8)

    assert peak_of(call, CPU) == 3 * MIB


def test_on_a_gpu_the_peak_is_what_the_allocator_counted(monkeypatch):
    at = {"now": 5, "most": 100}
    gpu = torch.device("cuda", 1)

    def reset(device):
        assert device == gpu
        at["most"] = at["now"]

    def call():
        at["most"] = max(at["most"], at["now"] + 7)
        at["now"] += 3

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: at["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: at["most"])
    assert peak_of(call, gpu) == 7
    assert peak_of(call, gpu) == 7


def test_backward_is_seen():
    weight = torch.randn(512, 512, requires_grad=True)
    x = torch.randn(512, 512)
    course = course_of(lambda: (x @ weight).relu().sum().backward(), CPU)
    # x @ weight, relu and its gradient, and the weight's gradient at the end.
    assert course.bytes[-1] >= MIB
    assert course.peak >= 2 * MIB


def test_the_profiler_says_nothing_and_the_call_what_it_says(capfd):
    def call():
        os.write(2, b"of its own\n")
        return torch.empty(10)

    course_of(call, CPU)
    assert capfd.readouterr().err == "of its own\n"


def test_what_the_call_raises_comes_through_and_stderr_comes_back(capfd):
    def call():
        raise KeyError("x")

    with pytest.raises(KeyError):
        course_of(call, CPU)
    os.write(2, b"still there\n")
    assert capfd.readouterr().err.endswith("still there\n")
