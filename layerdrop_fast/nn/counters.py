"""Which plan a training forward uses: three integers instead of a random state."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_count, check_word
from layerdrop_fast.plan import DropPlan

STATE_VERSION = 1


class _Forward:
    """A training forward that a backward may ask to repeat. Its graph holds it, so it goes when the graph goes."""

    __slots__ = ("__weakref__", "plan")

    def __init__(self, plan: DropPlan) -> None:
        self.plan = plan


class StepCounters(nn.Module):
    """Counts the training forwards of a stack, and finds the plan of one that is recomputed.

    Training forward n is microbatch ``n % accumulation`` of step ``n // accumulation``. A recompute, which activation
    checkpointing runs during backward, gets the plan of the forward that it repeats and counts nothing. Where it is
    not certain which one that is, since several forwards still wait for their backward, it raises instead of guessing.

    ``last_plan`` is the plan of the last training forward of this process; a copy has none.

    The state dict holds one tensor, int64 [3]: (version, the 64 bits of the seed, n). Weights without it load too, and
    leave the counters as they are.
    """

    def __init__(self, seed: int | None, accumulation: int) -> None:
        super().__init__()
        self.seed_was_drawn = seed is None
        if seed is None:
            seed = int(torch.randint(0, (1 << 63) - 1, (), device="cpu"))
        self.seed = check_word(seed, "seed")
        self.accumulation = check_count(accumulation, "accumulation", 1)
        self.forwards = 0
        self.last_plan: DropPlan | None = None
        self.forget()

    def forget(self) -> None:
        """Forgets all forwards that have had no backward yet: none of them will be recomputed."""
        self._waiting: weakref.WeakSet[_Forward] = weakref.WeakSet()  # their backward has not begun
        # A reentrant checkpoint runs its forward without a graph, so nothing else holds what it may ask for.
        self._waiting_without_graph: list[_Forward] = []
        self._in_backward: _Forward | None = None  # the forward whose backward began last

    @property
    def step(self) -> int:
        """The step that the next training forward belongs to."""
        return self.forwards // self.accumulation

    def set_step(self, step: int) -> None:
        """Makes the next training forward the first microbatch of step ``step``."""
        self.forwards = check_word(step, "step") * self.accumulation

    @property
    def recomputing(self) -> bool:
        """Whether backward is running, so that a forward now is a recompute."""
        return torch._C._current_graph_task_id() != -1

    def advance(self, plan: DropPlan, x: Tensor, out: Tensor) -> None:
        """Counts the training forward that made ``out`` of ``x`` by ``plan``."""
        self.forwards += 1
        self.last_plan = plan
        self._in_backward = None
        forward = _Forward(plan)
        if out.requires_grad:
            self._waiting.add(forward)
            out.register_hook(lambda _: self._begin_backward(forward))
        elif x.requires_grad and not torch.is_grad_enabled():
            self._waiting_without_graph.append(forward)

    def plan_to_repeat(self) -> DropPlan:
        """The plan of the forward that is being recomputed.

        Raises:
            RuntimeError: there is not exactly one that it can be.
        """
        # A checkpoint that ends with the stack recomputes after the stack's output got its gradient, one that goes on
        # behind the stack recomputes before.
        candidates = {*self._waiting, *self._waiting_without_graph}
        if self._in_backward is not None:
            candidates.add(self._in_backward)
        if len(candidates) != 1:
            raise RuntimeError(
                f"activation checkpointing recomputes this stack, but {len(candidates)} of its forwards may be meant, "
                "expected 1: checkpoint the layers inside the stack, or run backward after each forward; give a "
                "reentrant checkpoint nothing but the stack (0 are known behind other modules), and after one whose "
                "backward you skip, call stack.counters.forget()"
            )
        (forward,) = candidates
        self._begin_backward(forward)
        return forward.plan

    def _begin_backward(self, forward: _Forward) -> None:
        self._waiting.discard(forward)
        self._waiting_without_graph = [other for other in self._waiting_without_graph if other is not forward]
        self._in_backward = forward

    def __getstate__(self) -> dict[str, Any]:
        # The forwards belong to graphs, which a copy does not share.
        waiting = ("last_plan", "_waiting", "_waiting_without_graph", "_in_backward")
        return {name: value for name, value in self.__dict__.items() if name not in waiting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.last_plan = None
        self.forget()

    def get_extra_state(self) -> Tensor:
        signed = self.seed - (1 << 64) if self.seed >> 63 else self.seed
        return torch.tensor([STATE_VERSION, signed, self.forwards], device="cpu")

    def set_extra_state(self, state: Any) -> None:
        values = state.tolist() if isinstance(state, Tensor) else state
        if not isinstance(values, list) or len(values) != 3 or values[0] != STATE_VERSION or values[2] < 0:
            raise ValueError(
                f"counters in the state dict are {state!r}, expected int64 [{STATE_VERSION}, seed, forwards >= 0]"
            )
        self.seed, self.forwards = values[1] % (1 << 64), values[2]
        self.seed_was_drawn = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        missing_keys = others[2]
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")


def set_step(model: nn.Module, step: int) -> None:
    """Makes the next training forward of every stack in ``model`` the first microbatch of step ``step`` (0-based).

    Raises:
        ValueError: a step outside [0, 2**64), or a model without counters; TypeError: a step that is no integer.
        Nothing is changed then.
    """
    check_word(step, "step")
    counters = [module for module in model.modules() if isinstance(module, StepCounters)]
    if not counters:
        raise ValueError(f"{type(model).__name__} holds no LayerDropStack, expected at least one")
    for module in counters:
        module.set_step(step)
