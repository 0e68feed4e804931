"""act and act_bwd, the elementwise halves of act_linear, on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerdrop_fast.reference.act_linear import ACTIVATIONS
from layerdrop_fast.triton.configurations import chosen
from layerdrop_fast.triton.device import dropout, offsets, rows_at, sample_of, tile_of
from layerdrop_fast.triton.launch import (
    Shape,
    arithmetic,
    blocks,
    dense,
    dropout_arguments,
    jit,
    launch,
    numbering,
    shape_of,
)


@triton.jit
def normal_distribution(u):
    """The cumulative distribution, and exp(-u^2 / 2)."""
    bell = tl.exp(-0.5 * u * u)
    if u.dtype == tl.float64:
        cdf = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
    else:
        # bell * t * q(t) with t = 1 / (1 + 0.45 z) is erfc(z) / 2, with its digits in the tail too: the polynomial of
        # csrc/cpu/activations_impl.h, error 2^-24.
        t = 1.0 / (1.0 + 0.3181980515339464 * tl.abs(u))
        q = -0.02069547246 * t + 0.09534358872
        q = q * t - 0.1502906011
        q = q * t + 0.07119987338
        q = q * t - 0.01117863435
        q = q * t + 0.05997510884
        q = q * t + 0.08762608283
        q = q * t + 0.1141358192
        q = q * t + 0.1269415815
        q = q * t + 0.1269426604
        tail = bell * t * q
        cdf = tl.where(u < 0.0, tail, 1.0 - tail)
    return cdf, bell


@triton.jit
def sigmoid(x):
    """The logistic function, and 1 minus it with the digits that the difference would lose."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x > 0.0, larger, smaller), tl.where(x > 0.0, smaller, larger)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """The activation and its derivative; layerdrop_fast/reference/act_linear.py is the specification."""
    if ACTIVATION == "gelu":
        cdf, bell = normal_distribution(u)
        value = u * cdf
        slope = cdf + u * bell * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(w)) / 2 is the logistic function of 2w.
        square = u * u
        s, complement = sigmoid(1.5957691216057308 * (u + 0.044715 * square * u))
        value = u * s
        slope = s + u * s * complement * 1.5957691216057308 * (1.0 + 0.134145 * square)
    elif ACTIVATION == "relu":
        value = tl.where(u < 0.0, 0.0, u)
        slope = tl.where(u > 0.0, 1.0, 0.0).to(u.dtype)
    elif ACTIVATION == "identity":
        value = u
        slope = tl.full(u.shape, 1.0, u.dtype)
    else:
        s, complement = sigmoid(u)
        value = u * s
        slope = s * (1.0 + u * complement)
    return value, slope


@jit
def act_fwd_kernel(
    p_u,  # [K, S, D], swiglu [K, S, 2D]
    p_a,  # [K, S, D]
    p_rows,  # [K] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    positions,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_sample = sample_of(p_rows, i_row, 0x7FFFFFFF)
    o_row = rows_at(i_row, positions, o_position)
    start = tl.program_id(1) * BLOCK_D
    o_channel = start + tl.arange(0, BLOCK_D)
    m_tile = m_position[:, None] & (o_channel < D)[None, :]
    # A spare row reads nothing; the activation of 0 is 0.
    m_read = m_tile & (i_sample >= 0)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    o_u = offsets(o_row, o_channel, 2 * D if GATED else D)
    a, _ = activate(tl.load(p_u + o_u, mask=m_read, other=0.0).to(ACC), ACTIVATION)
    if GATED:
        a *= tl.load(p_u + o_u + D, mask=m_read, other=0.0).to(ACC)
    o_mask_row = rows_at(i_sample, positions, o_position)
    a = dropout(a, p_key, p_site, threshold, multiplier, o_mask_row, start, D, BLOCK_D, DROPOUT)
    tl.store(p_a + offsets(o_row, o_channel, D), a, mask=m_tile)


@jit
def act_bwd_kernel(
    p_u,  # [K, S, D], swiglu [K, S, 2D]
    p_grad_a,  # [K, S, D]
    p_grad_u,  # as p_u
    p_a,  # [K, S, D]
    p_rows,  # [K] or None
    p_key,  # [4] or None
    p_site,  # [] or None
    threshold: tl.int64,
    multiplier: tl.int64,  # bits
    positions,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row, o_position, m_position = tile_of(tl.program_id(0), positions, ROWS)
    i_sample = sample_of(p_rows, i_row, 0x7FFFFFFF)
    o_row = rows_at(i_row, positions, o_position)
    start = tl.program_id(1) * BLOCK_D
    o_channel = start + tl.arange(0, BLOCK_D)
    m_tile = m_position[:, None] & (o_channel < D)[None, :]
    m_read = m_tile & (i_sample >= 0)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    o_u = offsets(o_row, o_channel, 2 * D if GATED else D)
    o_a = offsets(o_row, o_channel, D)
    g = tl.load(p_grad_a + o_a, mask=m_read, other=0.0).to(ACC)
    a, slope = activate(tl.load(p_u + o_u, mask=m_read, other=0.0).to(ACC), ACTIVATION)
    o_mask_row = rows_at(i_sample, positions, o_position)
    if DROPOUT:
        # 1 / (1 - p) where the mask keeps, for both; a mask selects, since what is dropped may be infinite.
        ones = tl.full((ROWS, BLOCK_D), 1.0, ACC)
        factor = dropout(ones, p_key, p_site, threshold, multiplier, o_mask_row, start, D, BLOCK_D, DROPOUT)
        g = tl.where(factor > 0.0, g * factor, 0.0)
    if GATED:
        value = tl.load(p_u + o_u + D, mask=m_read, other=0.0).to(ACC)
        tl.store(p_grad_u + o_u, g * (slope * value), mask=m_tile)
        tl.store(p_grad_u + o_u + D, g * a, mask=m_tile)
        a *= value
    else:
        tl.store(p_grad_u + o_u, g * slope, mask=m_tile)
    if DROPOUT:
        a = tl.where(factor > 0.0, a * factor, 0.0)
    tl.store(p_a + o_a, a, mask=m_tile)


def _activated(u: Tensor, activation: str) -> tuple[Tensor, Shape]:
    """A new tensor for ``act(u)``, and its shape."""
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation}")
    shape = shape_of("u", u)
    if activation == "swiglu":
        if shape.channels % 2:
            raise RuntimeError(f"u: expected an even number of channels, got {shape.channels}")
        shape = shape._replace(channels=shape.channels // 2)
    return u.new_empty(*u.shape[:-1], shape.channels), shape


def act(
    u: Tensor, rows: Tensor | None, activation: str, dropout_p: float, key: Tensor | None, site: Tensor | None
) -> Tensor:
    a, shape = _activated(u, activation)
    config = chosen("act", shape.channels, u.dtype, u.device).fit(shape.positions)
    launch(
        act_fwd_kernel,
        (shape.samples * blocks(shape.positions, config), triton.cdiv(shape.channels, config.block_d)),
        config,
        u,
        p_u=u.contiguous(),
        p_a=a,
        p_rows=numbering(rows, u).rows,
        **dropout_arguments(dropout_p, key, site, u),
        positions=shape.positions,
        D=shape.channels,
        ACTIVATION=activation,
        ACC=arithmetic(u),
    )
    return a


def act_bwd(
    u: Tensor,
    grad_a: Tensor,
    rows: Tensor | None,
    activation: str,
    dropout_p: float,
    key: Tensor | None,
    site: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, shape = _activated(u, activation)
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    config = chosen("act_bwd", shape.channels, u.dtype, u.device).fit(shape.positions)
    launch(
        act_bwd_kernel,
        (shape.samples * blocks(shape.positions, config), triton.cdiv(shape.channels, config.block_d)),
        config,
        u,
        p_u=u.contiguous(),
        p_grad_a=dense("grad_a", grad_a, a, shape.samples),
        p_grad_u=grad_u,
        p_a=a,
        p_rows=numbering(rows, u).rows,
        **dropout_arguments(dropout_p, key, site, u),
        positions=shape.positions,
        D=shape.channels,
        ACTIVATION=activation,
        ACC=arithmetic(u),
    )
    return grad_u, a
