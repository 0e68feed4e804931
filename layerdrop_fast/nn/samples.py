"""The kept samples of whatever a layer is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Argument number (after x) or keyword -> the dimension that counts samples, None where there is none.
BatchDims = Mapping[int | str, int | None]


class Samples:
    """Takes samples out of arguments that have them.

    A tensor whose first dimension has as many elements as there are samples has one entry a sample; every other is the
    same for all. Tensors inside tuples, lists and dicts count too. Where that first dimension may also be something
    else, since x has a dimension of the same size behind its own first, nothing is guessed.

    Args:
        x: [B, ...], the stream.
        batch_dims: for arguments named in it, the dimension that counts samples, or None.
    """

    def __init__(self, x: Tensor, batch_dims: BatchDims) -> None:
        self.batch = x.shape[0]
        self.shape = list(x.shape)
        self.batch_dims = batch_dims

    def of_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the samples in ``rows``.

        Raises:
            ValueError: a tensor may have samples or not; a dimension of ``batch_dims`` has not B elements.
        """
        taken = tuple(self._of(value, rows, index) for index, value in enumerate(args))
        return taken, {name: self._of(value, rows, name) for name, value in kwargs.items()}

    def _of(self, value: Any, rows: Tensor, name: int | str) -> Any:
        if isinstance(value, Tensor):
            dim = self._dimension(value, name)
            return value if dim is None else value.index_select(dim, rows)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._of(item, rows, name) for item in value))
        if type(value) in (tuple, list):
            return type(value)(self._of(item, rows, name) for item in value)
        if isinstance(value, dict):
            return {key: self._of(item, rows, name) for key, item in value.items()}
        return value

    def _dimension(self, value: Tensor, name: int | str) -> int | None:
        argument = f"argument {name + 1} after x" if isinstance(name, int) else f"argument {name!r}"
        if name in self.batch_dims:
            dim = self.batch_dims[name]
            if dim is not None and not (-value.dim() <= dim < value.dim() and value.shape[dim] == self.batch):
                raise ValueError(
                    f"{argument}: got {list(value.shape)}, expected {self.batch} samples in dimension {dim}, which "
                    "batch_dims names"
                )
            return dim
        if value.dim() == 0 or value.shape[0] != self.batch:
            return None
        if self.batch in self.shape[1:]:
            raise ValueError(
                f"{argument}: got {list(value.shape)} for x {self.shape}, which may have one entry a sample or not: "
                f"name it in batch_dims, as {{{name!r}: 0}} or {{{name!r}: None}}"
            )
        return 0


def replace_samples(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x with ``values`` in place of its samples ``rows``; unlike ``index_copy``, holds none of them for backward.

    Shapes:
        x: [B, ...]; rows: int32 [K]; values: [K, ...], dtype of x -> [B, ...]
    """
    return _Replace.apply(x, rows, values)  # type: ignore[no-any-return, no-untyped-call]


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        return x.index_copy(0, rows.long(), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        need_x, _, need_values = ctx.needs_input_grad
        grad_x = None
        if need_x:
            # Not index_fill: Inductor can't compile it for an unknown number of rows.
            replaced = torch.zeros(grad.shape[0], dtype=torch.bool, device=grad.device)
            replaced = replaced.index_put((rows.long(),), torch.ones((), dtype=torch.bool, device=grad.device))
            grad_x = grad.masked_fill(replaced.view(-1, *[1] * (grad.dim() - 1)), 0)
        return grad_x, None, grad.index_select(0, rows) if need_values else None
