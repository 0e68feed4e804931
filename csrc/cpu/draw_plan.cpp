// The ops draw_plan, draw_plan_ and step_key for CPU tensors.

#include <optional>

#include "../philox.h"
#include "../plan_tensors.h"
#include "../planner.h"

namespace layerdrop_fast {
namespace {

Tensor step_key_cpu(Tensor counters  // [3] int64
) {
  check_counters(counters);
  const Tensor packed = torch::stable::contiguous(counters);
  const int64_t* words = packed.const_data_ptr<int64_t>();
  const Philox4 key =
      step_key(static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), static_cast<uint64_t>(words[2]));
  Tensor out = torch::stable::new_empty(counters, {4}, ScalarType::Int);
  for (int i = 0; i < 4; ++i) out.mutable_data_ptr<int32_t>()[i] = static_cast<int32_t>(key.x[i]);
  return out;
}

Plan draw_plan_cpu(Tensor counters,                    // [3] int64
                   Tensor rates,                       // [L] float64
                   std::optional<int64_t> batch_size,  // B, or none for batch granularity
                   bool systematic,
                   int64_t min_kept) {
  PlanTensors t(counters, rates, batch_size, min_kept);
  const int64_t* words = t.counters.const_data_ptr<int64_t>();
  const PlanRequest request = {t.rates.const_data_ptr<double>(),
                               t.num_layers,
                               t.batch_size,
                               t.over_layers,
                               static_cast<uint64_t>(words[0]),
                               static_cast<uint64_t>(words[1]),
                               static_cast<uint64_t>(words[2]),
                               systematic,
                               min_kept};
  bool* keep = t.keep.mutable_data_ptr<bool>();
  STD_TORCH_CHECK(draw_keep(request, keep), "drop rates must lie in [0, 1]");
  compact_rows(
      keep, t.num_layers, t.batch_size, t.rows.mutable_data_ptr<int32_t>(), t.kept.mutable_data_ptr<int64_t>());
  compact_slot(keep, t.num_layers, t.batch_size, t.slot.mutable_data_ptr<int32_t>());
  return t.plan();
}

// draw_plan, then the next step.
Plan draw_plan_and_advance_cpu(
    Tensor counters, Tensor rates, std::optional<int64_t> batch_size, bool systematic, int64_t min_kept) {
  check_written(counters);
  Plan plan = draw_plan_cpu(counters, rates, batch_size, systematic, min_kept);
  int64_t& step = counters.mutable_data_ptr<int64_t>()[1];
  step = next_step(step);
  return plan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("step_key", TORCH_BOX(&step_key_cpu));
  m.impl("draw_plan", TORCH_BOX(&draw_plan_cpu));
  m.impl("draw_plan_", TORCH_BOX(&draw_plan_and_advance_cpu));
}

}  // namespace layerdrop_fast
