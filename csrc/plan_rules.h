// The rules of a plan, one unit at a time, for host and device: planner.cpp and cuda/draw_plan.cuh differ only in how
// they go through the units of a group. layerdrop_fast/reference/draw_plan.py is the specification.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace layerdrop_fast {

constexpr uint64_t kOne = uint64_t{1} << 32;  // 1 as a fixed-point number

// t in [0, 2^32]: what is left of 1 above a drop rate, as a fixed-point number; halves go to even, as in Python and
// torch. A rate beyond [0, 1] counts as the nearer end and NaN as 1, for where nobody can be told.
LAYERDROP_INLINE uint64_t threshold_of(double rate) {
  if (!(rate <= 1.0)) return 0;
  if (rate < 0.0) return kOne;
  const double density = (1.0 - rate) * static_cast<double>(kOne);
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double2ll_rn(density));
#else
  return static_cast<uint64_t>(std::llrint(density));
#endif
}

// The random word of one unit. Units are numbered through all groups.
LAYERDROP_INLINE uint32_t unit_word(const Philox4& key, uint32_t site, uint64_t unit) {
  const Philox4 words = random_block(key, site, unit / 4);
  // An index that is not constant would put the words into a GPU's local memory.
  const uint32_t even = unit & 2 ? words.x[2] : words.x[0], odd = unit & 2 ? words.x[3] : words.x[1];
  return unit & 1 ? odd : even;
}

// Where units are ordered, it is by a word and, where words are equal, by index (below 2^32).
LAYERDROP_INLINE uint64_t order_key(uint32_t word, uint32_t unit) {
  return uint64_t{word} << 32 | unit;
}

// Bernoulli: each unit alone.
LAYERDROP_INLINE bool is_kept(uint32_t word, uint64_t threshold) {
  return word < threshold;
}

// Systematic sampling (Madow 1949): units lie end to end in the order of their words, each as long as its threshold.
// One is kept where a comb with teeth at start, start + 2^32, ... hits it. `end` is the sum of the thresholds up to and
// including the unit's own; it fits, as there are fewer than 2^31 units.
LAYERDROP_INLINE uint64_t teeth_before(uint64_t end, uint32_t start) {
  return (end + (kOne - 1) - start) >> 32;
}
LAYERDROP_INLINE bool is_hit(uint64_t end, uint64_t threshold, uint32_t start) {
  return teeth_before(end, start) > teeth_before(end - threshold, start);
}

// Where fewer than min_kept are kept, dropped units are kept too, in the order of their priorities. Bernoulli: how far
// a unit was from being kept. Systematic: its place in the order of the words.
LAYERDROP_INLINE uint32_t dropped_priority(uint32_t word, uint64_t threshold) {
  return static_cast<uint32_t>(word - threshold);
}

}  // namespace layerdrop_fast
