// The plan of a step on the host: which units are kept, and where they stand. No torch, no Python.
//
// Units are drawn in groups. Batch granularity has one group of L layers; sample granularity has L groups of B samples.
// layerdrop_fast/reference/draw_plan.py is the specification.
#pragma once

#include <cstdint>

namespace layerdrop_fast {

struct PlanRequest {
  const double* rates;  // [L] drop rates
  int64_t num_layers;   // L
  int64_t batch_size;   // B; 1 at batch granularity
  bool over_layers;     // batch granularity: the layers are one group
  uint64_t seed, step, stream;
  bool systematic;
  int64_t min_kept;  // of a group
};

// Writes keep [L, B]. False, and nothing written, where a rate is outside [0, 1] or NaN.
bool draw_keep(const PlanRequest& request, bool* keep);

// rows [L, B]: indices of the kept samples of each layer, ascending, padded with -1; kept [L]: how many.
void compact_rows(const bool* keep, int64_t num_layers, int64_t batch_size, int32_t* rows, int64_t* kept);

// slot [L, B]: a sample's place among the kept ones of its layer, or -1.
void compact_slot(const bool* keep, int64_t num_layers, int64_t batch_size, int32_t* slot);

}  // namespace layerdrop_fast
