"""Ctrl-C asks first."""

import os
import signal

import pytest

from layerdrop_fast.recipes.stop_signal import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
        assert capfd.readouterr().err == "\nStopping where it can go on from; once more stops at once.\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_terminal_that_is_gone_stops_nothing():
    """As behind ``2>&1 | tee log``, where Ctrl-C ends tee too."""
    reading, writing = os.pipe()
    os.close(reading)
    before = os.dup(2)
    os.dup2(writing, 2)
    try:
        with StopSignal() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped()
    finally:
        os.dup2(before, 2)
        for number in (before, writing):
            os.close(number)
