"""Tests of the Triton kernels: on a GPU, through the dispatcher, where there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch

from layerdrop_fast import triton as kernels
from tests.ops import eager, test_fuzz, test_kernels
from tests.triton import interpreter

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    interpreter.prepare()

PARAMETERS = {name: eager.parameters(name) for name in eager.NAMES}
DISPATCHED = {name: eager.op(name) for name in eager.NAMES}

# In the interpreter a launch takes ten milliseconds and more.
FEW = {
    "WIDTHS": (1, 17, 64),
    "MIDDLES": ((), (3,)),
    "ACTIVATION_WIDTHS": (1027,),
    "LAYOUTS": {name: eager.LAYOUTS[name] for name in ("channels first", "every other sample", "one element on")},
    "SUBSETS": (None, (0, 2, 3), (-1, 1, 3)),
    "DROPOUT": [{"p": 0.3, "scale": 1.25}, {"p": 1.0}],
}


def on_gpu(name):
    """The op with arguments and results on the host."""

    def call(*arguments):
        given = [value.cuda() if torch.is_tensor(value) else value for value in arguments]
        returned = DISPATCHED[name](*given)
        if name.endswith("_"):
            arguments[0].copy_(given[0])
        return None if returned is None else [value.cpu() for value in eager.listed(returned)]

    return call


def op(name):
    return on_gpu(name) if ON_GPU else kernels.KERNELS[name]


@pytest.fixture(autouse=True, params=["few", pytest.param("all", marks=pytest.mark.slow)])
def ops_are_the_triton_kernels(request, monkeypatch):
    """In the shared tests, of few sizes or of all."""
    replaced = {"op": op, "parameters": PARAMETERS.__getitem__, "has_cpu_kernel": lambda name: True}
    for module, (name, value) in itertools.product((eager, test_kernels, test_fuzz), replaced.items()):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    if request.param == "few":
        for name, values in FEW.items():
            monkeypatch.setattr(test_kernels, name, values)
