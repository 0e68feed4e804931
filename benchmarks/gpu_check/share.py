"""A pytest plugin for one of several processes: every n-th test, until time is up, and how many ended how.

It stands in for plugins that a machine with a GPU need not have.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

INDEX, SHARES, UNTIL, FILE = json.loads(os.environ["GPU_CHECK_SHARE"])
ended: Counter[str] = Counter()


@pytest.hookimpl(trylast=True)  # after what selects
def pytest_collection_modifyitems(items):
    items[:] = items[INDEX::SHARES]
    ended["collected"] = len(items)


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        ended[report.outcome] += 1


def pytest_runtest_logfinish():
    Path(FILE).write_text(json.dumps(ended))


def pytest_runtest_protocol(item):
    if time.time() > UNTIL:
        item.session.shouldstop = "out of time"
