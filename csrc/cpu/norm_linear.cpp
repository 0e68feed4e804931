// norm_linear_bwd, the half of norm_linear's backward that is no matrix product, for CPU tensors;
// layerdrop_fast/reference/norm_linear.py is the specification.

#include "tensors.h"

namespace layerdrop_fast {
namespace {

// A contiguous vector that a channel, or an output, has one element of.
class Vector {
 public:
  Vector(const OptionalTensor& tensor, const char* name, int64_t size) {
    if (!tensor) return;
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->dim() == 1 && tensor->numel() == size, name, ": expected [", size, "] on the CPU");
    tensor_ = torch::stable::contiguous(*tensor);
    dtype_ = dtype_of(*tensor_);
    data_ = static_cast<const char*>(tensor_->const_data_ptr());
  }

  In from(int64_t i) const { return {data_ ? data_ + i * size_of(dtype_) : nullptr, dtype_}; }

 private:
  OptionalTensor tensor_;
  DType dtype_ = DType::kFloat32;
  const char* data_ = nullptr;
};

In part_of(In row, int64_t start) {
  return {static_cast<const char*>(row.data) + start * size_of(row.dtype), row.dtype};
}
Out part_of(Out row, int64_t start) {
  return {static_cast<char*>(row.data) + start * size_of(row.dtype), row.dtype};
}

// Rows that are summed in the arithmetic's dtype, before the sum goes to one in double.
constexpr int64_t kSumOutputs = 16;

std::tuple<Tensor, Tensor, Tensor> norm_linear_bwd_cpu(Tensor product,        // [O, D] f64|f32|bf16|f16
                                                       OptionalTensor total,  // [O] f32 (f64 for f64)
                                                       Tensor weight,         // [O, D]
                                                       OptionalTensor gamma,  // [D]
                                                       OptionalTensor beta    // [D]
) {
  STD_TORCH_CHECK(product.dim() == 2, "product: expected [O, D], got one of ", product.dim(), " dimensions");
  STD_TORCH_CHECK(total || !beta, "total: expected the sum of g where there is beta");
  const int64_t outputs = product.size(0), channels = product.size(1);
  const Input in(product), weights(weight, "weight", product, outputs);
  const Vector totals(total, "total", outputs), factor(gamma, "gamma", channels), shift(beta, "beta", channels);
  const ScalarType wide = product.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!total || total->scalar_type() == wide, "total: expected the arithmetic's dtype");
  Tensor grad_weight = new_like(product, outputs, weight.scalar_type());
  Tensor grad_gamma = torch::stable::new_empty(product, {channels}, wide);
  Tensor grad_beta = torch::stable::new_empty(product, {channels}, wide);
  const Output out(grad_weight);
  with_arithmetic(product, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    T* gamma_out = static_cast<T*>(grad_gamma.mutable_data_ptr());
    T* beta_out = static_cast<T*>(grad_beta.mutable_data_ptr());
    // Threads share the channels, so that the order of a sum does not depend on them.
    const int64_t parts = (channels + kSumChannels - 1) / kSumChannels;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t start = part * kSumChannels, n = std::min(kSumChannels, channels - start);
        double gamma_total[kSumChannels] = {}, beta_total[kSumChannels] = {};
        for (int64_t first = 0; first < outputs; first += kSumOutputs) {
          T gamma_sums[kSumChannels] = {}, beta_sums[kSumChannels] = {};
          for (int64_t output = first; output < std::min(first + kSumOutputs, outputs); ++output) {
            kernels.weight_gradient(part_of(in.row(output, 0), start),
                                    part_of(weights.row(output, 0), start),
                                    factor.from(start),
                                    shift.from(start),
                                    total ? *static_cast<const T*>(totals.from(output).data) : T{0},
                                    part_of(out.row(output, 0), start),
                                    n,
                                    {gamma_sums, beta_sums});
          }
          for (int64_t i = 0; i < n; ++i) gamma_total[i] += gamma_sums[i];
          for (int64_t i = 0; total && i < n; ++i) beta_total[i] += beta_sums[i];
        }
        for (int64_t i = 0; i < n; ++i) gamma_out[start + i] = static_cast<T>(gamma_total[i]);
        for (int64_t i = 0; i < n; ++i) beta_out[start + i] = static_cast<T>(beta_total[i]);
      }
    });
  });
  return {grad_weight, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("norm_linear_bwd", TORCH_BOX(&norm_linear_bwd_cpu));
}

}  // namespace layerdrop_fast
