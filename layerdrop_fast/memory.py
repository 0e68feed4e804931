"""What a training step holds in memory between its forward and its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast.nn.held_bytes import branch_bytes
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.nn.turn import Kept, pieces
from layerdrop_fast.plan import DropPlan


class _Saved:
    """One tensor that autograd saved; lives as long as the graph holds it."""

    __slots__ = ("__weakref__", "is_weight", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # A matrix product saves the transpose of a weight, a view whose base is the parameter.
        self.is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        # An operation's own result leads back to the graph: saved as it is, it would keep the graph alive for ever.
        self.tensor = tensor.detach()


def saved_bytes(function: Callable[..., Any], *args: Any, exclude: Iterable[Tensor] = (), **kwargs: Any) -> int:
    """The activation memory of ``function(*args, **kwargs)``: the bytes that autograd holds for backward.

        sum of nbytes(s) over the distinct storages s of the tensors that the result's graph has saved,
        less the storages of parameters and of ``exclude``

    Views share their storage, so x, its slices and its transposes count once, and a view of a small part counts as
    all that it keeps alive. What was saved for a part of the graph that is already gone does not count. An input that
    is saved counts; put it into ``exclude`` where it would be there anyway.

        saved_bytes(model, x)
        saved_bytes(lambda: loss(model(x), target), exclude=[x, target])

    Tensors that reach backward past autograd are not seen: attributes of an ``autograd.Function``'s ``ctx``, closures,
    and what is saved inside other saved-tensor hooks such as those of non-reentrant activation checkpointing (whose
    saved inputs do count).

    Args:
        function: a module or any callable; called once, in the caller's grad mode. Its result is dropped.
        exclude: tensors whose storages are left out.

    Returns:
        Bytes; 0 where nothing requires a gradient.

    Raises:
        TypeError: a function that is not callable, or an ``exclude`` that holds something other than tensors.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {function!r} of type {type(function).__name__}")
    excluded = list(exclude)
    for tensor in excluded:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"exclude must hold tensors, got {tensor!r} of type {type(tensor).__name__}")

    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    # What a compiled region runs eagerly would compile this too, anew for each kind of tensor.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = function(*args, **kwargs)
    saved = list(held)
    del result  # only now: the graph, and with it what was saved, lives as long as the result

    # The address of a storage's header is its own while it lives.
    without = {tensor.untyped_storage()._cdata for tensor in excluded}
    without |= {item.tensor.untyped_storage()._cdata for item in saved if item.is_weight}
    storages = {storage._cdata: storage for storage in (item.tensor.untyped_storage() for item in saved)}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in without)


def predicted_bytes(
    stack: TransformerStack,
    plan: DropPlan | None,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    memory_length: int = 0,
) -> int:
    """What a training forward of a TransformerStack holds for backward, before it runs.

    Of each kept branch ``nn.held_bytes.branch_bytes`` for its kept samples. With ``max_kept``, of the layers that are
    not recomputed only, and a copy of the stream for each piece that is (of the first one, x itself). Left out are
    masks that the forward is given, ``memory``, the samples' indices, and what attention holds where its weights are
    dropped out (``attention_dropout``), which depends on the device.

        plan = stack.plan()  # of the next forward; batch_size=32 where decisions are per sample
        predicted_bytes(stack, plan, (32, 512, 1024), dtype=torch.bfloat16)

    Args:
        plan: what is kept; None: everything.
        shape: (B, S, D) of x; packed rows are not told.
        dtype: of x and, without autocast, of the weights.
        autocast: the dtype of an enclosing ``torch.autocast``, which also holds a copy of each output projection.
        memory_length: T of ``memory`` [B, T, D], with cross-attention.

    Returns:
        Bytes; ``saved_bytes`` of the same forward is within 3 % of it.

    Raises:
        ValueError: a shape that is not (B, S, D), or a plan for another number of layers or samples. TypeError: no
            TransformerStack.
    """
    if not isinstance(stack, TransformerStack):
        raise TypeError(f"stack is a {type(stack).__name__}, expected a TransformerStack")
    units, d_model = len(stack.layers) * stack.units_per_layer, stack.layers[0].d_model
    if len(shape) != 3 or min(shape) < 0 or shape[2] != d_model:
        raise ValueError(f"shape: got {list(shape)}, expected (B, S, D) with D = {d_model}")
    batch, length, width = shape
    counts = [batch] * units
    if plan is not None:
        per_unit = batch if plan.batch_size is None else 1
        counts = [count * per_unit for count in plan.kept_counts]
        decisions = len(stack.rates(plan.step))
        if len(counts) != decisions or plan.batch_size not in (None, batch):
            raise ValueError(f"plan: got {plan!r}, expected one of {decisions} units and {batch} samples")
    kept = [Kept(unit, None, count, 1.0) for unit, count in enumerate(counts[:units]) if count]
    if plan is not None and stack.parts:
        kept = stack.in_parts(plan, kept)
    bound = None if stack.max_kept is None else stack.max_kept * stack.units_per_layer * batch
    total, entered = 0, -1
    for held, recomputed in pieces(kept, bound):
        if recomputed:
            total += batch * length * width * dtype.itemsize
            continue
        for unit in held:
            number, first = divmod(unit.unit, stack.units_per_layer)
            layer: Any = stack.layers[number]
            branches = range(layer.num_branches) if stack.units_per_layer == 1 else [first]
            parts = unit.parts or [None] * len(branches)
            running = [(b, part) for b, part in zip(branches, parts, strict=True) if part is None or part.kept]
            for place, (branch, part) in enumerate(running):
                # Behind a norm of the same layer and for the same samples, a branch needs no input of its own.
                enters = place == 0 and (number != entered or stack.granularity == "sample")
                entered = number
                tokens, memory = unit.num_rows * length, unit.num_rows * memory_length
                share = None if part is None or part.is_whole else len(part.kept) / part.total
                total += branch_bytes(layer, branch, tokens, dtype, autocast, memory, enters, share)
    return total
