"""From tensors to launches: what the launchers of all ops check and pass on.

Checks here protect memory and what torch would take amiss; ``layerdrop_fast.ops`` tells users what is wrong. The values
of rows are not looked at, since that would wait for the device: a wrong index leads to no memory but the op's own.
"""

import contextlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.triton.configurations import Configuration

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Up to so many samples, a program finds its own among the rows by looking at all of them.
MOST_SCANNED = 1024
# A kernel is not compiled again for another value of these integers, nor for another alignment of these pointers.
UNSPECIALISED = [
    *("outputs", "positions", "batch", "num_rows", "num_next_rows", "threshold", "multiplier", "eps"),
    *("p_rows", "p_slots", "p_next_rows", "p_next_slots", "p_scale", "p_key", "p_site"),
]

jit = triton.jit(do_not_specialize=UNSPECIALISED)


class Shape(NamedTuple):
    """B, S (the product of the middle dimensions) and D."""

    samples: int
    positions: int
    channels: int


def shape_of(name: str, value: Tensor) -> Shape:
    if value.dim() < 2 or value.dtype not in FLOATING:
        raise RuntimeError(f"{name}: expected floating [B, ..., D], got {value.dtype} {list(value.shape)}")
    return Shape(value.shape[0], value.shape[1:-1].numel(), value.shape[-1])


def dense(name: str, value: Tensor, like: Tensor, samples: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor with ``samples`` samples, otherwise of the sizes of ``like``."""
    return _checked(name, value, like, (samples, *like.shape[1:]), dtype)


def per_row(name: str, value: Tensor, like: Tensor, samples: int) -> Tensor:
    """One number a row of channels, in the dtype of arithmetic."""
    return _checked(name, value, like, (samples, *like.shape[1:-1]), accumulator(like.dtype))


def check_vector(name: str, value: Tensor, like: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous vector on the device of ``like``."""
    return _checked(name, value, like, (length,), dtype)


def _checked(name: str, value: Tensor, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    if value.shape != torch.Size(shape) or value.device != like.device:
        raise RuntimeError(
            f"{name}: expected {list(shape)} on {like.device}, got {list(value.shape)} on {value.device}"
        )
    if value.dtype != dtype if dtype else value.dtype not in FLOATING:
        raise RuntimeError(f"{name}: expected {dtype or 'a floating dtype'}, got {value.dtype}")
    return value.contiguous()


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATING:
        raise RuntimeError(f"dtype: expected a floating one, got {dtype}")
    return dtype


def check_in_place(stream: Tensor, **others: Tensor) -> None:
    """A stream that is written in place is contiguous and shares no memory with what is read."""
    if not stream.is_contiguous():
        raise RuntimeError("the stream: expected a contiguous tensor, since it is written in place")
    if stream.is_meta:
        return
    begin, end = _span(stream)
    for name, other in others.items():
        other_begin, other_end = _span(other)
        if stream.numel() and other.numel() and begin < other_end and other_begin < end:
            raise RuntimeError(f"{name}: shares memory with the stream, which is written")


def _span(value: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


class Rows(NamedTuple):
    """The samples of a branch, for kernels that go over the samples or over the rows."""

    rows: Tensor | None
    slots: Tensor | None  # int32 [B], a sample's place among them, or -1; None where programs look it up in rows
    number: int

    @staticmethod
    def of(name: str, rows: Tensor | None, batch: int | None, like: Tensor) -> "Rows":
        """``batch`` None: a kernel goes over the rows and never looks for a sample."""
        if rows is None:
            return Rows(None, None, like.shape[0] if batch is None else batch)
        if rows.dtype != torch.int32 or rows.dim() != 1 or rows.device != like.device:
            raise RuntimeError(
                f"{name}: expected int32 [K] on {like.device}, got {rows.dtype} {list(rows.shape)} on {rows.device}"
            )
        rows = rows.contiguous()
        if batch is None or batch <= MOST_SCANNED:
            return Rows(rows, None, rows.shape[0])
        # A spare row writes the last and surplus entry.
        slots = torch.full((batch + 1,), -1, dtype=torch.int32, device=rows.device)
        sample = torch.where((rows >= 0) & (rows < batch), rows, batch)
        slots[sample.long()] = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        return Rows(rows, slots, rows.shape[0])


def numbering(rows: Tensor | None, like: Tensor) -> Rows:
    """The samples that the rows of ``like`` are, of a batch of any size."""
    found = Rows.of("rows", rows, None, like)
    if found.number != like.shape[0]:
        raise RuntimeError(f"rows: expected int32 [{like.shape[0]}], got [{found.number}]")
    return found


def scan_block(batch: int) -> int:
    """How many rows a program looks at at once."""
    return min(max(int(triton.next_power_of_2(batch)), 16), MOST_SCANNED)


def dropout_arguments(p: float, key: Tensor | None, site: Tensor | None, like: Tensor) -> dict[str, Any]:
    if p == 0:
        return {"p_key": None, "p_site": None, "threshold": 0, "multiplier": 0, "DROPOUT": False}
    if not 0 < p <= 1:
        raise RuntimeError(f"dropout_p: expected a probability in [0, 1], got {p}")
    for name, value, count in (("key", key, 4), ("site", site, 1)):
        if value is None or value.dtype != torch.int32 or value.numel() != count or value.device != like.device:
            got = None if value is None else f"{value.dtype} {list(value.shape)} on {value.device}"
            raise RuntimeError(f"{name}: expected {count} of int32 on {like.device}, got {got}")
    assert key is not None
    return {
        "p_key": key.contiguous(),
        "p_site": site,
        "threshold": round((1 - p) * 2**32),
        "multiplier": bits(1 / (1 - p) if p < 1 else 0.0),
        "DROPOUT": True,
    }


def scale_argument(scale: Tensor | None, like: Tensor) -> Tensor | None:
    if scale is not None and (
        scale.numel() != 1 or scale.dtype != accumulator(like.dtype) or scale.device != like.device
    ):
        raise RuntimeError(
            f"scale: expected one {accumulator(like.dtype)} on {like.device}, "
            f"got {scale.dtype} {list(scale.shape)} on {scale.device}"
        )
    return scale


def bits(value: float) -> int:
    """The bits of a float64, for ``device.number``."""
    (result,) = struct.unpack("<q", struct.pack("<d", value))
    return int(result)


def arithmetic(like: Tensor) -> tl.dtype:
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def blocks(positions: int, config: Configuration) -> int:
    """Programs for one sample."""
    return -(-positions // config.rows)


def launch(kernel: Any, grid: tuple[int, ...], config: Configuration, like: Tensor, **arguments: Any) -> None:
    """Run a kernel on the device and the current stream of ``like``."""
    if 0 in grid:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](
            **arguments,
            ROWS=config.rows,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # a * b + c is rounded twice, as on the CPU.
            enable_fp_fusion=config.fp_fusion,
            **_most_registers(config.num_warps),
        )


def _most_registers(num_warps: int) -> dict[str, int]:
    """NVIDIA's compiler would spill a few of them to fit more programs on a multiprocessor; AMD's has no such bound."""
    return {} if torch.version.hip else {"maxnreg": min(128, 65536 // (32 * num_warps))}
