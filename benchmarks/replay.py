"""Hands seconds that were measured in turns to pytest-benchmark, which times one test behind another.

@pytest.mark.benchmark(timer=CLOCK)
def test_step(benchmark):
    replay(benchmark, seconds)
"""

from collections.abc import Sequence


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def replay(benchmark, seconds: Sequence[float]) -> None:
    """Lets pytest-benchmark measure rounds that take ``seconds``, on a test that is marked with ``timer=CLOCK``."""
    left = iter(seconds)

    def step():
        CLOCK.now += next(left)

    benchmark.pedantic(step, rounds=len(seconds))
