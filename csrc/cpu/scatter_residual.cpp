// scatter_residual for CPU tensors; layerdrop_fast/reference/scatter_residual.py is the specification.

#include "tensors.h"

namespace layerdrop_fast {
namespace {

// x_out may be x itself.
void scatter_residual_into(const Tensor& x_out,
                           const Tensor& x,
                           const Tensor& y,
                           const OptionalTensor& rows,
                           const OptionalTensor& scale,
                           double dropout_p,
                           const OptionalTensor& key,
                           const OptionalTensor& site) {
  const Shape shape = shape_of(x);
  const Rows kept(rows, "rows", shape.samples);
  const Input stream(x), branch(y, "y", x, kept.size());
  const Output out(x_out);
  const Dropout dropout = read_dropout(dropout_p, key, site);
  with_arithmetic(x, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T factor = read_scale<T>(scale);
    for_each_row<T>(shape, 0, [&](int64_t sample, int64_t position, T*) {
      const int64_t row = kept.slot(sample);
      if (row < 0) return out.copy(stream.row(sample, position), sample, position);
      kernels.add_branch(stream.row(sample, position),
                         branch.row(row, position),
                         out.row(sample, position),
                         shape.channels,
                         dropout,
                         factor,
                         shape.element(sample, position));
    });
  });
}

Tensor scatter_residual_cpu(Tensor x,              // [B, ..., D] f64|f32|bf16|f16
                            Tensor y,              // [K, ..., D], may differ from x in dtype
                            OptionalTensor rows,   // [K] int32
                            OptionalTensor scale,  // [] f32 (f64 for f64)
                            double dropout_p,      // in [0, 1]
                            OptionalTensor key,    // [4] int32
                            OptionalTensor site    // [] int32
) {
  Tensor x_out = new_like(x, x.size(0), x.scalar_type());
  scatter_residual_into(x_out, x, y, rows, scale, dropout_p, key, site);
  return x_out;
}

void scatter_residual_in_place_cpu(Tensor x,  // written
                                   Tensor y,
                                   OptionalTensor rows,
                                   OptionalTensor scale,
                                   double dropout_p,
                                   OptionalTensor key,
                                   OptionalTensor site) {
  check_in_place(x, y, "y");
  scatter_residual_into(x, x, y, rows, scale, dropout_p, key, site);
}

Tensor scatter_residual_bwd_cpu(Tensor grad_out,  // [B, ..., D]
                                OptionalTensor rows,
                                OptionalTensor scale,
                                double dropout_p,
                                OptionalTensor key,
                                OptionalTensor site,
                                ScalarType dtype  // of y
) {
  const Shape shape = shape_of(grad_out);
  const Rows kept(rows, "rows", shape.samples);
  const Input grad(grad_out);
  const Dropout dropout = read_dropout(dropout_p, key, site);
  Tensor grad_y = new_like(grad_out, kept.size(), dtype);
  const Output out(grad_y);
  with_arithmetic(grad_out, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T factor = read_scale<T>(scale);
    for_each_row<T>({kept.size(), shape.positions, shape.channels}, 0, [&](int64_t row, int64_t position, T*) {
      const int64_t sample = kept.sample(row);
      if (sample < 0) return out.clear(row, position);
      kernels.branch_gradient(grad.row(sample, position),
                              out.row(row, position),
                              shape.channels,
                              dropout,
                              factor,
                              shape.element(sample, position));
    });
  });
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("scatter_residual", TORCH_BOX(&scatter_residual_cpu));
  m.impl("scatter_residual_", TORCH_BOX(&scatter_residual_in_place_cpu));
  m.impl("scatter_residual_bwd", TORCH_BOX(&scatter_residual_bwd_cpu));
}

}  // namespace layerdrop_fast
