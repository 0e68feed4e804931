#include "philox_wide.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace layerdrop_fast {
namespace {

void fill_blocks_scalar(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  for (int64_t i = 0; i < num_blocks; ++i) {
    const Philox4 words = random_block(key, site, first_block + static_cast<uint64_t>(i));
    std::memcpy(out + 4 * i, words.x, sizeof(words.x));
  }
}

#if defined(__x86_64__)

// One word of a block in each 64-bit lane: the widening product reads the low 32 bits only, so that the high ones may
// hold anything until the words are packed at the end. GCC 12, left alone, spends three multiplications on each.
#define LAYERDROP_WIDE_ROUNDS(VECTOR, MULTIPLY)                                                           \
  const VECTOR block = lanes + (first_block + static_cast<uint64_t>(start));                              \
  VECTOR x0 = block, x1 = (block >> 32) << 24 | site, x2 = VECTOR{} + key.x[2], x3 = VECTOR{} + key.x[3]; \
  uint32_t k0 = key.x[0], k1 = key.x[1];                                                                  \
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxBump0, k1 += kPhiloxBump1) {           \
    const VECTOR product0 = MULTIPLY(x0, VECTOR{} + 0xD2511F53u);                                         \
    const VECTOR product1 = MULTIPLY(x2, VECTOR{} + 0xCD9E8D57u);                                         \
    x0 = (product1 >> 32) ^ x1 ^ k0;                                                                      \
    x1 = product1;                                                                                        \
    x2 = (product0 >> 32) ^ x3 ^ k1;                                                                      \
    x3 = product0;                                                                                        \
  }                                                                                                       \
  const VECTOR words01 = (x0 & 0xFFFFFFFFu) | x1 << 32, words23 = (x2 & 0xFFFFFFFFu) | x3 << 32

using Vector4 = uint64_t __attribute__((vector_size(32)));
using Vector8 = uint64_t __attribute__((vector_size(64)));

__attribute__((target("avx2"))) inline Vector4 multiply4(Vector4 a, Vector4 b) {
  return reinterpret_cast<Vector4>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

// With a full mask: GCC 12 takes the unmasked intrinsic for a read of uninitialised data (GCC bug 105593).
__attribute__((target("avx512f"))) inline Vector8 multiply8(Vector8 a, Vector8 b) {
  return reinterpret_cast<Vector8>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

__attribute__((target("avx2"))) void fill_blocks_avx2(
    const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  const Vector4 lanes = {0, 1, 2, 3};
  for (int64_t start = 0; start < num_blocks; start += 4) {
    LAYERDROP_WIDE_ROUNDS(Vector4, multiply4);
    const __m256i a = reinterpret_cast<__m256i>(words01), b = reinterpret_cast<__m256i>(words23);
    const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    const __m256i halves[2] = {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
    std::memcpy(out + 4 * start, halves, sizeof(halves));
  }
}

__attribute__((target("avx512f"))) void fill_blocks_avx512(
    const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  const Vector8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t start = 0; start < num_blocks; start += 8) {
    LAYERDROP_WIDE_ROUNDS(Vector8, multiply8);
    const __m512i a = reinterpret_cast<__m512i>(words01), b = reinterpret_cast<__m512i>(words23);
    const __m512i halves[2] = {_mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b),
                               _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b)};
    std::memcpy(out + 4 * start, halves, sizeof(halves));
  }
}

#endif

std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) found.push_back({"avx512", fill_blocks_avx512});
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", fill_blocks_avx2});
#endif
  found.push_back({"scalar", fill_blocks_scalar});
  return found;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> found = find_instruction_sets();
  return found;
}

}  // namespace layerdrop_fast
