// The rules of a plan and the CUDA kernel that draws it, on the host. Prints what is wrong; the exit status says
// whether anything is. Argument: how many random requests to compare.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <vector>

#include "cpu/instruction_sets.h"
#include "host_block.h"
#include "plan_rules.h"
#include "planner.h"

namespace layerdrop_fast {
namespace {

void fill_blocks(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  for (int64_t i = 0; i < 4 * num_blocks; ++i)
    out[i] = unit_word(key, site, 4 * first_block + static_cast<uint64_t>(i));
}

}  // namespace

// planner.cpp's source of words; the real ones are compared with the reference in tests/test_planners_agree.py.
const InstructionSet& instruction_set() {
  static const InstructionSet set = {"test", &fill_blocks, {}, {}};
  return set;
}

namespace {

int failures = 0;

#define CHECK(condition, ...)                             \
  do {                                                    \
    if (!(condition)) {                                   \
      ++failures;                                         \
      std::printf("line %d: %s: ", __LINE__, #condition); \
      std::printf(__VA_ARGS__);                           \
      std::printf("\n");                                  \
    }                                                     \
  } while (0)

using ull = unsigned long long;  // for printf

// The known answers of Random123.
void test_philox() {
  struct {
    Philox4 counter;
    uint32_t key[2];
    Philox4 expected;
  } const cases[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& c : cases) {
    const Philox4 out = philox4x32(c.counter, c.key[0], c.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(out.x[i] == c.expected.x[i], "word %d is %08x", i, out.x[i]);
  }
  const Philox4 key = step_key(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e);
  for (int i = 0; i < 4; ++i) CHECK(key.x[i] == cases[2].expected.x[i], "word %d of a step's key is %08x", i, key.x[i]);
  for (const uint64_t unit : {uint64_t{0}, uint64_t{5}, uint64_t{6}, uint64_t{0xFFFFFFFF}, (uint64_t{1} << 42) - 1}) {
    const uint64_t block = unit / 4;
    const uint32_t low = static_cast<uint32_t>(block), high = static_cast<uint32_t>(block >> 32) << 24 | kSiteStart;
    const Philox4 words = philox4x32({{low, high, key.x[2], key.x[3]}}, key.x[0], key.x[1]);
    CHECK(unit_word(key, kSiteStart, unit) == words.x[unit % 4], "unit %llu", ull{unit});
  }
  CHECK(next_step(5) == 6, "%lld", static_cast<long long>(next_step(5)));
  CHECK(next_step(std::numeric_limits<int64_t>::max()) == std::numeric_limits<int64_t>::min(), "2^63 - 1");
  CHECK(next_step(-1) == 0, "2^64 - 1");
}

void test_thresholds() {
  const double tiny = 0x1p-33, nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  struct {
    double rate;
    uint64_t expected;
  } const cases[] = {
      {0.0, kOne},
      {-0.0, kOne},
      {1.0, 0},
      {0.5, kOne / 2},
      {0x1p-32, kOne - 1},
      {tiny, kOne},  // halves go to even
      {3 * tiny, kOne - 2},
      {5 * tiny, kOne - 2},
      {1 - tiny, 0},
      {1 - 3 * tiny, 2},
      {1 - 5 * tiny, 2},
      {1 - 0x1p-53, 0},
      {0.1, 3865470566},  // 0.9 * 2^32 = 3865470566.4
      {5e-324, kOne},
      {-1e-9, kOne},
      {-inf, kOne},
      {std::nextafter(1.0, 2.0), 0},
      {inf, 0},
      {nan, 0},
  };
  for (const auto& c : cases) {
    CHECK(threshold_of(c.rate) == c.expected, "rate %a gives %llu", c.rate, ull{threshold_of(c.rate)});
  }
  CHECK(is_kept(0xFFFFFFFF, kOne), "a rate of 0 keeps every word");
  CHECK(!is_kept(0, 0), "a rate of 1 keeps none");
  CHECK(is_kept(6, 7) && !is_kept(7, 7), "word 6 and 7 at threshold 7");
  CHECK(dropped_priority(7, 7) == 0 && dropped_priority(~0u, 0) == ~0u, "the ends of priorities");
}

// A comb has a tooth at each start + k 2^32; those below `end` counted one by one.
void test_comb() {
  for (const uint32_t start : {0u, 1u, 1000u, 0x80000000u, 0xFFFFFFFFu}) {
    std::vector<uint64_t> ends = {0, 1, kOne - 1, kOne, 7 * kOne};
    for (uint64_t k = 0; k < 6; ++k) {
      for (const uint64_t past : {0, 1, 2}) ends.push_back(start + k * kOne + past);
    }
    for (const uint64_t end : ends) {
      uint64_t teeth = 0;
      while (start + teeth * kOne < end) ++teeth;
      CHECK(teeth_before(end, start) == teeth, "start %u, end %llu: not %llu", start, ull{end}, ull{teeth});
    }
    CHECK(!is_hit(start, start, start) && is_hit(start + uint64_t{1}, 1, start), "the tooth itself, start %u", start);
    CHECK(is_hit(uint64_t{0x7FFFFFFF} << 32, kOne, start), "the last of the largest group, start %u", start);
  }
}

void test_order() {
  const uint64_t ascending[] = {order_key(0, 0),
                                order_key(0, 1),
                                order_key(0, ~0u),
                                order_key(1, 0),
                                order_key(0x80000000, 7),
                                order_key(~0u, 2)};
  CHECK(std::is_sorted(std::begin(ascending), std::end(ascending)), "by word, then by unit");
  CHECK(order_key(~0u, 0x7FFFFFFF) < ~uint64_t{0}, "a kept unit comes after all that top_up counts");
  const struct {
    int64_t size;
    int expected;
  } sizes[] = {{1, 32}, {32, 32}, {33, 64}, {1000, 1024}, {1024, 1024}, {1025, 1024}, {0x7FFFFFFF, 1024}};
  for (const auto& s : sizes) CHECK(block_size(s.size) == s.expected, "%d", block_size(s.size));
}

void test_count_flags() {
  for (const int threads : {32, 96}) {
    for (const uint32_t period : {1u, 2u, 3u, 33u, 1000u}) {
      std::vector<Count> counts(static_cast<size_t>(threads));
      run_block(threads, [&](HostBlock& block) {
        for (int repeat = 0; repeat < 3; ++repeat) {
          const bool flag = static_cast<uint32_t>(block.thread()) % period == period - 1;
          counts[static_cast<size_t>(block.thread())] = count_flags(block, flag);
        }
      });
      const int total = threads / static_cast<int>(period);
      for (int i = 0; i < threads; ++i) {
        const Count& c = counts[static_cast<size_t>(i)];
        CHECK(c.before == i / static_cast<int>(period) && c.total == total, "thread %d: %d, %d", i, c.before, c.total);
      }
    }
  }
}

// Elements to be written, with one on either side that is not.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : values_(sizeof(T) * static_cast<size_t>(size + 2), 0xA5) {}
  T* data() { return reinterpret_cast<T*>(values_.data()) + 1; }
  bool intact() const {
    const auto is_poison = [](unsigned char byte) { return byte == 0xA5; };
    return std::all_of(values_.begin(), values_.begin() + sizeof(T), is_poison) &&
           std::all_of(values_.end() - sizeof(T), values_.end(), is_poison);
  }
  bool holds(const void* expected) const {
    return std::memcmp(values_.data() + sizeof(T), expected, values_.size() - 2 * sizeof(T)) == 0;
  }

 private:
  std::vector<unsigned char> values_;
};

void compare(const PlanRequest& request, int threads) {
  const int64_t units = request.num_layers * request.batch_size;
  const size_t size = static_cast<size_t>(units), layers = static_cast<size_t>(request.num_layers);
  const std::unique_ptr<bool[]> keep(new bool[size]);
  std::vector<int32_t> rows(size), slot(size);
  std::vector<int64_t> kept(layers);
  CHECK(draw_keep(request, keep.get()), "the host planner refused");
  compact_rows(keep.get(), request.num_layers, request.batch_size, rows.data(), kept.data());
  compact_slot(keep.get(), request.num_layers, request.batch_size, slot.data());

  Guarded<bool> block_keep(units);
  Guarded<int32_t> block_rows(units), block_slot(units);
  Guarded<int64_t> block_kept(request.num_layers);
  const int64_t counters[] = {
      static_cast<int64_t>(request.seed), static_cast<int64_t>(request.step), static_cast<int64_t>(request.stream)};
  const PlanTask task = {counters,
                         request.rates,
                         request.over_layers ? 1 : request.num_layers,
                         request.over_layers ? request.num_layers : request.batch_size,
                         request.over_layers,
                         request.systematic,
                         request.min_kept,
                         block_keep.data(),
                         block_rows.data(),
                         block_slot.data(),
                         block_kept.data()};
  run_block(threads, [&](HostBlock& block) {
    for (int64_t group = 0; group < task.num_groups; ++group) {
      GroupPlanner<HostBlock>(task, group, block).draw();
      block.sync();  // on a GPU every group has a block of its own
    }
  });
  const bool same = block_keep.holds(keep.get()) && block_rows.holds(rows.data()) && block_slot.holds(slot.data()) &&
                    block_kept.holds(kept.data());
  const bool intact = block_keep.intact() && block_rows.intact() && block_slot.intact() && block_kept.intact();
  CHECK(same && intact,
        "keep %d, rows %d, slot %d, kept %d, bounds %d: L %lld, B %lld, batch granularity %d, systematic %d, "
        "min_kept %lld, seed %llu, %d threads",
        block_keep.holds(keep.get()),
        block_rows.holds(rows.data()),
        block_slot.holds(slot.data()),
        block_kept.holds(kept.data()),
        intact,
        static_cast<long long>(request.num_layers),
        static_cast<long long>(request.batch_size),
        request.over_layers,
        request.systematic,
        static_cast<long long>(request.min_kept),
        ull{request.seed},
        threads);
}

void test_kernel(int requests) {
  std::mt19937_64 random(20190925);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const double extremes[] = {0.0, 1.0, 0x1p-33, 1 - 0x1p-33, 0x1p-32, 0.9999};
  const int64_t sizes[] = {1, 2, 31, 32, 33, 40, 64, 65, 96, 97, 1 + below(200)};
  for (int i = 0; i < requests; ++i) {
    PlanRequest request = {};
    request.over_layers = random() % 2;
    const int64_t group_size = sizes[below(std::size(sizes))];
    request.num_layers = request.over_layers ? group_size : 1 + below(4);
    request.batch_size = request.over_layers ? 1 : group_size;
    std::vector<double> rates(static_cast<size_t>(request.num_layers));
    const double most = random() % 4 ? 1.0 : 0.05;  // nearly all kept, so that sums of thresholds are large
    for (double& rate : rates) {
      rate =
          below(10) < 3 ? extremes[below(std::size(extremes))] : most * static_cast<double>(random() >> 11) * 0x1p-53;
    }
    request.rates = rates.data();
    request.seed = random() % 8 ? random() : ~uint64_t{0};
    request.step = random() % 8 ? random() : ~uint64_t{0};
    request.stream = random();
    request.systematic = random() % 2;
    const int64_t floors[] = {0, 1, group_size, below(group_size + 1)};
    request.min_kept = floors[below(std::size(floors))];
    // Often fewer threads than units: several turns and tiles.
    const int threads = random() % 4 ? kWarp * static_cast<int>(1 + below(3)) : std::min(block_size(group_size), 96);
    compare(request, threads);
  }
}

}  // namespace
}  // namespace layerdrop_fast

int main(int, char** arguments) {
  using namespace layerdrop_fast;
  test_philox();
  test_thresholds();
  test_comb();
  test_order();
  test_count_flags();
  test_kernel(std::atoi(arguments[1]));
  std::printf("%d failures\n", failures);
  return failures != 0;
}
