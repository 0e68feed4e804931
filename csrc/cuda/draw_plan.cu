// The ops draw_plan, draw_plan_ and step_key for CUDA tensors. Nothing waits for the device and nothing but the results
// is allocated, so that all of them can be captured in a graph.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>

#include "../plan_tensors.h"
#include "draw_plan.cuh"

namespace layerdrop_fast {
namespace {

class CudaBlock {
 public:
  __device__ explicit CudaBlock(Shared& shared) : shared_(shared) {}
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint32_t ballot(bool flag) const { return __ballot_sync(0xFFFFFFFFu, flag); }
  __device__ Shared& shared() const { return shared_; }

 private:
  Shared& shared_;
};

__global__ void __launch_bounds__(kMaxThreads) draw_plan_kernel(const __grid_constant__ PlanTask task) {
  __shared__ Shared shared;
  CudaBlock block(shared);
  GroupPlanner<CudaBlock>(task, blockIdx.x, block).draw();
}

// After draw_plan_kernel on the same stream: all of its blocks have read the step.
__global__ void advance_step_kernel(int64_t* counters  // [3]
) {
  counters[1] = next_step(counters[1]);
}

__global__ void step_key_kernel(const int64_t* counters,  // [3]
                                int32_t* out              // [4]
) {
  const Philox4 key = step_key(
      static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]), static_cast<uint64_t>(counters[2]));
  for (int i = 0; i < 4; ++i) out[i] = static_cast<int32_t>(key.x[i]);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor step_key_cuda(Tensor counters  // [3] int64
) {
  check_counters(counters);
  const torch::stable::accelerator::DeviceGuard guard(counters.get_device_index());
  const Tensor packed = torch::stable::contiguous(counters);
  Tensor out = torch::stable::new_empty(counters, {4}, ScalarType::Int);
  step_key_kernel<<<1, 1, 0, current_stream(counters)>>>(packed.const_data_ptr<int64_t>(),
                                                         out.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Plan draw_plan_cuda(Tensor counters,                    // [3] int64
                    Tensor rates,                       // [L] float64
                    std::optional<int64_t> batch_size,  // B, or none for batch granularity
                    bool systematic,
                    int64_t min_kept) {
  const torch::stable::accelerator::DeviceGuard guard(counters.get_device_index());
  PlanTensors t(counters, rates, batch_size, min_kept);
  const cudaStream_t stream = current_stream(counters);
  if (t.num_layers == 0) return t.plan();
  const PlanTask task = {t.counters.const_data_ptr<int64_t>(),
                         t.rates.const_data_ptr<double>(),
                         t.num_groups(),
                         t.group_size(),
                         t.over_layers,
                         systematic,
                         min_kept,
                         t.keep.mutable_data_ptr<bool>(),
                         t.rows.mutable_data_ptr<int32_t>(),
                         t.slot.mutable_data_ptr<int32_t>(),
                         t.kept.mutable_data_ptr<int64_t>()};
  draw_plan_kernel<<<static_cast<unsigned>(task.num_groups), block_size(task.group_size), 0, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return t.plan();
}

// draw_plan, then the next step.
Plan draw_plan_and_advance_cuda(
    Tensor counters, Tensor rates, std::optional<int64_t> batch_size, bool systematic, int64_t min_kept) {
  check_written(counters);
  Plan plan = draw_plan_cuda(counters, rates, batch_size, systematic, min_kept);
  const torch::stable::accelerator::DeviceGuard guard(counters.get_device_index());
  advance_step_kernel<<<1, 1, 0, current_stream(counters)>>>(counters.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return plan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CUDA, m) {
  m.impl("step_key", TORCH_BOX(&step_key_cuda));
  m.impl("draw_plan", TORCH_BOX(&draw_plan_cuda));
  m.impl("draw_plan_", TORCH_BOX(&draw_plan_and_advance_cuda));
}

}  // namespace layerdrop_fast
