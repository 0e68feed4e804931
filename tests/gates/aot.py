"""Kernels compiled ahead of time, without a GPU, exactly as the launchers would launch them, and what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from layerdrop_fast.triton import launch

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it would be launched with."""

    kernel: Any
    arguments: dict[str, Any]


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What an op launches; its tensors may be on the meta device."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: found.append(Launch(self.kernel, arguments))

    def record(kernel: Any, *others: Any, **arguments: Any) -> None:
        run(Recorder(kernel), *others, **arguments)

    run = launch.launch
    with mock.patch.object(launch, "launch", record):
        call()
    return found
