// act and act_bwd, the elementwise halves of act_linear, for CPU tensors; layerdrop_fast/reference/act_linear.py is the
// specification.

#include "tensors.h"

namespace layerdrop_fast {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "identity") return Activation::kIdentity;
  STD_TORCH_CHECK(false, "activation: expected gelu, gelu_tanh, relu, silu, swiglu or identity, got ", name);
}

// That of act(u).
Shape activated_shape(const Tensor& u, Activation activation) {
  Shape shape = shape_of(u);
  if (activation != Activation::kSwiglu) return shape;
  STD_TORCH_CHECK(shape.channels % 2 == 0, "u: expected an even number of channels, got ", shape.channels);
  shape.channels /= 2;
  return shape;
}

Tensor new_activated(const Tensor& u, const Shape& shape) {
  std::vector<int64_t> sizes(u.sizes().begin(), u.sizes().end());
  sizes.back() = shape.channels;
  return torch::stable::new_empty(u, sizes);
}

Tensor act_cpu(Tensor u,             // [K, ..., F] f64|f32|bf16|f16; swiglu: [K, ..., 2F]
               OptionalTensor rows,  // [K] int32
               std::string activation,
               double dropout_p,    // in [0, 1]
               OptionalTensor key,  // [4] int32
               OptionalTensor site  // [] int32
) {
  const Activation kind = activation_of(activation);
  const Shape shape = activated_shape(u, kind);
  const Rows kept = Rows::numbering(rows, shape.samples);
  const Input in(u);
  const Dropout dropout = read_dropout(dropout_p, key, site);
  Tensor a = new_activated(u, shape);
  const Output out(a);
  with_arithmetic(u, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    for_each_row<T>(shape, 0, [&](int64_t row, int64_t position, T*) {
      const int64_t sample = kept.sample(row);
      if (sample < 0) return out.clear(row, position);
      const uint64_t element = shape.element(sample, position);
      kernels.act(kind, in.row(row, position), out.row(row, position), shape.channels, dropout, element);
    });
  });
  return a;
}

std::tuple<Tensor, Tensor> act_bwd_cpu(Tensor u,       // [K, ..., F] or [K, ..., 2F] f64|f32|bf16|f16
                                       Tensor grad_a,  // [K, ..., F], may differ from u in dtype
                                       OptionalTensor rows,
                                       std::string activation,
                                       double dropout_p,
                                       OptionalTensor key,
                                       OptionalTensor site) {
  const Activation kind = activation_of(activation);
  const Shape shape = activated_shape(u, kind);
  const Rows kept = Rows::numbering(rows, shape.samples);
  const Dropout dropout = read_dropout(dropout_p, key, site);
  Tensor grad_u = new_like(u, shape.samples, u.scalar_type()), a = new_activated(u, shape);
  const Input in(u), grad(grad_a, "grad_a", a, shape.samples);
  const Output out_u(grad_u), out_a(a);
  with_arithmetic(u, [&](auto zero) {
    using T = decltype(zero);
    const RowKernels<T>& kernels = row_kernels<T>();
    for_each_row<T>(shape, 0, [&](int64_t row, int64_t position, T*) {
      const int64_t sample = kept.sample(row);
      if (sample < 0) {
        out_u.clear(row, position);
        return out_a.clear(row, position);
      }
      kernels.act_bwd(kind,
                      in.row(row, position),
                      grad.row(row, position),
                      out_u.row(row, position),
                      out_a.row(row, position),
                      shape.channels,
                      dropout,
                      shape.element(sample, position));
    });
  });
  return {grad_u, a};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerdrop_fast, CPU, m) {
  m.impl("act", TORCH_BOX(&act_cpu));
  m.impl("act_bwd", TORCH_BOX(&act_bwd_cpu));
}

}  // namespace layerdrop_fast
