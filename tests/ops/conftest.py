import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """An output element that a kernel forgot to write is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def backward_calls():
    """A function that runs backward from a tensor and says which ops that called."""

    def run(out: torch.Tensor) -> list[str]:
        grad = torch.ones_like(out)
        with _Calls() as calls:
            out.backward(grad)
        return calls.names

    return run
