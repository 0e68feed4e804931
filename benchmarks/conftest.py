"""What every committed number carries: machine, versions, commit, command, and how the run ended."""

import shlex

import pytest
import torch

from layerdrop_fast import _provenance

# Of the code that is measured: what is committed while it runs does not count.
COMMIT = _provenance.commit()


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions and the device come in, what names one computer goes out."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    # pytest-benchmark has commit and date itself; the command and the threads are those of ``run`` and of each test.
    elsewhere = ("command", "threads", "commit", "date")
    found = _provenance.provenance([])
    machine_info |= {name: value for name, value in found.items() if name not in elsewhere}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Of a run that is not green ``benchmarks.report`` tells no numbers."""
    session = config.pluginmanager.get_plugin("session")
    output_json["run"] = {
        "command": f"python -m pytest {shlex.join(config.invocation_params.args)}",
        "commit": COMMIT,
        "failed": session.testsfailed,  # or errors
        "exit status": int(session.exitstatus),
    }


@pytest.fixture(autouse=True)
def threads(request):
    """Each file says on how many threads it measures."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.module.THREADS)
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info["threads"] = request.module.THREADS
    yield
    torch.set_num_threads(before)
