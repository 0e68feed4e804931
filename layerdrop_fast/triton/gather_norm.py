"""gather_norm on a GPU: one program normalises a few positions of one kept sample."""

import triton
import triton.language as tl
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.triton.configurations import chosen
from layerdrop_fast.triton.device import (
    moments_with,
    norm_gradient,
    norm_sums,
    normalised,
    number,
    offsets,
    rows_at,
    sample_of,
    slot_of,
    tile_of,
    wide_norm_sums,
)
from layerdrop_fast.triton.launch import (
    Rows,
    arithmetic,
    bits,
    blocks,
    dense,
    jit,
    launch,
    per_row,
    scan_block,
    shape_of,
)


@jit
def gather_norm_fwd_kernel(
    p_x,  # [B, S, D]
    p_xhat,  # [K, S, D]
    p_rstd,  # [K, S]
    p_rows,  # [K] or None
    eps: tl.int64,  # bits
    positions,
    batch,
    D: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_sample = sample_of(p_rows, i_row, batch)
    m_position = m_position & (i_sample >= 0)
    o_row = rows_at(i_sample, positions, o_position)
    o_xhat_row = rows_at(i_row, positions, o_position)
    if D <= BLOCK_D:
        o_channel = tl.arange(0, BLOCK_D)
        m_channel = o_channel < D
        x = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_position[:, None] & m_channel[None, :], other=0.0)
        xhat, rstd = normalised(x.to(ACC), m_channel, number(eps, ACC), D, RMS)
        store_xhat(p_xhat, xhat, o_xhat_row, o_channel, o_position < positions, i_sample, D)
    else:
        mean = tl.zeros((ROWS,), ACC)
        squares = tl.zeros((ROWS,), ACC)
        for start in range(0, D, BLOCK_D):
            o_channel = start + tl.arange(0, BLOCK_D)
            m_channel = o_channel < D
            x = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_position[:, None] & m_channel[None, :], other=0.0)
            mean, squares = moments_with(mean, squares, x.to(ACC), m_channel, start, D, BLOCK_D, RMS)
        rstd = tl.rsqrt(squares / D + number(eps, ACC))
        for start in range(0, D, BLOCK_D):
            o_channel = start + tl.arange(0, BLOCK_D)
            x = tl.load(p_x + offsets(o_row, o_channel, D), mask=m_position[:, None] & (o_channel < D), other=0.0)
            xhat = (x.to(ACC) - mean[:, None]) * rstd[:, None]
            store_xhat(p_xhat, xhat, o_xhat_row, o_channel, o_position < positions, i_sample, D)
    rstd = tl.where(i_sample >= 0, rstd, 0.0)
    tl.store(p_rstd + o_xhat_row, rstd, mask=o_position < positions)


@triton.jit
def store_xhat(p_xhat, xhat, o_row, o_channel, m_row, i_sample, D: tl.constexpr):
    """0 for a spare row, whatever its statistics."""
    xhat = tl.where(i_sample >= 0, xhat, 0.0)
    tl.store(p_xhat + offsets(o_row, o_channel, D), xhat, mask=m_row[:, None] & (o_channel < D)[None, :])


@jit
def gather_norm_bwd_kernel(
    p_grad_xhat,  # [K, S, D]
    p_xhat,  # [K, S, D]
    p_rstd,  # [K, S]
    p_grad_x,  # [B, S, D]
    p_rows,  # [K] or None
    p_slots,  # [B] or None
    positions,
    num_rows,
    D: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    ACC: tl.constexpr,
):
    i_sample, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_slot = slot_of(p_rows, p_slots, num_rows, i_sample, BLOCK_SCAN)
    m_kept = m_position & (i_slot >= 0)
    o_row = rows_at(i_sample, positions, o_position)
    o_xhat_row = rows_at(i_slot, positions, o_position)
    rstd = tl.load(p_rstd + o_xhat_row, mask=m_kept, other=0.0)
    projection, mean = wide_norm_sums(p_grad_xhat, p_xhat, o_xhat_row, m_kept, D, BLOCK_D, RMS, ROWS, ACC)
    for start in range(0, D, BLOCK_D):
        o_channel = start + tl.arange(0, BLOCK_D)
        m_channel = o_channel < D
        m_tile = m_kept[:, None] & m_channel[None, :]
        g = tl.load(p_grad_xhat + offsets(o_xhat_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
        xhat = tl.load(p_xhat + offsets(o_xhat_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
        if D <= BLOCK_D:
            projection, mean = norm_sums(g, xhat, D, RMS)
        grad_x = norm_gradient(g, xhat, rstd, projection, mean)
        m_tile = m_position[:, None] & m_channel[None, :]
        tl.store(p_grad_x + offsets(o_row, o_channel, D), grad_x, mask=m_tile)


def gather_norm(x: Tensor, rows: Tensor | None, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    shape = shape_of("x", x)
    kept = Rows.of("rows", rows, None, x)
    xhat = x.new_empty(kept.number, *x.shape[1:])
    rstd = x.new_empty(kept.number, *x.shape[1:-1], dtype=accumulator(x.dtype))
    config = chosen("gather_norm", shape.channels, x.dtype, x.device).fit(shape.positions)
    launch(
        gather_norm_fwd_kernel,
        (kept.number * blocks(shape.positions, config),),
        config,
        x,
        p_x=x.contiguous(),
        p_xhat=xhat,
        p_rstd=rstd,
        p_rows=kept.rows,
        eps=bits(eps),
        positions=shape.positions,
        batch=shape.samples,
        D=shape.channels,
        RMS=rms,
        ACC=arithmetic(x),
    )
    return xhat, rstd


def gather_norm_bwd(
    grad_xhat: Tensor, xhat: Tensor, rstd: Tensor, rows: Tensor | None, batch_size: int, rms: bool
) -> Tensor:
    shape = shape_of("xhat", xhat)
    if batch_size < 0:
        raise RuntimeError(f"batch_size: expected B >= 0, got {batch_size}")
    kept = Rows.of("rows", rows, batch_size, xhat)
    grad_x = xhat.new_empty(batch_size, *xhat.shape[1:])
    config = chosen("gather_norm_bwd", shape.channels, xhat.dtype, xhat.device).fit(shape.positions)
    launch(
        gather_norm_bwd_kernel,
        (batch_size * blocks(shape.positions, config),),
        config,
        xhat,
        p_grad_xhat=dense("grad_xhat", grad_xhat, xhat, kept.number),
        p_xhat=dense("xhat", xhat, xhat, kept.number),
        p_rstd=per_row("rstd", rstd, xhat, kept.number),
        p_grad_x=grad_x,
        p_rows=kept.rows,
        p_slots=kept.slots,
        positions=shape.positions,
        num_rows=kept.number,
        D=shape.channels,
        RMS=rms,
        BLOCK_SCAN=scan_block(batch_size),
        ACC=arithmetic(xhat),
    )
    return grad_x
