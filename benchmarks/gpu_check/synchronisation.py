"""Nothing between plan and gradients waits for the device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.check import Check, Failed
from benchmarks.gpu_check.step import VARIANTS, Step


def run(check: Check) -> dict[str, Any]:
    device = check.device
    done = []
    for variant in VARIANTS:
        step = Step(device.device, *variant, tiny=check.dry)
        for owned in (False, True):
            step.run(owned)  # loads kernels
        device.synchronise()
        with waiting_is_an_error(device.is_gpu):
            for owned in (False, True, False, True):
                step.run(owned)
        done.append(", ".join(map(str, variant)))
        check.save({"steps": done})
    return {"steps": done, "mode": "error" if device.is_gpu else "none: on a CPU nothing waits"}


@contextlib.contextmanager
def waiting_is_an_error(on_gpu: bool) -> Iterator[None]:
    """On a GPU; that it is one there is tried first."""
    if not on_gpu:
        yield
        return
    number = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        refused = False
        try:
            number.item()
        except RuntimeError:
            refused = True
        if not refused:
            raise Failed("set_sync_debug_mode('error') lets a number be read")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
