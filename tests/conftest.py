"""One thread for all tests: their tensors are small, and threads that wait for a shared core cost seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; processes that tests start inherit it

import pytest
import torch

torch.set_num_threads(1)
# Read when Triton loads and when kernels are defined, which torch's import does not do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
