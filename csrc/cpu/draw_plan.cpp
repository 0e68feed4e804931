// The ops draw_plan and step_key for CPU tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>

#include "../philox.h"
#include "../planner.h"

namespace layerdrop_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Counters {
  uint64_t seed, step, stream;
};

Counters read_counters(const Tensor& counters) {
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == 3,
                  "counters must be an int64 tensor of 3 elements: seed, step, stream");
  const Tensor packed = torch::stable::contiguous(counters);
  const int64_t* words = packed.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), static_cast<uint64_t>(words[2])};
}

Tensor step_key_cpu(Tensor counters  // [3] int64
) {
  const Counters c = read_counters(counters);
  const Philox4 key = step_key(c.seed, c.step, c.stream);
  Tensor out = torch::stable::new_empty(counters, {4}, ScalarType::Int);
  for (int i = 0; i < 4; ++i) out.mutable_data_ptr<int32_t>()[i] = static_cast<int32_t>(key.x[i]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> draw_plan_cpu(
    Tensor counters,                    // [3] int64
    Tensor rates,                       // [L] float64
    std::optional<int64_t> batch_size,  // B, or none for batch granularity
    bool systematic,
    int64_t min_kept) {
  STD_TORCH_CHECK(rates.scalar_type() == ScalarType::Double && rates.dim() == 1, "rates must be a float64 vector");
  rates = torch::stable::contiguous(rates);
  const int64_t num_layers = rates.numel(), batch = batch_size.value_or(1);
  const int64_t group_size = batch_size ? batch : num_layers;
  STD_TORCH_CHECK(batch >= 1, "batch_size must be at least 1, got ", batch);
  STD_TORCH_CHECK(
      min_kept >= 0 && min_kept <= group_size, "min_kept must lie in [0, ", group_size, "], got ", min_kept);
  const Counters c = read_counters(counters);

  Tensor keep = torch::stable::new_empty(rates, {num_layers, batch}, ScalarType::Bool);
  Tensor rows = torch::stable::new_empty(rates, {num_layers, batch}, ScalarType::Int);
  Tensor slot = torch::stable::new_empty(rates, {num_layers, batch}, ScalarType::Int);
  Tensor kept = torch::stable::new_empty(rates, {num_layers}, ScalarType::Long);
  bool* keep_data = keep.mutable_data_ptr<bool>();
  const PlanRequest request = {
      rates.const_data_ptr<double>(), num_layers, batch, !batch_size, c.seed, c.step, c.stream, systematic, min_kept};
  STD_TORCH_CHECK(draw_keep(request, keep_data), "drop rates must lie in [0, 1]");
  compact_rows(keep_data, num_layers, batch, rows.mutable_data_ptr<int32_t>(), kept.mutable_data_ptr<int64_t>());
  compact_slot(keep_data, num_layers, batch, slot.mutable_data_ptr<int32_t>());
  return {keep, rows, slot, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("step_key", TORCH_BOX(&step_key_cpu));
  m.impl("draw_plan", TORCH_BOX(&draw_plan_cpu));
}

}  // namespace layerdrop_fast
