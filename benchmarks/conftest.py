"""What every committed number carries: machine, versions, commit."""

import numpy as np
import pytest
import torch

import layerdrop_fast
from layerdrop_fast import _extension


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions and the device come in, what names one computer goes out."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info["layerdrop_fast"] = layerdrop_fast.__version__
    machine_info["torch"] = torch.__version__
    machine_info["numpy"] = np.__version__
    machine_info["cpp_extension"] = _extension.missing or f"built with {_extension.planner.compiler}"
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


@pytest.fixture(autouse=True)
def threads(request):
    """Each file says on how many threads it measures."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.module.THREADS)
    yield
    torch.set_num_threads(before)
