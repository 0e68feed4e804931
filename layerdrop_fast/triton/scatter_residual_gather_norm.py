"""scatter_residual_gather_norm on a GPU: a program takes positions of one sample from one kept branch to the next."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.triton.configurations import chosen
from layerdrop_fast.triton.device import (
    clear_spare_rows,
    moments_with,
    norm_gradient,
    norm_sums,
    normalised,
    number,
    offsets,
    rows_at,
    slot_of,
    tile_of,
    wide_norm_sums,
)
from layerdrop_fast.triton.launch import (
    Rows,
    arithmetic,
    bits,
    blocks,
    check_dtype,
    check_in_place,
    dense,
    dropout_arguments,
    jit,
    launch,
    per_row,
    scale_argument,
    scan_block,
    shape_of,
)
from layerdrop_fast.triton.scatter_residual import store_branch_gradient, with_branch


@jit
def scatter_residual_gather_norm_fwd_kernel(
    p_x,  # [B, S, D]
    p_y,  # [K, S, D]
    p_x_out,  # [B, S, D]; p_x itself in place
    p_xhat,  # [N, S, D]
    p_rstd,  # [N, S]
    p_rows,  # [K] or None
    p_slots,  # [B] or None
    p_next_rows,  # [N] or None
    p_next_slots,  # [B] or None
    p_scale,  # [] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    eps: tl.int64,  # bits
    positions,
    batch,
    num_rows,
    num_next_rows,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    RMS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    ACC: tl.constexpr,
):
    i_sample, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_slot = slot_of(p_rows, p_slots, num_rows, i_sample, BLOCK_SCAN)
    i_next = slot_of(p_next_rows, p_next_slots, num_next_rows, i_sample, BLOCK_SCAN)
    clear_spare_rows(
        p_xhat, p_rstd, p_next_rows, num_next_rows, i_sample, batch, positions, o_position, D, BLOCK_D
    )  # fmt: skip
    o_row = rows_at(i_sample, positions, o_position)
    o_y_row = rows_at(i_slot, positions, o_position)
    o_next_row = rows_at(i_next, positions, o_position)
    if IN_PLACE:  # what neither branch touches stays as it is
        m_position = m_position & ((i_slot >= 0) | (i_next >= 0))
    if D <= BLOCK_D:
        o_channel = tl.arange(0, BLOCK_D)
        m_channel = o_channel < D
        m_tile = m_position[:, None] & m_channel[None, :]
        stream = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_tile, other=0.0)
        if i_slot >= 0:
            stream = with_branch(
                stream, p_y, p_scale, p_key, p_site, threshold, multiplier,
                o_row, o_y_row, 0, m_tile, D, BLOCK_D, DROPOUT, ACC,
            )  # fmt: skip
        if IN_PLACE:
            tl.store(p_x_out + offsets(o_row, o_channel, D), stream, mask=m_tile & (i_slot >= 0))
        else:
            tl.store(p_x_out + offsets(o_row, o_channel, D), stream, mask=m_tile)
        if i_next >= 0:
            xhat, rstd = normalised(stream.to(ACC), m_channel, number(eps, ACC), D, RMS)
            tl.store(p_xhat + offsets(o_next_row, o_channel, D), xhat, mask=m_tile)
            tl.store(p_rstd + o_next_row, rstd, mask=m_position)
    else:
        mean = tl.zeros((ROWS,), ACC)
        squares = tl.zeros((ROWS,), ACC)
        for start in range(0, D, BLOCK_D):
            o_channel = start + tl.arange(0, BLOCK_D)
            m_channel = o_channel < D
            m_tile = m_position[:, None] & m_channel[None, :]
            stream = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_tile, other=0.0)
            if i_slot >= 0:
                stream = with_branch(
                    stream, p_y, p_scale, p_key, p_site, threshold, multiplier,
                    o_row, o_y_row, start, m_tile, D, BLOCK_D, DROPOUT, ACC,
                )  # fmt: skip
            tl.store(p_x_out + offsets(o_row, o_channel, D), stream, mask=m_tile)
            mean, squares = moments_with(mean, squares, stream.to(ACC), m_channel, start, D, BLOCK_D, RMS)
        if i_next >= 0:
            rstd = tl.rsqrt(squares / D + number(eps, ACC))
            tl.store(p_rstd + o_next_row, rstd, mask=m_position)
            tl.debug_barrier()  # other threads of the program may read what this one stored
            for start in range(0, D, BLOCK_D):
                o_channel = start + tl.arange(0, BLOCK_D)
                m_tile = m_position[:, None] & (o_channel < D)[None, :]
                stream = tl.load(p_x_out + offsets(o_row, o_channel, D), mask=m_tile, other=0.0)
                xhat = (stream.to(ACC) - mean[:, None]) * rstd[:, None]
                tl.store(p_xhat + offsets(o_next_row, o_channel, D), xhat, mask=m_tile)


@jit
def scatter_residual_gather_norm_bwd_kernel(
    p_grad_x_out,  # [B, S, D]
    p_grad_xhat,  # [N, S, D]
    p_xhat,  # [N, S, D]
    p_rstd,  # [N, S]
    p_grad_x,  # [B, S, D]; p_grad_x_out itself in place
    p_grad_y,  # [K, S, D]
    p_rows,  # [K] or None
    p_slots,  # [B] or None
    p_next_rows,  # [N] or None
    p_next_slots,  # [B] or None
    p_scale,  # [] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    positions,
    batch,
    num_rows,
    num_next_rows,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    RMS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    ACC: tl.constexpr,
):
    i_sample, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_slot = slot_of(p_rows, p_slots, num_rows, i_sample, BLOCK_SCAN)
    i_next = slot_of(p_next_rows, p_next_slots, num_next_rows, i_sample, BLOCK_SCAN)
    clear_spare_rows(p_grad_y, None, p_rows, num_rows, i_sample, batch, positions, o_position, D, BLOCK_D)
    o_row = rows_at(i_sample, positions, o_position)
    o_y_row = rows_at(i_slot, positions, o_position)
    o_next_row = rows_at(i_next, positions, o_position)
    m_next = m_position & (i_next >= 0)
    if IN_PLACE:  # what neither branch touches stays as it is
        m_position = m_position & ((i_slot >= 0) | (i_next >= 0))
    rstd = tl.load(p_rstd + o_next_row, mask=m_next, other=0.0)
    projection, mean = wide_norm_sums(p_grad_xhat, p_xhat, o_next_row, m_next, D, BLOCK_D, RMS, ROWS, ACC)
    for start in range(0, D, BLOCK_D):
        o_channel = start + tl.arange(0, BLOCK_D)
        m_channel = o_channel < D
        m_tile = m_position[:, None] & m_channel[None, :]
        grad = tl.load(p_grad_x_out + offsets(o_row, o_channel, D), mask=m_tile, other=0.0)
        if i_next >= 0:
            g = tl.load(p_grad_xhat + offsets(o_next_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
            xhat = tl.load(p_xhat + offsets(o_next_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
            if D <= BLOCK_D:
                projection, mean = norm_sums(g, xhat, D, RMS)
            grad = (grad.to(ACC) + norm_gradient(g, xhat, rstd, projection, mean)).to(grad.dtype)
        if IN_PLACE:
            tl.store(p_grad_x + offsets(o_row, o_channel, D), grad, mask=m_tile & (i_next >= 0))
        else:
            tl.store(p_grad_x + offsets(o_row, o_channel, D), grad, mask=m_tile)
        if i_slot >= 0:
            store_branch_gradient(
                p_grad_y, grad, p_scale, p_key, p_site, threshold, multiplier,
                o_row, o_y_row, start, m_tile, D, BLOCK_D, DROPOUT, ACC,
            )  # fmt: skip


def scatter_residual_gather_norm(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_out, *_forward(x.contiguous(), x_out, y, *others)


def scatter_residual_gather_norm_(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    check_in_place(x, y=y)
    return _forward(x, x, y, *others)


def _forward(
    x: Tensor,
    x_out: Tensor,
    y: Tensor,
    rows: Tensor | None,
    next_rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = shape_of("x", x)
    kept, following = (Rows.of(n, r, shape.samples, x) for n, r in (("rows", rows), ("next_rows", next_rows)))
    # A stream without samples has programs for none, also none to clear spare rows.
    new = x.new_empty if shape.samples else x.new_zeros
    xhat = new(following.number, *x.shape[1:])
    rstd = new(following.number, *x.shape[1:-1], dtype=accumulator(x.dtype))
    config = chosen("scatter_residual_gather_norm", shape.channels, x.dtype, x.device).fit(shape.positions)
    launch(
        scatter_residual_gather_norm_fwd_kernel,
        (shape.samples * blocks(shape.positions, config),),
        config,
        x,
        p_x=x,
        p_y=dense("y", y, x, kept.number),
        p_x_out=x_out,
        p_xhat=xhat,
        p_rstd=rstd,
        p_rows=kept.rows,
        p_slots=kept.slots,
        p_next_rows=following.rows,
        p_next_slots=following.slots,
        p_scale=scale_argument(scale, x),
        **dropout_arguments(dropout_p, key, site, x),
        eps=bits(eps),
        positions=shape.positions,
        batch=shape.samples,
        num_rows=kept.number,
        num_next_rows=following.number,
        D=shape.channels,
        RMS=rms,
        IN_PLACE=x is x_out,
        BLOCK_SCAN=scan_block(shape.samples),
        ACC=arithmetic(x),
    )
    return xhat, rstd


def scatter_residual_gather_norm_bwd(grad_x_out: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad_x_out, memory_format=torch.contiguous_format)
    return grad_x, _backward(grad_x_out.contiguous(), grad_x, *others)


def scatter_residual_gather_norm_bwd_(
    grad_x: Tensor, grad_xhat: Tensor, xhat: Tensor, rstd: Tensor, *others: Any
) -> Tensor:
    check_in_place(grad_x, grad_xhat=grad_xhat, xhat=xhat, rstd=rstd)
    return _backward(grad_x, grad_x, grad_xhat, xhat, rstd, *others)


def _backward(
    grad_x_out: Tensor,
    grad_x: Tensor,
    grad_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    next_rows: Tensor | None,
    scale: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
    rms: bool,
    dtype: torch.dtype,
) -> Tensor:
    like = grad_x_out
    shape = shape_of("grad_x_out", like)
    kept, following = (Rows.of(n, r, shape.samples, like) for n, r in (("rows", rows), ("next_rows", next_rows)))
    new = like.new_empty if shape.samples else like.new_zeros
    grad_y = new(kept.number, *like.shape[1:], dtype=check_dtype(dtype))
    config = chosen("scatter_residual_gather_norm_bwd", shape.channels, like.dtype, like.device).fit(shape.positions)
    launch(
        scatter_residual_gather_norm_bwd_kernel,
        (shape.samples * blocks(shape.positions, config),),
        config,
        like,
        p_grad_x_out=like,
        p_grad_xhat=dense("grad_xhat", grad_xhat, like, following.number),
        p_xhat=dense("xhat", xhat, like, following.number),
        p_rstd=per_row("rstd", rstd, like, following.number),
        p_grad_x=grad_x,
        p_grad_y=grad_y,
        p_rows=kept.rows,
        p_slots=kept.slots,
        p_next_rows=following.rows,
        p_next_slots=following.slots,
        p_scale=scale_argument(scale, like),
        **dropout_arguments(dropout_p, key, site, like),
        positions=shape.positions,
        batch=shape.samples,
        num_rows=kept.number,
        num_next_rows=following.number,
        D=shape.channels,
        RMS=rms,
        IN_PLACE=grad_x is grad_x_out,
        BLOCK_SCAN=scan_block(shape.samples),
        ACC=arithmetic(like),
    )
    return grad_y
