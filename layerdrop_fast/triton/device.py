"""What the kernels share: rows of samples, dropout masks, normalised rows.

A program works on a tile: ROWS positions of one sample times BLOCK_D channels. ``o_row`` int64 [ROWS] numbers rows of
channels, ``o_channel`` [BLOCK_D] channels; tensors are contiguous, so that D, a constant, is their only stride. ``ACC``
is the dtype of arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def number(bits, ACC: tl.constexpr):
    """A float64 argument: Triton takes Python's floats as float32, so their bits come as an integer."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def tile_of(i_block, positions, ROWS: tl.constexpr):
    """The sample (or the place among the kept ones) of a program, its positions, and which of them exist."""
    blocks = tl.cdiv(positions, ROWS)
    o_position = i_block % blocks * ROWS + tl.arange(0, ROWS)
    return i_block // blocks, o_position, o_position < positions


@triton.jit
def rows_at(i_sample, positions, o_position):
    """The numbers of a sample's rows of channels, int64."""
    return tl.cast(i_sample, tl.int64) * positions + o_position


@triton.jit
def slot_of(p_rows, p_slots, num_rows, i_sample, BLOCK_SCAN: tl.constexpr):
    """A sample's place among ``rows``, or -1. No rows: every sample, in order. Wrong rows lead to no other place."""
    if p_rows is None:
        slot = i_sample
    elif p_slots is not None:
        slot = tl.load(p_slots + i_sample)
    else:
        o_slot = tl.arange(0, BLOCK_SCAN)
        found = tl.full((BLOCK_SCAN,), -1, tl.int32)
        for start in range(0, num_rows, BLOCK_SCAN):
            row = tl.load(p_rows + start + o_slot, mask=start + o_slot < num_rows, other=-1)
            found = tl.where(row == i_sample, start + o_slot, found)
        slot = tl.max(found, 0)
    return slot


@triton.jit
def sample_of(p_rows, i_row, batch):
    """The sample of a place among the kept ones, or -1 for a spare row, as what lies outside the batch is too."""
    sample = i_row
    if p_rows is not None:
        sample = tl.load(p_rows + i_row)
        sample = tl.where((sample >= 0) & (sample < batch), sample, -1)
    return sample


@triton.jit
def offsets(o_row, o_channel, D: tl.constexpr):
    return o_row[:, None] * D + o_channel[None, :]


@triton.jit
def clear_spare_rows(
    p_out, p_rstd, p_rows, num_rows, i_sample, batch, positions, o_position, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Zeros in the place of spare rows: a sample's programs clear every batch-th one."""
    if p_rows is not None:
        for i_slot in range(i_sample, num_rows, batch):
            if sample_of(p_rows, i_slot, batch) < 0:
                o_row = rows_at(i_slot, positions, o_position)
                m_row = o_position < positions
                if p_rstd is not None:
                    tl.store(p_rstd + o_row, tl.zeros_like(o_row), mask=m_row)
                for start in range(0, D, BLOCK_D):
                    o_channel = start + tl.arange(0, BLOCK_D)
                    o_tile = offsets(o_row, o_channel, D)
                    tl.store(p_out + o_tile, tl.zeros_like(o_tile), mask=m_row[:, None] & (o_channel < D)[None, :])


@triton.jit
def random_words(p_key, p_site, o_block):
    """The four words of each Philox block; layerdrop_fast/reference/philox.py is the specification."""
    k0 = tl.load(p_key).to(tl.uint32, bitcast=True)
    k1 = tl.load(p_key + 1).to(tl.uint32, bitcast=True)
    c2 = tl.load(p_key + 2)
    c3 = tl.load(p_key + 3)
    seed = (k1.to(tl.uint64) << 32) | k0.to(tl.uint64)
    c0 = o_block.to(tl.uint32)
    c1 = ((o_block >> 32) << 24).to(tl.uint32) | tl.load(p_site).to(tl.uint32, bitcast=True)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def mask_words(p_key, p_site, o_row, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The word of each element of a tile that begins at channel ``start``, a multiple of 4."""
    # Element e is lane e % 4 of block e / 4.
    if D % 4 == 0:
        o_quad = start // 4 + tl.arange(0, BLOCK_D // 4)
        w0, w1, w2, w3 = random_words(p_key, p_site, o_row[:, None] * (D // 4) + o_quad[None, :])
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (o_row.shape[0], BLOCK_D))
    else:
        element = offsets(o_row, start + tl.arange(0, BLOCK_D), D)
        w0, w1, w2, w3 = random_words(p_key, p_site, element >> 2)
        lane = element & 3
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return words


@triton.jit
def dropout(
    values,
    p_key,
    p_site,
    threshold,
    multiplier,
    o_row,
    start,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """``values / (1 - p)`` where the mask keeps, 0 elsewhere. The threshold lies in [0, 2^32]."""
    if DROPOUT:
        # Two comparisons of 32 bits, one of them a scalar's, instead of one of 64 bits.
        words = mask_words(p_key, p_site, o_row, start, D, BLOCK_D)
        keep = (words <= (threshold - 1).to(tl.uint32)) & (threshold > 0)
        values = tl.where(keep, values * number(multiplier, values.dtype), 0.0)
    return values


@triton.jit
def rounded(values, p_out):
    """In the dtype of what they are stored in; from float64 to 16 bits through float32, as torch rounds."""
    dtype = p_out.dtype.element_ty
    if dtype.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def scaled(values, p_scale):
    """``scale * values``; no scale is 1."""
    if p_scale is not None:
        values = values * tl.load(p_scale)
    return values


@triton.jit
def normalised(x, m_channel, eps, D: tl.constexpr, RMS: tl.constexpr):
    """xhat and rstd of whole rows, 0 where a channel does not exist."""
    if not RMS:
        x = tl.where(m_channel[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    return x * rstd[:, None], rstd


@triton.jit
def moments_with(mean, squares, x, m_channel, start, D: tl.constexpr, BLOCK_D: tl.constexpr, RMS: tl.constexpr):
    """Mean and sum of squared deviations of ``start`` channels, and of a tile of further ones (Chan et al. 1979)."""
    if RMS:
        squares += tl.sum(x * x, 1)
    else:
        count = tl.minimum(D - start, BLOCK_D).to(x.dtype)
        tile_mean = tl.sum(x, 1) / count
        centred = tl.where(m_channel[None, :], x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = count / (start + count)
        squares += tl.sum(centred * centred, 1) + delta * delta * (start * share)
        mean += delta * share
    return mean, squares


@triton.jit
def norm_sums(g, xhat, D: tl.constexpr, RMS: tl.constexpr):
    """What the gradient of a normalised row subtracts: mean(g * xhat), and mean(g) unless RMSNorm."""
    projection = tl.sum(g * xhat, 1) / D
    mean = tl.zeros_like(projection)
    if not RMS:
        mean += tl.sum(g, 1) / D
    return projection, mean


@triton.jit
def wide_norm_sums(
    p_g,
    p_xhat,
    o_row,
    m_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``norm_sums`` of rows that registers do not hold; 0 for narrower ones, whose sums are taken where they are."""
    projection = tl.zeros((ROWS,), ACC)
    mean = tl.zeros((ROWS,), ACC)
    if D > BLOCK_D:
        for start in range(0, D, BLOCK_D):
            o_channel = start + tl.arange(0, BLOCK_D)
            m_tile = m_row[:, None] & (o_channel < D)[None, :]
            g = tl.load(p_g + offsets(o_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
            xhat = tl.load(p_xhat + offsets(o_row, o_channel, D), mask=m_tile, other=0.0).to(ACC)
            more_projection, more_mean = norm_sums(g, xhat, D, RMS)
            projection += more_projection
            mean += more_mean
    return projection, mean


@triton.jit
def norm_gradient(g, xhat, rstd, projection, mean):
    """``rstd * (g - xhat * mean(g * xhat) - mean(g))``."""
    return (g - xhat * projection[:, None] - mean[:, None]) * rstd[:, None]
