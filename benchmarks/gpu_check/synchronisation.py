"""Nothing between plan and gradients waits for the device."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_check.check import Check, Failed
from benchmarks.gpu_check.step import CHANNELS, VARIANTS, WIDTH, P, Step
from layerdrop_fast import TransformerStack


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
    for granularity in ("batch", "sample"):
        train = stack_step(check, granularity)
        train()
        device.synchronise()
        with waiting_is_an_error(device.is_gpu):
            for _ in range(3):
                train()
        done.append(f"TransformerStack, granularity {granularity}")
        check.save({"steps": done})
    return {"steps": done, "mode": "error" if device.is_gpu else "none: on a CPU nothing waits"}


def stack_step(check: Check, granularity: str) -> Callable[[], None]:
    """A training step of a TransformerStack with its optimizer: plan, rows, scales and masks come from the host."""
    layers, batch, length = (3, 3, 1) if check.dry else (6, 8, 5)
    dtype, norm, activation = VARIANTS[1]
    keywords = {"norm": norm, "activation": activation, "dtype": dtype, "device": check.device.device}
    keywords |= {"schedule": 0.45, "granularity": granularity, "scale": "inverse", "seed": 5}
    stack = TransformerStack(layers, CHANNELS, 2, WIDTH, P, activation_dropout=P, **keywords)
    optimizer = torch.optim.AdamW(stack.parameters(), 1e-3, fused=True)
    x = torch.randn(batch, length, CHANNELS, device=check.device.device)

    def train() -> None:
        stack(x, is_causal=True).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


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
