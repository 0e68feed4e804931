// scatter_residual_gather_norm for CPU tensors; layerdrop_fast/reference/scatter_residual_gather_norm.py is the
// specification. Each row of the stream is read and written once: its other steps find it in the cache.

#include "tensors.h"

namespace layerdrop_fast {
namespace {

// The arguments that forward and backward share.
struct Branches {
  Shape shape;
  Rows rows, next_rows;
  Dropout dropout;

  Branches(const Tensor& stream,
           const OptionalTensor& rows,
           const OptionalTensor& next_rows,
           double dropout_p,
           const OptionalTensor& key,
           const OptionalTensor& site)
      : shape(shape_of(stream)),
        rows(rows, "rows", shape.samples),
        next_rows(next_rows, "next_rows", shape.samples),
        dropout(read_dropout(dropout_p, key, site)) {}
};

// x_out may be x itself.
std::tuple<Tensor, Tensor> forward_into(const Tensor& x_out,
                                        const Tensor& x,
                                        const Tensor& y,
                                        const Branches& given,
                                        const OptionalTensor& scale,
                                        bool rms,
                                        double eps) {
  const Shape& shape = given.shape;
  const Rows &rows = given.rows, &next_rows = given.next_rows;
  const Input stream(x), branch(y, "y", x, rows.size());
  Tensor xhat = new_like(x, next_rows.size(), x.scalar_type()), rstd = new_rstd(x, next_rows.size());
  const Output out(x_out), normalised(xhat);
  with_arithmetic(x, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T factor = read_scale<T>(scale);
    T* rstds = static_cast<T*>(rstd.mutable_data_ptr());
    for_each_row<T>(shape, kScratchRows, [&](int64_t sample, int64_t position, T* scratch) {
      const In before = stream.row(sample, position);
      const Out after = out.row(sample, position);
      const int64_t row = rows.slot(sample), next_row = next_rows.slot(sample);
      if (row >= 0) {
        const uint64_t element = shape.element(sample, position);
        kernels.add_branch(before, branch.row(row, position), after, shape.channels, given.dropout, factor, element);
      } else {
        out.copy(before, sample, position);
      }
      if (next_row < 0) return;
      rstds[next_row * shape.positions + position] = kernels.normalise({after.data, after.dtype},
                                                                       normalised.row(next_row, position),
                                                                       shape.channels,
                                                                       rms,
                                                                       static_cast<T>(eps),
                                                                       scratch);
    });
    clear_spare_rows(next_rows, shape, normalised, rstds);
  });
  return {xhat, rstd};
}

// grad_x may be grad_x_out itself. Returns grad_y.
Tensor backward_into(const Tensor& grad_x,
                     const Tensor& grad_x_out,
                     const Tensor& grad_xhat,
                     const Tensor& xhat,
                     const Tensor& rstd,
                     const Branches& given,
                     const OptionalTensor& scale,
                     bool rms,
                     ScalarType dtype) {
  const Shape& shape = given.shape;
  const Rows &rows = given.rows, &next_rows = given.next_rows;
  const Input stream(grad_x_out), g(grad_xhat, "grad_xhat", grad_x_out, next_rows.size()),
      normalised(xhat, "xhat", grad_x_out, next_rows.size());
  const Tensor packed_rstd = torch::stable::contiguous(rstd);
  Tensor grad_y = new_like(grad_x_out, rows.size(), dtype);
  const Output out(grad_x), out_y(grad_y);
  with_arithmetic(grad_x_out, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    const T factor = read_scale<T>(scale);
    const T* rstds = read_rstd<T>(packed_rstd, xhat);
    for_each_row<T>(shape, kScratchRows, [&](int64_t sample, int64_t position, T* scratch) {
      const In before = stream.row(sample, position);
      const Out after = out.row(sample, position);
      const int64_t row = rows.slot(sample), next_row = next_rows.slot(sample);
      if (next_row >= 0) {
        kernels.norm_gradient(before,
                              g.row(next_row, position),
                              normalised.row(next_row, position),
                              rstds[next_row * shape.positions + position],
                              after,
                              shape.channels,
                              rms,
                              scratch);
      } else {
        out.copy(before, sample, position);
      }
      if (row < 0) return;
      kernels.branch_gradient({after.data, after.dtype},
                              out_y.row(row, position),
                              shape.channels,
                              given.dropout,
                              factor,
                              shape.element(sample, position));
    });
    clear_spare_rows<T>(rows, shape, out_y, nullptr);
  });
  return grad_y;
}

std::tuple<Tensor, Tensor, Tensor> scatter_residual_gather_norm_cpu(
    Tensor x,                  // [B, ..., D] f64|f32|bf16|f16
    Tensor y,                  // [K, ..., D], may differ from x in dtype
    OptionalTensor rows,       // [K] int32
    OptionalTensor next_rows,  // [N] int32
    OptionalTensor scale,      // [] f32 (f64 for f64)
    double dropout_p,          // in [0, 1]
    OptionalTensor key,        // [4] int32
    OptionalTensor site,       // [] int32
    bool rms,
    double eps) {
  const Branches given(x, rows, next_rows, dropout_p, key, site);
  Tensor x_out = new_like(x, given.shape.samples, x.scalar_type());
  const auto [xhat, rstd] = forward_into(x_out, x, y, given, scale, rms, eps);
  return {x_out, xhat, rstd};
}

std::tuple<Tensor, Tensor> scatter_residual_gather_norm_in_place_cpu(Tensor x,  // becomes x_out
                                                                     Tensor y,
                                                                     OptionalTensor rows,
                                                                     OptionalTensor next_rows,
                                                                     OptionalTensor scale,
                                                                     double dropout_p,
                                                                     OptionalTensor key,
                                                                     OptionalTensor site,
                                                                     bool rms,
                                                                     double eps) {
  check_in_place(x, y, "y");
  return forward_into(x, x, y, Branches(x, rows, next_rows, dropout_p, key, site), scale, rms, eps);
}

std::tuple<Tensor, Tensor> scatter_residual_gather_norm_bwd_cpu(Tensor grad_x_out,  // [B, ..., D]
                                                                Tensor grad_xhat,   // [N, ..., D]
                                                                Tensor xhat,        // [N, ..., D]
                                                                Tensor rstd,        // [N, ...] f32 (f64 for f64)
                                                                OptionalTensor rows,
                                                                OptionalTensor next_rows,
                                                                OptionalTensor scale,
                                                                double dropout_p,
                                                                OptionalTensor key,
                                                                OptionalTensor site,
                                                                bool rms,
                                                                ScalarType dtype  // of y
) {
  const Branches given(grad_x_out, rows, next_rows, dropout_p, key, site);
  Tensor grad_x = new_like(grad_x_out, given.shape.samples, grad_x_out.scalar_type());
  Tensor grad_y = backward_into(grad_x, grad_x_out, grad_xhat, xhat, rstd, given, scale, rms, dtype);
  return {grad_x, grad_y};
}

Tensor scatter_residual_gather_norm_bwd_in_place_cpu(Tensor grad_x,  // comes as grad_x_out
                                                     Tensor grad_xhat,
                                                     Tensor xhat,
                                                     Tensor rstd,
                                                     OptionalTensor rows,
                                                     OptionalTensor next_rows,
                                                     OptionalTensor scale,
                                                     double dropout_p,
                                                     OptionalTensor key,
                                                     OptionalTensor site,
                                                     bool rms,
                                                     ScalarType dtype) {
  check_in_place(grad_x, grad_xhat, "grad_xhat");
  check_in_place(grad_x, xhat, "xhat");
  check_in_place(grad_x, rstd, "rstd");
  const Branches given(grad_x, rows, next_rows, dropout_p, key, site);
  return backward_into(grad_x, grad_x, grad_xhat, xhat, rstd, given, scale, rms, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("scatter_residual_gather_norm", TORCH_BOX(&scatter_residual_gather_norm_cpu));
  m.impl("scatter_residual_gather_norm_", TORCH_BOX(&scatter_residual_gather_norm_in_place_cpu));
  m.impl("scatter_residual_gather_norm_bwd", TORCH_BOX(&scatter_residual_gather_norm_bwd_cpu));
  m.impl("scatter_residual_gather_norm_bwd_", TORCH_BOX(&scatter_residual_gather_norm_bwd_in_place_cpu));
}

}  // namespace layerdrop_fast
