// gather_norm for CPU tensors; layerdrop_fast/reference/gather_norm.py is the specification.

#include "tensors.h"

namespace layerdrop_fast {
namespace {

std::tuple<Tensor, Tensor> gather_norm_cpu(Tensor x,             // [B, ..., D] f64|f32|bf16|f16
                                           OptionalTensor rows,  // [K] int32
                                           bool rms,
                                           double eps) {
  const Shape shape = shape_of(x);
  const Rows kept(rows, "rows", shape.samples);
  const Input in(x);
  Tensor xhat = new_like(x, kept.size(), x.scalar_type()), rstd = new_rstd(x, kept.size());
  const Output out(xhat);
  with_arithmetic(x, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    T* rstds = static_cast<T*>(rstd.mutable_data_ptr());
    for_each_row<T>(
        {kept.size(), shape.positions, shape.channels}, kScratchRows, [&](int64_t row, int64_t position, T* scratch) {
          const int64_t sample = kept.sample(row);
          T& rstd_of_row = rstds[row * shape.positions + position];
          if (sample >= 0) {
            rstd_of_row = kernels.normalise(
                in.row(sample, position), out.row(row, position), shape.channels, rms, static_cast<T>(eps), scratch);
          } else {
            rstd_of_row = T{0};
            out.clear(row, position);
          }
        });
  });
  return {xhat, rstd};
}

Tensor gather_norm_bwd_cpu(Tensor grad_xhat,     // [K, ..., D]
                           Tensor xhat,          // [K, ..., D]
                           Tensor rstd,          // [K, ...] f32 (f64 for f64)
                           OptionalTensor rows,  // [K] int32
                           int64_t batch_size,
                           bool rms) {
  STD_TORCH_CHECK(batch_size >= 0, "batch_size: expected B >= 0, got ", batch_size);
  const Shape shape = shape_of(xhat);
  const Rows kept(rows, "rows", batch_size);
  const Input g(grad_xhat, "grad_xhat", xhat, kept.size()), normalised(xhat, "xhat", xhat, kept.size());
  rstd = torch::stable::contiguous(rstd);
  Tensor grad_x = new_like(xhat, batch_size, xhat.scalar_type());
  const Output out(grad_x);
  with_arithmetic(xhat, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T* rstds = read_rstd<T>(rstd, xhat);
    for_each_row<T>(
        {batch_size, shape.positions, shape.channels}, kScratchRows, [&](int64_t sample, int64_t position, T* scratch) {
          const int64_t row = kept.slot(sample);
          if (row < 0) return out.clear(sample, position);
          kernels.norm_gradient({nullptr, out.row(sample, position).dtype},
                                g.row(row, position),
                                normalised.row(row, position),
                                rstds[row * shape.positions + position],
                                out.row(sample, position),
                                shape.channels,
                                rms,
                                scratch);
        });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("gather_norm", TORCH_BOX(&gather_norm_cpu));
  m.impl("gather_norm_bwd", TORCH_BOX(&gather_norm_bwd_cpu));
}

}  // namespace layerdrop_fast
