"""Recomputing in backward what is cheap to make: query, key and value (7 units a layer, not 10), gathered memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class _Part(NamedTuple):
    """A view of what is computed again."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again:
    """A tensor that is computed once more when backward asks for the first of its parts, and let go after the last."""

    def __init__(self, compute: Callable[[], Tensor], like: Tensor, inputs: Sequence[Tensor]) -> None:
        self.compute = compute
        self.inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]
        self.device, self.dtype = like.device.type, like.dtype
        self.autocast = torch.is_autocast_enabled(self.device)
        self.parts = self.left = 0
        self.value: Tensor | None = None

    def part(self, view: _Part) -> Tensor:
        if self.value is None:
            for tensor, version in self.inputs:
                if tensor._version != version:
                    raise RuntimeError(
                        f"a tensor {list(tensor.shape)} that backward needs was modified by an inplace operation: "
                        f"got version {tensor._version}, expected {version}"
                    )
            with torch.no_grad(), torch.autocast(self.device, self.dtype, self.autocast):
                self.value = self.compute()
            self.left = self.parts
        found = self.value.as_strided(view.size, view.stride, view.offset)
        self.left -= 1
        if not self.left:
            self.value = None
        return found


@contextmanager
def recomputed_in_backward(
    compute: Callable[..., Tensor], h: Tensor, *weights: Tensor | None, enabled: bool
) -> Iterator[Tensor]:
    """``compute(h, *weights)``, of which nothing that is done inside this context is held for backward; h is, instead.

    What autograd saves of it is computed anew, once, when backward asks. Hooks on saved tensors that are active, such
    as those of activation checkpointing, see everything else, and h.

    Args:
        compute: gives the same values and strides each time, of its arguments alone: what a module holds in backward
            may be something else than in forward (``torch.func.functional_call``).
        enabled: otherwise autograd saves as always.

    Raises:
        RuntimeError: in backward, h or a weight was written in the meantime.
    """
    value = compute(h, *weights)
    if not enabled or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield value
        return
    hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = hooks or ((lambda tensor: tensor), (lambda tensor: tensor))
    held_h = outer_pack(h.detach())
    held = [None if weight is None else weight.detach() for weight in weights]
    inputs = [weight for weight in held if weight is not None] + ([held_h] if hooks is None else [])
    again = _Again(lambda: compute(outer_unpack(held_h), *held), value, inputs)
    storage = value.untyped_storage()._cdata

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata != storage:
            return outer_pack(saved)
        again.parts += 1
        return _Part(saved.size(), saved.stride(), int(saved.storage_offset()))

    def unpack(saved: Any) -> Tensor:
        return again.part(saved) if isinstance(saved, _Part) else outer_unpack(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield value


def recomputed_by_the_compiler(compute: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """``compute(h)`` in a compiled region, where backward makes all anew but attention itself."""
    contexts = partial(create_selective_checkpoint_contexts, _hold_attention)
    return checkpoint(compute, h, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


def _hold_attention(context: Any, op: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    attention = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE
