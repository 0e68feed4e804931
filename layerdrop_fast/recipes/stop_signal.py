"""Stops a run on Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request that the run asks for, and says so; a second stops at once.

    with StopSignal() as stopped:
        while not stopped():
            work()
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        with suppress(OSError):  # the terminal is gone
            # Not print, whose buffer may be in use.
            os.write(2, b"\nStopping where it can go on from; once more stops at once.\n")
