"""What a training step holds in memory between its forward and its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


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

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = function(*args, **kwargs)
    saved = list(held)
    del result  # only now: the graph, and with it what was saved, lives as long as the result

    # The address of a storage's header is its own while it lives.
    without = {tensor.untyped_storage()._cdata for tensor in excluded}
    without |= {item.tensor.untyped_storage()._cdata for item in saved if item.is_weight}
    storages = {storage._cdata: storage for storage in (item.tensor.untyped_storage() for item in saved)}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in without)
