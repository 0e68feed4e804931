"""Checks of the public functions: they name both sides, change nothing, and never wait for a device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerdrop_fast.ops.blocks import Blocks
from layerdrop_fast.reference.act_linear import ACTIVATIONS
from layerdrop_fast.reference.philox import FIRST_DROPOUT_SITE, NUM_SITES
from layerdrop_fast.reference.rows import accumulator

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layernorm", "rmsnorm")


def check_tensor(name: str, value: object, *dtypes: torch.dtype) -> Tensor:
    """A tensor of one of ``dtypes``."""
    if isinstance(value, Tensor) and value.dtype in dtypes:
        return value
    expected = " or ".join(str(dtype) for dtype in dtypes)
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: got {value.dtype}, expected {expected}")
    raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor of {expected}")


def check_shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """The exact shape; in a compiled region a check of the graph, since sizes may be unknown while tracing."""
    if value.dim() == len(expected) and torch.compiler.is_compiling():
        for got, want in zip(value.shape, expected, strict=True):
            torch._check(got == want)
    elif value.shape != torch.Size(expected):
        raise ValueError(f"{name}: got {list(value.shape)}, expected {list(expected)}")


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """The device of the main input."""
    if value.device != like.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {like.device}")


def check_rank(name: str, value: Tensor, shape: str) -> None:
    """At least samples and channels, and at least one channel."""
    if value.dim() < 2 or value.shape[-1] == 0:
        raise ValueError(f"{name}: got {list(value.shape)}, expected {shape} with at least one channel")


def check_rows(name: str, rows: Tensor | None, like: Tensor, batch: int | None) -> int:
    """Row indices into ``batch`` samples; returns how many. Values are looked at on the CPU only."""
    if rows is None:
        return like.shape[0]
    check_tensor(name, rows, torch.int32)
    check_device(name, rows, like)
    if rows.dim() != 1:
        raise ValueError(f"{name}: got {list(rows.shape)}, expected [K]")
    if readable(rows):
        _check_row_values(name, rows.tolist(), batch)
    return rows.shape[0]


def readable(value: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return value.device.type == "cpu" and type(value) is Tensor and not torch.compiler.is_compiling()


def _check_row_values(name: str, values: list[int], batch: int | None) -> None:
    end = 2**31 if batch is None else batch
    previous = -1
    for row in values:
        if row == -1:
            continue
        if not 0 <= row < end:
            raise ValueError(f"{name}: got {row}, expected indices in [0, {end}) or -1 for a spare row")
        if row <= previous:
            raise ValueError(f"{name}: got {row} after {previous}, expected ascending indices without duplicates")
        previous = row


def check_dropout(dropout_p: float, key: Tensor | None, site: Tensor | None, like: Tensor) -> None:
    """A probability and, unless it is 0, where its masks come from."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1]")
    if dropout_p == 0:
        return
    for name, value, shape in (("key", key, [4]), ("site", site, [])):
        check_tensor(name, value, torch.int32)
        assert value is not None
        check_device(name, value, like)
        check_shape(name, value, shape)
    if site is not None and readable(site) and not FIRST_DROPOUT_SITE <= int(site) < NUM_SITES:
        raise ValueError(
            f"site: got {int(site)}, expected one in [{FIRST_DROPOUT_SITE}, 2^24): the plan has the others"
        )


def check_scale(scale: float | Tensor, like: Tensor) -> Tensor | None:
    """The residual scale as the ops take it: None for 1, else a tensor [] in the dtype of their arithmetic."""
    dtype = accumulator(like.dtype)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, torch.float32, torch.float64)
        check_device("scale", scale, like)
        check_shape("scale", scale, [])
        if scale.requires_grad:
            raise ValueError("scale: got a tensor that requires a gradient, expected one that does not: it gets none")
        return scale.to(dtype)
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return None if scale == 1 else torch.full((), scale, dtype=dtype, device=like.device)


def check_norm(norm: str, eps: float) -> bool:
    """Whether the norm is RMSNorm."""
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number >= 0")
    return norm == "rmsnorm"


def check_activation(activation: str) -> None:
    """An activation that ``act`` knows."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def check_linear(weight: Tensor, bias: Tensor | None, like: Tensor, channels: int | None) -> None:
    """Weight [O, channels] (None: any) and bias [O]."""
    check_tensor("weight", weight, *FLOATING)
    check_device("weight", weight, like)
    if weight.dim() != 2 or channels not in (None, weight.shape[1]):
        raise ValueError(f"weight: got {list(weight.shape)}, expected [O, {'F' if channels is None else channels}]")
    if bias is not None:
        check_vector("bias", bias, like, weight.shape[0])


def check_blocks(blocks: Blocks | None, weight: Tensor, dim: int) -> None:
    """Blocks of the rows (0) or columns (1) of a weight. Values are looked at on the CPU only."""
    if blocks is None:
        return
    if not isinstance(blocks, Blocks):
        raise TypeError(f"blocks: got {type(blocks).__name__}, expected Blocks(kept, size)")
    check_tensor("blocks.kept", blocks.kept, torch.int64)
    if not isinstance(blocks.size, int) or weight.dim() != 2:
        raise TypeError(
            f"blocks: got size {blocks.size!r} for a weight {list(weight.shape)}, expected a whole number and [O, F]"
        )
    check_device("blocks.kept", blocks.kept, weight)
    if blocks.kept.dim() != 1 or blocks.size < 1 or weight.shape[dim] % blocks.size:
        raise ValueError(
            f"blocks: got {list(blocks.kept.shape)} of size {blocks.size}, expected [k] of a size that divides "
            f"{weight.shape[dim]}, dimension {dim} of weight {list(weight.shape)}"
        )
    total = weight.shape[dim] // blocks.size
    if readable(blocks.kept):
        kept = blocks.kept.tolist()
        if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < total):
            raise ValueError(f"blocks.kept: got {kept}, expected ascending numbers from 0 to {total - 1}")


def check_vector(name: str, value: Tensor, like: Tensor, channels: int) -> None:
    """A parameter with one element a channel."""
    check_tensor(name, value, *FLOATING)
    check_device(name, value, like)
    check_shape(name, value, [channels])
