// The plan of a step, drawn by one block of threads for each group: no torch, no host.
//
// The functions take the block as an argument, so that threads of a processor can be one too (tests/csrc). A Block has
//   thread(), size()   this thread's number and how many there are, a multiple of 32, at most kMaxThreads
//   sync()             a barrier; what was written before it is seen after it by all threads of the block
//   ballot(flag)       the flags of this thread's 32, as bits; a barrier for these 32 at least
//   shared()           one Shared for all threads
#pragma once

#include <cstdint>

#include "../plan_rules.h"

#if defined(__CUDACC__)
#define LAYERDROP_DEVICE __device__ __forceinline__
#else
#define LAYERDROP_DEVICE inline
#endif

namespace layerdrop_fast {

constexpr int kWarp = 32, kMaxThreads = 1024;

// Groups, units and elements are as in planner.h; every tensor is contiguous. rows and slot hold what is not final yet
// while a group is being drawn, so that nothing else is allocated.
struct PlanTask {
  const int64_t* counters;  // [3]: seed, step, stream
  const double* rates;      // [L] drop rates; threshold_of says what becomes of one beyond [0, 1]
  int64_t num_groups;       // 1, or L
  int64_t group_size;       // L, or B; below 2^31
  bool over_layers;         // batch granularity: one group of L layers, B = 1
  bool systematic;
  int64_t min_kept;  // of a group
  bool* keep;        // [L, B]
  int32_t* rows;     // [L, B]
  int32_t* slot;     // [L, B]
  int64_t* kept;     // [L]
};

// The threads for a group: one a unit, as far as there are.
LAYERDROP_INLINE int block_size(int64_t group_size) {
  const int64_t warps = (group_size + kWarp - 1) / kWarp;
  return static_cast<int>(warps < kMaxThreads / kWarp ? warps : kMaxThreads / kWarp) * kWarp;
}

struct Shared {
  uint64_t keys[kMaxThreads], thresholds[kMaxThreads];
  int32_t warp_counts[kMaxThreads / kWarp];
};

LAYERDROP_DEVICE int popcount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Among the threads of a block.
struct Count {
  int32_t before;  // threads before this one whose flag is set
  int32_t total;   // threads whose flag is set
};
template <typename Block>
LAYERDROP_DEVICE Count count_flags(Block& block, bool flag) {
  const int warp = block.thread() / kWarp, lane = block.thread() % kWarp;
  const uint32_t flags = block.ballot(flag);
  block.sync();  // the last counts have been read
  if (lane == 0) block.shared().warp_counts[warp] = popcount(flags);
  block.sync();
  Count count = {popcount(flags & ((uint32_t{1} << lane) - 1)), 0};
  for (int other = 0; other < block.size() / kWarp; ++other) {
    const int32_t here = block.shared().warp_counts[other];
    if (other < warp) count.before += here;
    count.total += here;
  }
  return count;
}

template <typename Block>
class GroupPlanner {
 public:
  LAYERDROP_DEVICE GroupPlanner(const PlanTask& task, int64_t group, Block& block)
      : task_(task),
        group_(group),
        first_(group * task.group_size),
        block_(block),
        key_(step_key(static_cast<uint64_t>(task.counters[0]),
                      static_cast<uint64_t>(task.counters[1]),
                      static_cast<uint64_t>(task.counters[2]))) {}

  LAYERDROP_DEVICE void draw() {
    if (task_.systematic) {
      systematic();
    } else {
      bernoulli();
    }
    if (task_.min_kept > 0) top_up();
    if (task_.over_layers) {
      copy();
    } else {
      compact();
    }
  }

 private:
  // Units are dealt to threads in turn, and a unit's elements are its thread's until compact() writes rows by place.
  // All threads make all turns, since they meet in them.
  template <typename Turn>
  LAYERDROP_DEVICE void each_turn(const Turn& turn) {
    for (int64_t first = 0; first < task_.group_size; first += block_.size()) {
      const int64_t unit = first + block_.thread();
      turn(unit, unit < task_.group_size);
    }
  }

  LAYERDROP_DEVICE uint64_t threshold(int64_t unit) const {
    return threshold_of(task_.rates[task_.over_layers ? unit : group_]);
  }
  LAYERDROP_DEVICE uint32_t word(uint32_t site, int64_t unit) const {
    return unit_word(key_, site, static_cast<uint64_t>(first_ + unit));
  }
  // A dropped unit waits with its priority in slot.
  LAYERDROP_DEVICE void decide(int64_t unit, bool keep, uint32_t priority) {
    task_.keep[first_ + unit] = keep;
    task_.slot[first_ + unit] = static_cast<int32_t>(priority);
  }

  LAYERDROP_DEVICE void bernoulli() {
    each_turn([&](int64_t unit, bool inside) {
      if (!inside) return;
      const uint32_t random = word(kSiteKeep, unit);
      const uint64_t t = threshold(unit);
      decide(unit, is_kept(random, t), dropped_priority(random, t));
    });
  }

  struct Place {
    uint32_t place;  // units of the group that come before
    uint64_t end;    // the sum of their thresholds and of the unit's own
  };

  // Where a unit stands in the order of keys. There is no sort: each unit counts those before it, so that the work is
  // quadratic in the size of a group, but no thread waits for another within a tile. tile_key(unit) and
  // tile_threshold(unit) are asked of the unit's own thread.
  template <typename TileKey, typename TileThreshold>
  LAYERDROP_DEVICE Place place_of(uint64_t own, const TileKey& tile_key, const TileThreshold& tile_threshold) {
    Shared& shared = block_.shared();
    Place result = {0, 0};
    for (int64_t tile = 0; tile < task_.group_size; tile += block_.size()) {
      const int64_t unit = tile + block_.thread();
      block_.sync();  // the last tile has been read
      if (unit < task_.group_size) {
        shared.keys[block_.thread()] = tile_key(unit);
        shared.thresholds[block_.thread()] = tile_threshold(unit);
      }
      block_.sync();
      const int64_t left = task_.group_size - tile;
      const int count = left < block_.size() ? static_cast<int>(left) : block_.size();
      for (int i = 0; i < count; ++i) {
        const uint64_t other = shared.keys[i];
        if (other < own) ++result.place;
        if (other <= own) result.end += shared.thresholds[i];
      }
    }
    return result;
  }

  LAYERDROP_DEVICE void systematic() {
    const uint32_t start = unit_word(key_, kSiteStart, static_cast<uint64_t>(group_));
    const auto tile_key = [&](int64_t unit) {
      return order_key(word(kSitePermutation, unit), static_cast<uint32_t>(unit));
    };
    const auto tile_threshold = [&](int64_t unit) { return threshold(unit); };
    each_turn([&](int64_t unit, bool inside) {
      const Place at = place_of(inside ? tile_key(unit) : 0, tile_key, tile_threshold);
      if (inside) decide(unit, is_hit(at.end, threshold(unit), start), at.place);
    });
  }

  // Keeps dropped units that come first until min_kept are kept. rows marks them, since the others still count by keep.
  LAYERDROP_DEVICE void top_up() {
    int64_t missing = task_.min_kept;
    each_turn(
        [&](int64_t unit, bool inside) { missing -= count_flags(block_, inside && task_.keep[first_ + unit]).total; });
    if (missing <= 0) return;
    // What is kept comes after all that is dropped, which is at least what is missing.
    const auto tile_key = [&](int64_t unit) {
      const int64_t element = first_ + unit;
      return task_.keep[element] ? ~uint64_t{0}
                                 : order_key(static_cast<uint32_t>(task_.slot[element]), static_cast<uint32_t>(unit));
    };
    const auto no_threshold = [](int64_t) { return uint64_t{0}; };
    each_turn([&](int64_t unit, bool inside) {
      const Place at = place_of(inside ? tile_key(unit) : 0, tile_key, no_threshold);
      if (inside) task_.rows[first_ + unit] = at.place < missing;
    });
    each_turn([&](int64_t unit, bool inside) {
      if (inside && task_.rows[first_ + unit]) task_.keep[first_ + unit] = true;
    });
  }

  // Batch granularity: every layer has a row and a count of its own.
  LAYERDROP_DEVICE void copy() {
    each_turn([&](int64_t unit, bool inside) {
      if (!inside) return;
      const bool keep = task_.keep[unit];
      task_.rows[unit] = task_.slot[unit] = keep ? 0 : -1;
      task_.kept[unit] = keep;
    });
  }

  LAYERDROP_DEVICE void compact() {
    int32_t* rows = task_.rows + first_;
    int32_t before = 0;
    // A place is at most the unit's own, and count_flags is a barrier: no mark of top_up is still to be read there.
    each_turn([&](int64_t unit, bool inside) {
      const bool keep = inside && task_.keep[first_ + unit];
      const Count count = count_flags(block_, keep);
      if (keep) rows[before + count.before] = static_cast<int32_t>(unit);
      if (inside) task_.slot[first_ + unit] = keep ? before + count.before : -1;
      before += count.total;
    });
    for (int64_t place = before + block_.thread(); place < task_.group_size; place += block_.size()) rows[place] = -1;
    if (block_.thread() == 0) task_.kept[group_] = before;
  }

  const PlanTask& task_;
  const int64_t group_, first_;
  Block& block_;
  const Philox4 key_;
};

}  // namespace layerdrop_fast
