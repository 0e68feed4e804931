// PyTorch's stable ABI, as all kernels use it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// Above the installed torch, the headers would compile and the object would not load.
static_assert(TORCH_TARGET_VERSION <= TORCH_ABI_VERSION, "the stable ABI's target is newer than the installed torch");

namespace layerdrop_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace layerdrop_fast
