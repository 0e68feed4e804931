"""Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the counter layout.

One step has one key, ``K[0..3] = Philox(key=seed, counter=(step, stream))``. Every decision and every mask element
of that step is one lane of ``Philox(key=(K0, K1), counter=(block_lo, block_hi8 << 24 | site, K2, K3))``, where element
``e`` stands in lane ``e % 4`` of block ``e // 4`` and ``site`` (24 bits) says what is being drawn. Philox with a fixed
key is a bijection and site and block have bits of their own, so no counter repeats within a step, and the same
integers give the same bits on every backend.

Unsigned 32-bit words live in int64 tensors; the wrapped 64-bit product holds the exact low and high words.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF

# Sites 0 to 255 belong to the plan; dropout sites start at FIRST_DROPOUT_SITE.
SITE_KEEP = 0  # Bernoulli decisions, element l * B + b
SITE_PERMUTATION = 1  # sort keys of systematic sampling, element l * B + b
SITE_START = 2  # starts of systematic sampling, element l (batch granularity: element 0)
FIRST_DROPOUT_SITE = 256
NUM_SITES = 1 << 24

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(key: tuple[Tensor, Tensor], counter: Words) -> Words:
    """Ten rounds of Philox4x32; every word is an int64 tensor in [0, 2**32), broadcast against the others."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def step_key(counters: Tensor) -> Tensor:
    """The key of a step.

    Shapes:
        counters: int64 [3], the 64 bits of (seed, step, stream); -> int32 [4], the bits of K[0..3]
    """
    low, high = counters & MASK32, (counters >> 32) & MASK32
    words = philox4x32((low[0], high[0]), (low[1], high[1], low[2], high[2]))
    return torch.stack(words).to(torch.int32)  # keeps the low 32 bits


def random_bits(key: Tensor, site: Tensor, element: Tensor) -> Tensor:
    """One u32 an element.

    Shapes:
        key: int32 [4]; site: int32 [], in [0, 2**24); element: int64 [...], in [0, 2**42)
        -> int64 [...], uniform in [0, 2**32)
    """
    k0, k1, k2, k3 = (key.to(torch.int64) & MASK32).unbind()
    block = element >> 2
    counter = (block & MASK32, ((block >> 32) << 24) | site.to(torch.int64), k2, k3)
    words = philox4x32((k0, k1), counter)  # k2 and k3 only enter mixed with the block: all words have its shape
    lanes = torch.stack(words, dim=-1)
    return lanes.gather(-1, (element & 3).unsqueeze(-1)).squeeze(-1)
