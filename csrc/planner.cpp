#include "planner.h"

#include <algorithm>
#include <vector>

#include "cpu/instruction_sets.h"
#include "plan_rules.h"

namespace layerdrop_fast {
namespace {

constexpr int64_t kChunk = 2048;  // elements; 8 KiB of random words stay in the first-level cache

// The random words of a site, by element.
class SiteWords {
 public:
  SiteWords(const Philox4& key, uint32_t site) : key_(key), site_(site) {}

  // The word of one element.
  uint32_t at(uint64_t element) const { return unit_word(key_, site_, element); }

  // The words of elements first .. first + count, valid until the next call.
  const uint32_t* range(uint64_t first, int64_t count) {
    const int64_t skipped = static_cast<int64_t>(first % 4);
    const int64_t groups = (skipped + count + 4 * kBlockGroup - 1) / (4 * kBlockGroup);
    buffer_.resize(static_cast<size_t>(groups * kBlockGroup * 4));
    instruction_set().fill_blocks(key_, site_, first / 4, groups * kBlockGroup, buffer_.data());
    return buffer_.data() + skipped;
  }

 private:
  Philox4 key_;
  uint32_t site_;
  std::vector<uint32_t> buffer_;
};

class Planner {
 public:
  Planner(const PlanRequest& request, bool* keep)
      : request_(request),
        keep_(keep),
        key_(step_key(request.seed, request.step, request.stream)),
        num_groups_(request.over_layers ? 1 : request.num_layers),
        group_size_(request.over_layers ? request.num_layers : request.batch_size) {}

  bool draw() {
    thresholds_.reserve(request_.num_layers);
    for (int64_t l = 0; l < request_.num_layers; ++l) {
      const double rate = request_.rates[l];
      if (!(rate >= 0.0 && rate <= 1.0)) return false;
      thresholds_.push_back(threshold_of(rate));
    }
    if (request_.systematic) {
      systematic();
    } else {
      bernoulli();
      for (int64_t group = 0; request_.min_kept > 0 && group < num_groups_; ++group) top_up_bernoulli(group);
    }
    return true;
  }

 private:
  // t in [0, 2^32]: a unit's threshold, rho as a fixed-point number.
  uint64_t threshold(int64_t group, int64_t unit) const { return thresholds_[request_.over_layers ? unit : group]; }

  void bernoulli() {
    SiteWords site(key_, kSiteKeep);
    const int64_t batch = request_.batch_size, total = request_.num_layers * batch;
    for (int64_t first = 0; first < total; first += kChunk) {
      const int64_t count = std::min(kChunk, total - first);
      const uint32_t* words = site.range(static_cast<uint64_t>(first), count);
      for (int64_t done = 0; done < count;) {
        const int64_t layer = (first + done) / batch;
        const int64_t here = std::min(count - done, (layer + 1) * batch - first - done);
        const uint64_t t = thresholds_[layer];
        bool* keep = keep_ + first + done;
        for (int64_t i = 0; i < here; ++i) keep[i] = is_kept(words[done + i], t);
        done += here;
      }
    }
  }

  void top_up_bernoulli(int64_t group) {
    const SiteWords site(key_, kSiteKeep);
    top_up(keep_ + group * group_size_, [&](int64_t unit) {
      return dropped_priority(site.at(static_cast<uint64_t>(group * group_size_ + unit)), threshold(group, unit));
    });
  }

  void systematic() {
    SiteWords sort_keys(key_, kSitePermutation), starts(key_, kSiteStart);
    std::vector<uint64_t> order(group_size_);
    std::vector<uint32_t> place(group_size_);
    for (int64_t group = 0; group < num_groups_; ++group) {
      const uint32_t* words = sort_keys.range(static_cast<uint64_t>(group * group_size_), group_size_);
      for (int64_t unit = 0; unit < group_size_; ++unit) {
        order[unit] = order_key(words[unit], static_cast<uint32_t>(unit));
      }
      std::sort(order.begin(), order.end());

      const uint32_t start = starts.at(static_cast<uint64_t>(group));
      bool* keep = keep_ + group * group_size_;
      uint64_t end = 0;
      for (int64_t i = 0; i < group_size_; ++i) {
        const int64_t unit = static_cast<uint32_t>(order[i]);
        const uint64_t t = threshold(group, unit);
        end += t;
        keep[unit] = is_hit(end, t, start);
        place[unit] = static_cast<uint32_t>(i);
      }
      if (request_.min_kept > 0) top_up(keep, [&](int64_t unit) { return place[unit]; });
    }
  }

  // Keeps the dropped units that come first until min_kept are kept.
  template <typename Priority>
  void top_up(bool* keep, Priority priority) {
    const int64_t missing = request_.min_kept - std::count(keep, keep + group_size_, true);
    if (missing <= 0) return;
    std::vector<uint64_t> dropped;
    for (int64_t unit = 0; unit < group_size_; ++unit) {
      if (!keep[unit]) dropped.push_back(order_key(priority(unit), static_cast<uint32_t>(unit)));
    }
    std::partial_sort(dropped.begin(), dropped.begin() + missing, dropped.end());
    for (int64_t i = 0; i < missing; ++i) keep[static_cast<uint32_t>(dropped[i])] = true;
  }

  const PlanRequest& request_;
  bool* keep_;  // [L, B]
  Philox4 key_;
  int64_t num_groups_, group_size_;
  std::vector<uint64_t> thresholds_;  // [L]
};

}  // namespace

bool draw_keep(const PlanRequest& request, bool* keep) {
  return Planner(request, keep).draw();
}

void compact_rows(const bool* keep, int64_t num_layers, int64_t batch_size, int32_t* rows, int64_t* kept) {
  for (int64_t l = 0; l < num_layers; ++l, keep += batch_size, rows += batch_size) {
    int64_t k = 0;
    for (int64_t b = 0; b < batch_size; ++b) {
      rows[k] = static_cast<int32_t>(b);  // overwritten unless b is kept
      k += keep[b];
    }
    std::fill(rows + k, rows + batch_size, -1);
    kept[l] = k;
  }
}

void compact_slot(const bool* keep, int64_t num_layers, int64_t batch_size, int32_t* slot) {
  for (int64_t l = 0; l < num_layers; ++l, keep += batch_size, slot += batch_size) {
    int32_t k = 0;
    for (int64_t b = 0; b < batch_size; ++b) {
      slot[b] = k | (keep[b] - 1);  // -1 unless kept
      k += keep[b];
    }
  }
}

}  // namespace layerdrop_fast
