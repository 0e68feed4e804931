"""Optimizers that a number on the device can tell to leave everything as it is: fused ones, by ``found_inf``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer


def check_optimizer(optimizer: object) -> Optimizer:
    """One that can skip a step by a switch on the device.

    Raises:
        TypeError: no optimizer. ValueError: not a fused Adam, AdamW or SGD, not capturable on a GPU, or with dampening.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer_of: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not isinstance(optimizer, Adam | SGD) or not group["fused"]:
            raise ValueError(
                f"optimizer_of: got {name} with fused={group.get('fused')}, expected Adam, AdamW or SGD with fused=True"
            )
        on_gpu = any(weight.is_cuda for weight in group["params"])
        for setting, value in group.items():
            # It would be read once, at capture.
            if on_gpu and isinstance(value, Tensor) and not value.is_cuda:
                raise ValueError(f"optimizer_of: got {name} with {setting} on {value.device}, expected it on the GPU")
        if on_gpu and not group.get("capturable", True):
            raise ValueError(f"optimizer_of: got {name} with capturable=False on a GPU, expected capturable=True")
        # The first step of momentum takes the gradient whole; which step is the first is only known on the device.
        if group.get("dampening"):
            raise ValueError(f"optimizer_of: got {name} with dampening={group['dampening']}, expected 0")
    return optimizer


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """A step that leaves weights and states as they are where ``skip`` (f32 []) is 1."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state; settings that are tensors, which a user holds to change them, stay the same tensors."""
    tensors = [{name: v for name, v in group.items() if isinstance(v, Tensor)} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, tensors, strict=True):
        for name, tensor in own.items():
            tensor.copy_(torch.as_tensor(group[name]))
            group[name] = tensor
    check_optimizer(optimizer)


def make_states(optimizer: Optimizer) -> None:
    """The state that an optimizer makes in its first step, as it is before that step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    new = [weight for weight in weights if not optimizer.state.get(weight)]
    for weight in new:
        weight.grad = torch.zeros_like(weight)
    if new:
        step_unless(optimizer, torch.ones((), device=new[0].device))
    for weight in new:
        weight.grad = None
        for value in optimizer.state[weight].values():
            # Fused SGD leaves the momentum of a skipped first step uninitialised.
            if isinstance(value, Tensor):
                value.zero_()
