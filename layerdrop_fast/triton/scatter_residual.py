"""scatter_residual on a GPU: elementwise, one tile of a sample's rows a program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerdrop_fast.triton.configurations import chosen
from layerdrop_fast.triton.device import dropout, offsets, rounded, rows_at, sample_of, scaled, slot_of, tile_of
from layerdrop_fast.triton.launch import (
    Rows,
    arithmetic,
    blocks,
    check_dtype,
    check_in_place,
    dense,
    dropout_arguments,
    jit,
    launch,
    scale_argument,
    scan_block,
    shape_of,
)


@triton.jit
def with_branch(
    stream,
    p_y,
    p_scale,
    p_key,
    p_site,
    threshold,
    multiplier,
    o_row,
    o_y_row,
    start,
    m_tile,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``stream + scale * dropout(y)``, in the stream's dtype."""
    o_channel = start + tl.arange(0, BLOCK_D)
    y = tl.load(p_y + offsets(o_y_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
    y = dropout(y, p_key, p_site, threshold, multiplier, o_row, start, D, BLOCK_D, DROPOUT)
    return (stream.to(ACC) + scaled(y, p_scale)).to(stream.dtype)


@jit
def scatter_residual_fwd_kernel(
    p_x,  # [B, S, D]
    p_y,  # [K, S, D]
    p_x_out,  # [B, S, D]; p_x itself in place
    p_rows,  # [K] or None
    p_slots,  # [B] or None
    p_scale,  # [] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    positions,
    batch,
    num_rows,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    ACC: tl.constexpr,
):
    # In place only rows of a branch change, and programs go over those.
    if IN_PLACE:
        i_slot, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
        i_sample = sample_of(p_rows, i_slot, batch)
        m_position = m_position & (i_sample >= 0)
    else:
        i_sample, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
        i_slot = slot_of(p_rows, p_slots, num_rows, i_sample, BLOCK_SCAN)
    o_row = rows_at(i_sample, positions, o_position)
    o_y_row = rows_at(i_slot, positions, o_position)
    start = tl.program_id(1) * BLOCK_D
    o_channel = start + tl.arange(0, BLOCK_D)
    m_tile = m_position[:, None] & (o_channel < D)[None, :]
    stream = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_tile, other=0.0)
    if i_slot >= 0:
        stream = with_branch(
            stream, p_y, p_scale, p_key, p_site, threshold, multiplier,
            o_row, o_y_row, start, m_tile, D, BLOCK_D, DROPOUT, ACC,
        )  # fmt: skip
    tl.store(p_x_out + offsets(o_row, o_channel, D), stream, mask=m_tile)


@jit
def scatter_residual_bwd_kernel(
    p_grad_out,  # [B, S, D]
    p_grad_y,  # [K, S, D]
    p_rows,  # [K] or None
    p_scale,  # [] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    positions,
    batch,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_sample = sample_of(p_rows, i_row, batch)
    o_row = rows_at(i_sample, positions, o_position)
    o_y_row = rows_at(i_row, positions, o_position)
    start = tl.program_id(1) * BLOCK_D
    o_channel = start + tl.arange(0, BLOCK_D)
    m_tile = m_position[:, None] & (o_channel < D)[None, :]
    # A spare row reads nothing and becomes 0.
    grad = tl.load(p_grad_out + offsets(o_row, o_channel, D), mask=m_tile & (i_sample >= 0), other=0.0)
    store_branch_gradient(
        p_grad_y, grad, p_scale, p_key, p_site, threshold, multiplier,
        o_row, o_y_row, start, m_tile, D, BLOCK_D, DROPOUT, ACC,
    )  # fmt: skip


@triton.jit
def store_branch_gradient(
    p_grad_y,
    grad,
    p_scale,
    p_key,
    p_site,
    threshold,
    multiplier,
    o_row,
    o_y_row,
    start,
    m_tile,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``grad_y = scale * dropout(grad)``."""
    grad_y = dropout(grad.to(ACC), p_key, p_site, threshold, multiplier, o_row, start, D, BLOCK_D, DROPOUT)
    grad_y = rounded(scaled(grad_y, p_scale), p_grad_y)
    tl.store(p_grad_y + offsets(o_y_row, start + tl.arange(0, BLOCK_D), D), grad_y, mask=m_tile)


def scatter_residual(
    x: Tensor,
    y: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> Tensor:
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x.contiguous(), x_out, y, rows, scale, dropout_p, key, site)
    return x_out


def scatter_residual_(x: Tensor, y: Tensor, *others: Any) -> None:
    check_in_place(x, y=y)
    _forward(x, x, y, *others)


def _forward(
    x: Tensor,
    x_out: Tensor,
    y: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> None:
    in_place = x is x_out
    shape = shape_of("x", x)
    kept = Rows.of("rows", rows, shape.samples, x)
    config = chosen("scatter_residual", shape.channels, x.dtype, x.device).fit(shape.positions)
    launch(
        scatter_residual_fwd_kernel,
        (
            (kept.number if in_place else shape.samples) * blocks(shape.positions, config),
            triton.cdiv(shape.channels, config.block_d),
        ),
        config,
        x,
        p_x=x,
        p_y=dense("y", y, x, kept.number),
        p_x_out=x_out,
        p_rows=kept.rows,
        p_slots=kept.slots,
        p_scale=scale_argument(scale, x),
        **dropout_arguments(dropout_p, key, site, x),
        positions=shape.positions,
        batch=shape.samples,
        num_rows=kept.number,
        D=shape.channels,
        IN_PLACE=in_place,
        BLOCK_SCAN=scan_block(shape.samples),
        ACC=arithmetic(x),
    )


def scatter_residual_bwd(
    grad_out: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    shape = shape_of("grad_out", grad_out)
    kept = Rows.of("rows", rows, None, grad_out)
    grad_y = grad_out.new_empty(kept.number, *grad_out.shape[1:], dtype=check_dtype(dtype))
    config = chosen("scatter_residual_bwd", shape.channels, grad_out.dtype, grad_out.device).fit(shape.positions)
    launch(
        scatter_residual_bwd_kernel,
        (kept.number * blocks(shape.positions, config), triton.cdiv(shape.channels, config.block_d)),
        config,
        grad_out,
        p_grad_out=grad_out.contiguous(),
        p_grad_y=grad_y,
        p_rows=kept.rows,
        p_scale=scale_argument(scale, grad_out),
        **dropout_arguments(dropout_p, key, site, grad_out),
        positions=shape.positions,
        batch=shape.samples,
        D=shape.channels,
        ACC=arithmetic(grad_out),
    )
    return grad_y
