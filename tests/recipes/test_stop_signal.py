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
        assert capfd.readouterr().err == "\nStopping after this step; once more stops at once.\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
