// What the op draw_plan takes and returns, on any device. Checks here protect memory; layerdrop_fast/ops tells users
// what is wrong.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "stable_abi.h"

namespace layerdrop_fast {

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // keep, rows, slot, kept

inline void check_counters(const Tensor& counters) {
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == 3,
                  "counters must be an int64 tensor of 3 elements: seed, step, stream");
}

// Contiguous arguments, and results to be filled.
struct PlanTensors {
  Tensor counters, rates;
  bool over_layers;
  int64_t num_layers, batch_size;
  Tensor keep, rows, slot, kept;

  PlanTensors(const Tensor& given_counters,              // [3] int64
              const Tensor& given_rates,                 // [L] float64
              const std::optional<int64_t>& given_size,  // B, or none for batch granularity
              int64_t min_kept)
      : counters(given_counters),
        rates(given_rates),
        over_layers(!given_size),
        num_layers(given_rates.numel()),
        batch_size(given_size.value_or(1)) {
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    check_counters(counters);
    STD_TORCH_CHECK(rates.scalar_type() == ScalarType::Double && rates.dim() == 1, "rates must be a float64 vector");
    STD_TORCH_CHECK(rates.device() == counters.device(), "counters and rates must be on one device");
    STD_TORCH_CHECK(batch_size >= 1 && batch_size <= kLimit, "batch_size must lie in [1, 2^31), got ", batch_size);
    STD_TORCH_CHECK(num_layers <= kLimit, "there must be fewer than 2^31 layers, got ", num_layers);
    STD_TORCH_CHECK(
        min_kept >= 0 && min_kept <= group_size(), "min_kept must lie in [0, ", group_size(), "], got ", min_kept);
    counters = torch::stable::contiguous(counters);
    rates = torch::stable::contiguous(rates);
    keep = torch::stable::new_empty(rates, {num_layers, batch_size}, ScalarType::Bool);
    rows = torch::stable::new_empty(rates, {num_layers, batch_size}, ScalarType::Int);
    slot = torch::stable::new_empty(rates, {num_layers, batch_size}, ScalarType::Int);
    kept = torch::stable::new_empty(rates, {num_layers}, ScalarType::Long);
  }

  int64_t num_groups() const { return over_layers ? 1 : num_layers; }
  int64_t group_size() const { return over_layers ? num_layers : batch_size; }
  Plan plan() const { return {keep, rows, slot, kept}; }
};

// draw_plan_ writes the counters that it is given.
inline void check_written(const Tensor& counters) {
  check_counters(counters);
  STD_TORCH_CHECK(counters.is_contiguous(),
                  "counters: expected a contiguous tensor, since the step is written in place");
}

}  // namespace layerdrop_fast
