"""The kept samples of whatever a layer is called with, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_integer
from layerdrop_fast.nn.torch_layers import TORCH_LAYERS
from layerdrop_fast.ops._function import Function

# Argument number (after x) or keyword -> the dimension that counts samples, None where there is none.
BatchDims = Mapping[int | str, int | None]


def check_batch_dims(batch_dims: BatchDims | None) -> dict[int | str, int | None]:
    """The same, as a dict of its own."""
    for name, dim in (batch_dims or {}).items():
        if not isinstance(name, int | str):
            raise TypeError(f"batch_dims names {name!r}, expected keywords or numbers of arguments after x")
        if dim is not None:
            check_integer(dim, f"batch_dims[{name!r}]")
    return dict(batch_dims or {})


def check_batch_first(layers: Iterable[nn.Module]) -> None:
    """Refuses torch's layers that take [S, B, D], of which positions would be dropped and not samples."""
    for index, layer in enumerate(layers):
        if isinstance(layer, TORCH_LAYERS) and not layer.self_attn.batch_first:
            raise ValueError(
                f"layer {index}, a {type(layer).__name__}, takes [S, B, D] (batch_first=False): expected [B, S, D] at "
                'granularity "sample", batch_first=True'
            )


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
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the samples in ``rows``; None: for all of them, which only checks.

        Raises:
            ValueError: a tensor may have samples or not; a dimension of ``batch_dims`` has not B elements.
        """
        taken = tuple(self._of(value, rows, index) for index, value in enumerate(args))
        return taken, {name: self._of(value, rows, name) for name, value in kwargs.items()}

    def _of(self, value: Any, rows: Tensor | None, name: int | str) -> Any:
        if isinstance(value, Tensor):
            dim = self._dimension(value, name)
            return value if dim is None or rows is None else value.index_select(dim, rows)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._of(item, rows, name) for item in value))
        if type(value) in (tuple, list):
            return type(value)(self._of(item, rows, name) for item in value)
        if isinstance(value, dict):
            taken = copy.copy(value)  # an OrderedDict stays one
            for key, item in value.items():
                taken[key] = self._of(item, rows, name)
            return taken
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


class PutBack(Function):
    """``x' = x``, ``x'[rows[k]] = y[k]`` in x's dtype. torch's ``index_copy`` would save y for backward."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return x.index_copy(0, rows.long(), y.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        needs_x, needs_y, _ = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            # Not index_fill: Inductor can't compile it for an unknown number of rows.
            replaced = torch.zeros(grad_out.shape[0], dtype=torch.bool, device=grad_out.device)
            replaced = replaced.index_put((rows.long(),), torch.ones((), dtype=torch.bool, device=grad_out.device))
            grad_x = grad_out.masked_fill(replaced.view(-1, *[1] * (grad_out.dim() - 1)), 0)
        return grad_x, grad_out.index_select(0, rows) if needs_y else None, None
