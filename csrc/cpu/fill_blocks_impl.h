// Philox words of many consecutive elements; see row_kernels.h and row_kernels_impl.h.
#pragma once

namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS {
namespace {

#if LAYERDROP_REGISTER_BYTES == 16

void fill_blocks(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  for (int64_t i = 0; i < num_blocks; ++i) {
    const Philox4 words = random_block(key, site, first_block + static_cast<uint64_t>(i));
    __builtin_memcpy(out + 4 * i, words.x, sizeof(words.x));
  }
}

#else

// One word of a block in each 64-bit lane: the widening product reads the low 32 bits only, so that the high ones may
// hold anything until the words are packed at the end. GCC 12, left alone, spends three multiplications on each.
constexpr int64_t kBlockLanes = LAYERDROP_REGISTER_BYTES / 8;
typedef uint64_t BlockWords __attribute__((vector_size(LAYERDROP_REGISTER_BYTES)));
static_assert(kBlockGroup % kBlockLanes == 0, "a group of blocks is whole vectors");

struct TwoRegisters {
  BlockWords low, high;
};

#if LAYERDROP_REGISTER_BYTES == 64

constexpr BlockWords kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};

// With a full mask: GCC 12 takes the unmasked intrinsic for a read of uninitialised data (GCC bug 105593).
LAYERDROP_INLINE BlockWords multiply_low32(BlockWords a, BlockWords b) {
  return reinterpret_cast<BlockWords>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

LAYERDROP_INLINE TwoRegisters interleave(BlockWords a, BlockWords b) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i wide_a = reinterpret_cast<__m512i>(a), wide_b = reinterpret_cast<__m512i>(b);
  return {reinterpret_cast<BlockWords>(_mm512_permutex2var_epi64(wide_a, first, wide_b)),
          reinterpret_cast<BlockWords>(_mm512_permutex2var_epi64(wide_a, second, wide_b))};
}

#else

constexpr BlockWords kLaneNumbers = {0, 1, 2, 3};

LAYERDROP_INLINE BlockWords multiply_low32(BlockWords a, BlockWords b) {
  return reinterpret_cast<BlockWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

LAYERDROP_INLINE TwoRegisters interleave(BlockWords a, BlockWords b) {
  const __m256i wide_a = reinterpret_cast<__m256i>(a), wide_b = reinterpret_cast<__m256i>(b);
  const __m256i even = _mm256_unpacklo_epi64(wide_a, wide_b), odd = _mm256_unpackhi_epi64(wide_a, wide_b);
  return {reinterpret_cast<BlockWords>(_mm256_permute2x128_si256(even, odd, 0x20)),
          reinterpret_cast<BlockWords>(_mm256_permute2x128_si256(even, odd, 0x31))};
}

#endif

void fill_blocks(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  for (int64_t start = 0; start < num_blocks; start += kBlockLanes) {
    const BlockWords block = kLaneNumbers + (first_block + static_cast<uint64_t>(start));
    BlockWords x0 = block, x1 = (block >> 32) << 24 | site, x2 = BlockWords{} + key.x[2], x3 = BlockWords{} + key.x[3];
    uint32_t k0 = key.x[0], k1 = key.x[1];
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxBump0, k1 += kPhiloxBump1) {
      const BlockWords product0 = multiply_low32(x0, BlockWords{} + 0xD2511F53u);
      const BlockWords product1 = multiply_low32(x2, BlockWords{} + 0xCD9E8D57u);
      x0 = (product1 >> 32) ^ x1 ^ k0;
      x1 = product1;
      x2 = (product0 >> 32) ^ x3 ^ k1;
      x3 = product0;
    }
    const TwoRegisters words = interleave((x0 & 0xFFFFFFFFu) | x1 << 32, (x2 & 0xFFFFFFFFu) | x3 << 32);
    __builtin_memcpy(out + 4 * start, &words, sizeof(words));
  }
}

#endif

}  // namespace
}  // namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS
