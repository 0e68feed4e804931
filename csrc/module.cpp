// layerdrop_fast._C: the host planner for Python, and facts about this build. Loading it registers the ops' kernels.

// torch 2.11 and 2.12 refuse to include their pybind11 where this is defined; nothing below uses torch.
#undef TORCH_TARGET_VERSION

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>

#include "cpu/instruction_sets.h"
#include "philox.h"
#include "planner.h"

namespace py = pybind11;

namespace layerdrop_fast {
namespace {

using Rates = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Keep = py::array_t<bool, py::array::c_style>;

py::object draw_keep_py(const Rates& rates,                 // [L]
                        std::optional<int64_t> batch_size,  // B >= 1, or none for batch granularity
                        uint64_t seed,
                        uint64_t step,
                        uint64_t stream,
                        bool systematic,
                        int64_t min_kept) {
  const int64_t batch = batch_size.value_or(1);
  if (rates.ndim() != 1 || batch < 1 || min_kept < 0 || min_kept > (batch_size ? batch : rates.size())) {
    throw py::value_error("draw_keep: rates [L], batch_size >= 1 and min_kept within a group were expected");
  }
  Keep keep({rates.size(), static_cast<py::ssize_t>(batch)});
  const PlanRequest request = {
      rates.data(), rates.size(), batch, !batch_size, seed, step, stream, systematic, min_kept};
  if (!draw_keep(request, keep.mutable_data())) return py::none();
  return keep;
}

void check_matrix(const Keep& keep) {
  if (keep.ndim() != 2) throw py::value_error("keep [L, B] was expected");
}

py::list kept_layers_py(const Keep& keep) {
  check_matrix(keep);
  py::list layers;
  for (py::ssize_t l = 0; l < keep.shape(0); ++l) {
    if (std::memchr(keep.data() + l * keep.shape(1), 1, static_cast<size_t>(keep.shape(1)))) layers.append(l);
  }
  return layers;
}

py::tuple compact_rows_py(const Keep& keep) {
  check_matrix(keep);
  py::array_t<int32_t> rows({keep.shape(0), keep.shape(1)});
  py::array_t<int64_t> kept(keep.shape(0));
  compact_rows(keep.data(), keep.shape(0), keep.shape(1), rows.mutable_data(), kept.mutable_data());
  return py::make_tuple(rows, kept);
}

py::array_t<int32_t> compact_slot_py(const Keep& keep) {
  check_matrix(keep);
  py::array_t<int32_t> slot({keep.shape(0), keep.shape(1)});
  compact_slot(keep.data(), keep.shape(0), keep.shape(1), slot.mutable_data());
  return slot;
}

py::tuple philox4x32_py(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const Philox4 out = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(out.x[0], out.x[1], out.x[2], out.x[3]);
}

// The words of groups of kBlockGroup blocks, from block first_block on.
py::array_t<uint32_t> fill_blocks_py(std::array<uint32_t, 4> key,
                                     uint32_t site,
                                     uint64_t first_block,
                                     int64_t num_groups) {
  if (num_groups < 0) throw py::value_error("fill_blocks: num_groups >= 0 was expected");
  py::array_t<uint32_t> words(4 * kBlockGroup * num_groups);
  const Philox4 philox_key = {{key[0], key[1], key[2], key[3]}};
  instruction_set().fill_blocks(philox_key, site, first_block, kBlockGroup * num_groups, words.mutable_data());
  return words;
}

py::list instruction_sets_py() {
  py::list names;
  for (const InstructionSet& candidate : instruction_sets()) names.append(candidate.name);
  return names;
}

// For tests and measurements: the processor's other instruction sets compute the same bits, more slowly.
void use_instruction_set_py(const std::string& name) {
  for (const InstructionSet& candidate : instruction_sets()) {
    if (candidate.name == name) return use_instruction_set(candidate);
  }
  throw py::value_error("use_instruction_set: one of this processor's was expected, got " + name);
}

}  // namespace
}  // namespace layerdrop_fast

PYBIND11_MODULE(_C, m) {
  using namespace layerdrop_fast;
  m.def("draw_keep", &draw_keep_py);
  m.def("kept_layers", &kept_layers_py);
  m.def("compact_rows", &compact_rows_py);
  m.def("compact_slot", &compact_slot_py);
  m.def("philox4x32", &philox4x32_py);
  m.def("fill_blocks", &fill_blocks_py);
  m.def("instruction_sets", &instruction_sets_py);
  m.def("use_instruction_set", &use_instruction_set_py);
  m.attr("compiler") = LAYERDROP_COMPILER;
  m.attr("built_with_torch") = LAYERDROP_TORCH_VERSION;
}
