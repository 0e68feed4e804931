"""Which plan a training forward uses: three integers instead of a random state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_count, check_word

STATE_VERSION = 1


class StepCounters(nn.Module):
    """Counts the training forwards of a stack and says which (step, microbatch) each one is.

    Training forward n is microbatch ``n % accumulation`` of step ``n // accumulation``. A recompute, which activation
    checkpointing runs during backward, gets the number of the forward that it repeats and counts nothing. Where that
    is not certain, since several forwards still wait for their backward, it raises instead of guessing.

    The state dict holds one tensor, int64 [3]: (version, the 64 bits of the seed, n).
    """

    def __init__(self, seed: int | None, accumulation: int) -> None:
        super().__init__()
        if seed is None:
            seed = int(torch.randint(0, (1 << 63) - 1, ()))
        self.seed = check_word(seed, "seed")
        self.accumulation = check_count(accumulation, "accumulation", 1)
        self.forwards = 0
        self._waiting: set[int] = set()  # forwards whose backward has not begun
        self._in_backward: int | None = None  # the forward whose backward began last

    @property
    def step(self) -> int:
        """The step that the next training forward belongs to."""
        return self.forwards // self.accumulation

    def set_step(self, step: int) -> None:
        """Makes the next training forward the first microbatch of step ``step``."""
        self.forwards = check_count(step, "step", 0) * self.accumulation
        self._waiting.clear()
        self._in_backward = None

    @property
    def recomputing(self) -> bool:
        """Whether backward is running, so that a forward now is a recompute."""
        return torch._C._current_graph_task_id() != -1

    def number(self) -> int:
        """The number of the forward that starts now, counted unless it is a recompute."""
        if self.recomputing:
            return self._number_of_recompute()
        number, self.forwards = self.forwards, self.forwards + 1
        self._in_backward = None
        self._waiting.add(number)
        return number

    def watch(self, number: int, output: Tensor) -> Tensor:
        """Notes when the backward of a forward begins; returns the output to hand on."""
        if self.recomputing:
            return output
        if output.requires_grad:
            output.register_hook(lambda _: self._begin_backward(number))
        elif torch.is_grad_enabled():
            self._waiting.discard(number)  # nothing here will be differentiated
        return output

    def _begin_backward(self, number: int) -> None:
        self._waiting.discard(number)
        self._in_backward = number

    def _number_of_recompute(self) -> int:
        # A checkpoint that ends with the stack recomputes after the stack's output got its gradient, one that goes on
        # behind the stack recomputes before.
        candidates = self._waiting if self._in_backward is None else self._waiting | {self._in_backward}
        if len(candidates) != 1:
            raise RuntimeError(
                f"activation checkpointing recomputes this stack, but {len(candidates)} of its forwards may be meant, "
                "expected 1: checkpoint the layers inside the stack instead, or run backward after each forward "
                "(set_step forgets forwards that never had a backward)"
            )
        (number,) = candidates
        self._begin_backward(number)
        return number

    def get_extra_state(self) -> Tensor:
        signed = self.seed - (1 << 64) if self.seed >> 63 else self.seed
        return torch.tensor([STATE_VERSION, signed, self.forwards])

    def set_extra_state(self, state: Any) -> None:
        values = state.tolist() if isinstance(state, Tensor) else state
        if not isinstance(values, list) or len(values) != 3 or values[0] != STATE_VERSION:
            raise ValueError(
                f"counters in the state dict are {state!r}, expected int64 [{STATE_VERSION}, seed, forwards]"
            )
        self.seed, self.forwards = values[1] % (1 << 64), values[2]
        self._waiting.clear()
        self._in_backward = None


def set_step(model: nn.Module, step: int) -> None:
    """Makes the next training forward of every stack in ``model`` the first microbatch of step ``step`` (0-based).

    Raises:
        ValueError: a negative step, or a model without counters; TypeError: a step that is no integer. Nothing is
        changed then.
    """
    check_count(step, "step", 0)
    counters = [module for module in model.modules() if isinstance(module, StepCounters)]
    if not counters:
        raise ValueError(f"{type(model).__name__} holds no LayerDropStack, expected at least one")
    for module in counters:
        module.set_step(step)
