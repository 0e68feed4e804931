// Philox4x32-10 (Salmon et al., SC 2011) and the counter layout, for host and device.
//
// One step has one key, K[0..3] = Philox(key = seed, counter = (step, stream)). Every decision and every mask element
// of that step is one lane of Philox(key = (K0, K1), counter = (block_lo, block_hi8 << 24 | site, K2, K3)): element e
// is lane e % 4 of block e / 4. layerdrop_fast/reference/philox.py is the specification.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LAYERDROP_INLINE __host__ __device__ __forceinline__
#else
#define LAYERDROP_INLINE inline __attribute__((always_inline))
#endif

namespace layerdrop_fast {

// What is being drawn. Sites 0 to 255 belong to the plan, the others to dropout.
constexpr uint32_t kSiteKeep = 0;         // Bernoulli decisions, element l * B + b
constexpr uint32_t kSitePermutation = 1;  // sort keys of systematic sampling, element l * B + b
constexpr uint32_t kSiteStart = 2;        // starts of systematic sampling, element l (batch granularity: element 0)

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxBump0 = 0x9E3779B9u, kPhiloxBump1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t x[4];
};

LAYERDROP_INLINE void philox_round(Philox4& c, uint32_t k0, uint32_t k1) {
  const uint64_t product0 = uint64_t{c.x[0]} * 0xD2511F53u;
  const uint64_t product1 = uint64_t{c.x[2]} * 0xCD9E8D57u;
  c = {{static_cast<uint32_t>(product1 >> 32) ^ c.x[1] ^ k0,
        static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ c.x[3] ^ k1,
        static_cast<uint32_t>(product0)}};
}

LAYERDROP_INLINE Philox4 philox4x32(Philox4 counter, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(counter, k0, k1);
    k0 += kPhiloxBump0;
    k1 += kPhiloxBump1;
  }
  return counter;
}

// K[0..3] of a step.
LAYERDROP_INLINE Philox4 step_key(uint64_t seed, uint64_t step, uint64_t stream) {
  const Philox4 counter = {{static_cast<uint32_t>(step),
                            static_cast<uint32_t>(step >> 32),
                            static_cast<uint32_t>(stream),
                            static_cast<uint32_t>(stream >> 32)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Past 2^64 - 1 comes 0.
LAYERDROP_INLINE int64_t next_step(int64_t step) {
  return static_cast<int64_t>(static_cast<uint64_t>(step) + 1);
}

// The four u32 of elements 4 * block to 4 * block + 3. site < 2^24, block < 2^40.
LAYERDROP_INLINE Philox4 random_block(const Philox4& key, uint32_t site, uint64_t block) {
  const uint32_t block_hi = static_cast<uint32_t>(block >> 32);
  return philox4x32({{static_cast<uint32_t>(block), block_hi << 24 | site, key.x[2], key.x[3]}}, key.x[0], key.x[1]);
}

}  // namespace layerdrop_fast
