"""norm_linear_bwd on a GPU: gradients of the weight and the norm's affine in one pass over the product.

The sums over outputs have two stages and no atomics: a program sums a part of the outputs, then the parts are summed.
The parts depend on the shape alone, so that the bits do not depend on the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.triton.configurations import chosen
from layerdrop_fast.triton.device import offsets, rounded
from layerdrop_fast.triton.launch import arithmetic, check_vector, dense, jit, launch

# Outputs that one program sums.
PART = 64


@jit
def norm_linear_bwd_kernel(
    p_product,  # [O, D]
    p_total,  # [O] or None
    p_weight,  # [O, D]
    p_gamma,  # [D] or None
    p_beta,  # [D] or None
    p_grad_weight,  # [O, D]
    p_gamma_parts,  # [O / PART, D]
    p_beta_parts,  # [O / PART, D] or None
    outputs,  # O
    D: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_part = tl.program_id(0)
    o_channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_channel = o_channel < D
    gamma_sums = tl.zeros((ROWS, BLOCK_D), ACC)
    beta_sums = tl.zeros((ROWS, BLOCK_D), ACC)
    for start in range(0, PART, ROWS):
        o_row = start + tl.arange(0, ROWS)
        o_output = i_part * PART + o_row
        m_output = (o_row < PART) & (o_output < outputs)
        o_tile = offsets(o_output.to(tl.int64), o_channel, D)
        m_tile = m_output[:, None] & m_channel[None, :]
        product = tl.load(p_product + o_tile, mask=m_tile, other=0.0).to(ACC)
        weight = tl.load(p_weight + o_tile, mask=m_tile, other=0.0).to(ACC)
        grad_weight = product
        if p_gamma is not None:
            gamma = tl.load(p_gamma + o_channel, mask=m_channel, other=0.0).to(ACC)
            grad_weight = product * gamma[None, :]
        if p_total is not None:
            total = tl.load(p_total + o_output, mask=m_output, other=0.0)
            beta_sums += total[:, None] * weight
            if p_beta is not None:
                beta = tl.load(p_beta + o_channel, mask=m_channel, other=0.0).to(ACC)
                grad_weight += total[:, None] * beta[None, :]
        gamma_sums += weight * product
        tl.store(p_grad_weight + o_tile, rounded(grad_weight, p_grad_weight), mask=m_tile)
    o_part = i_part.to(tl.int64) * D + o_channel
    tl.store(p_gamma_parts + o_part, tl.sum(gamma_sums, 0), mask=m_channel)
    if p_beta_parts is not None:
        tl.store(p_beta_parts + o_part, tl.sum(beta_sums, 0), mask=m_channel)


def norm_linear_bwd(
    product: Tensor, total: Tensor | None, weight: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, channels = weight.shape
    if beta is not None and total is None:
        raise RuntimeError("total: expected the sum of g where there is beta, got None")
    wide = accumulator(product.dtype)
    parts = triton.cdiv(outputs, PART)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    gamma_parts, beta_parts = (product.new_empty(parts, channels, dtype=wide) for _ in range(2))
    config = chosen("norm_linear_bwd", channels, product.dtype, product.device)
    launch(
        norm_linear_bwd_kernel,
        (parts, triton.cdiv(channels, config.block_d)),
        config,
        product,
        p_product=dense("product", product, weight, outputs),
        p_total=None if total is None else check_vector("total", total, weight, outputs, wide),
        p_weight=weight.contiguous(),
        p_gamma=None if gamma is None else check_vector("gamma", gamma, weight, channels),
        p_beta=None if beta is None else check_vector("beta", beta, weight, channels),
        p_grad_weight=grad_weight,
        p_gamma_parts=gamma_parts,
        p_beta_parts=None if total is None else beta_parts,
        outputs=outputs,
        D=channels,
        PART=PART,
        ACC=arithmetic(product),
    )
    grad_beta = product.new_zeros(channels, dtype=wide) if total is None else beta_parts.sum(0)
    return grad_weight, gamma_parts.sum(0), grad_beta
