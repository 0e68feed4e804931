#include "tensors.h"

#include <cstring>
#include <numeric>

#include "../plan_rules.h"

namespace layerdrop_fast {

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a tensor of float64, float32, bfloat16 or float16");
  }
}

Shape shape_of(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims >= 2, "expected a tensor [B, ..., D], got one of ", dims, " dimensions");
  int64_t positions = 1;
  for (int64_t d = 1; d < dims - 1; ++d) positions *= tensor.size(d);
  return {tensor.size(0), positions, tensor.size(dims - 1)};
}

namespace {

// Whether the rows of channels are dense and evenly spaced within each sample; if so, their distance in elements.
bool evenly_spaced(const Tensor& tensor, int64_t& position_stride) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return false;
  int64_t positions = 1;
  position_stride = 0;
  for (int64_t d = last - 1; d > 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (positions == 1) position_stride = tensor.stride(d);
    if (tensor.stride(d) != position_stride * positions) return false;
    positions *= tensor.size(d);
  }
  return true;
}

}  // namespace

Input::Input(const Tensor& tensor, const char* name, const Tensor& like, int64_t samples) : tensor_(tensor) {
  const int64_t dims = like.dim();
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a tensor on the CPU");
  bool fits = tensor.dim() == dims && dims >= 2 && tensor.size(0) == samples;
  for (int64_t d = 1; fits && d < dims; ++d) fits = tensor.size(d) == like.size(d);
  STD_TORCH_CHECK(fits, name, ": expected ", samples, " samples of the stream's sizes");
  if (!evenly_spaced(tensor_, position_stride_)) {
    tensor_ = torch::stable::contiguous(tensor_);
    evenly_spaced(tensor_, position_stride_);
  }
  dtype_ = dtype_of(tensor_);
  data_ = static_cast<const char*>(tensor_.const_data_ptr());
  sample_stride_ = tensor_.stride(0) * size_of(dtype_);
  position_stride_ *= size_of(dtype_);
}

Output::Output(const Tensor& tensor) : dtype_(dtype_of(tensor)), data_(static_cast<char*>(tensor.mutable_data_ptr())) {
  const Shape shape = shape_of(tensor);
  positions_ = shape.positions;
  row_bytes_ = shape.channels * size_of(dtype_);
}

void Output::copy(In row, int64_t sample, int64_t position) const {
  void* const target = this->row(sample, position).data;
  if (target != row.data) std::memcpy(target, row.data, static_cast<size_t>(row_bytes_));
}

void Output::clear(int64_t sample, int64_t position) const {
  std::memset(row(sample, position).data, 0, static_cast<size_t>(row_bytes_));
}

Tensor new_like(const Tensor& like, int64_t samples, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = samples;
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor new_rstd(const Tensor& like, int64_t samples) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end() - 1);
  sizes[0] = samples;
  return torch::stable::new_empty(
      like, sizes, like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

template <typename T>
const T* read_rstd(const Tensor& rstd, const Tensor& xhat) {
  constexpr ScalarType kExpected = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Shape shape = shape_of(xhat);
  STD_TORCH_CHECK(rstd.is_cpu() && rstd.scalar_type() == kExpected && rstd.is_contiguous() &&
                      rstd.numel() == shape.samples * shape.positions,
                  "rstd: expected a contiguous tensor [N, ...] in the arithmetic's dtype, one element a row");
  return static_cast<const T*>(rstd.const_data_ptr());
}
template const float* read_rstd<float>(const Tensor&, const Tensor&);
template const double* read_rstd<double>(const Tensor&, const Tensor&);

void check_in_place(const Tensor& stream, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(stream.is_contiguous(), "the stream: expected a contiguous tensor, since it is written in place");
  if (stream.numel() == 0 || other.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < other.dim(); ++d) last += (other.size(d) - 1) * other.stride(d);
  const char* begin = static_cast<const char*>(other.const_data_ptr());
  const char* end = begin + (last + 1) * size_of(dtype_of(other));
  const char* stream_begin = static_cast<const char*>(stream.const_data_ptr());
  const char* stream_end = stream_begin + stream.numel() * size_of(dtype_of(stream));
  STD_TORCH_CHECK(
      end <= stream_begin || stream_end <= begin, name, ": shares memory with the stream, which is written");
}

Rows::Rows(const OptionalTensor& rows, const char* name, int64_t batch) {
  if (!rows) {
    samples_.resize(static_cast<size_t>(batch));
    std::iota(samples_.begin(), samples_.end(), 0);
    slots_ = samples_;
    return;
  }
  read(*rows, name, batch);
  slots_.assign(static_cast<size_t>(batch), -1);
  for (size_t k = 0; k < samples_.size(); ++k) {
    if (samples_[k] >= 0) slots_[static_cast<size_t>(samples_[k])] = static_cast<int32_t>(k);
  }
}

Rows Rows::numbering(const OptionalTensor& rows, int64_t kept) {
  if (!rows) return Rows(rows, "rows", kept);
  Rows numbered;
  numbered.read(*rows, "rows", int64_t{1} << 31);
  STD_TORCH_CHECK(
      numbered.size() == kept, "rows: expected int32 [", kept, "], one a sample of u, got ", numbered.size());
  return numbered;
}

void Rows::read(const Tensor& rows, const char* name, int64_t bound) {
  STD_TORCH_CHECK(
      rows.is_cpu() && rows.scalar_type() == ScalarType::Int && rows.dim() == 1, name, ": expected int32 [K]");
  const Tensor packed = torch::stable::contiguous(rows);
  const int32_t* data = packed.const_data_ptr<int32_t>();
  samples_.assign(data, data + packed.numel());
  int32_t previous = -1;
  for (const int32_t sample : samples_) {
    if (sample == -1) continue;
    STD_TORCH_CHECK(sample > previous && sample < bound,
                    name,
                    ": expected ascending indices in [0, ",
                    bound,
                    ") without duplicates, or -1; got ",
                    sample,
                    " after ",
                    previous);
    previous = sample;
  }
}

Dropout read_dropout(double p, const OptionalTensor& key, const OptionalTensor& site) {
  Dropout dropout;
  if (p == 0) return dropout;
  STD_TORCH_CHECK(p > 0 && p <= 1, "dropout_p: expected a probability in [0, 1], got ", p);
  STD_TORCH_CHECK(key && key->is_cpu() && key->scalar_type() == ScalarType::Int && key->numel() == 4,
                  "key: expected int32 [4] on the CPU");
  STD_TORCH_CHECK(site && site->is_cpu() && site->scalar_type() == ScalarType::Int && site->numel() == 1,
                  "site: expected int32 [] on the CPU");
  dropout.threshold = threshold_of(p);
  dropout.multiplier = p < 1 ? 1 / (1 - p) : 0;
  const Tensor packed = torch::stable::contiguous(*key);
  for (int i = 0; i < 4; ++i) dropout.key.x[i] = static_cast<uint32_t>(packed.const_data_ptr<int32_t>()[i]);
  const int32_t number = *site->const_data_ptr<int32_t>();
  STD_TORCH_CHECK(number >= 256 && number < 1 << 24, "site: expected one in [256, 2^24), got ", number);
  dropout.site = static_cast<uint32_t>(number);
  return dropout;
}

template <typename T>
T read_scale(const OptionalTensor& scale) {
  if (!scale) return T{1};
  STD_TORCH_CHECK(scale->is_cpu() && scale->numel() == 1 &&
                      scale->scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
                  "scale: expected one element in the arithmetic's dtype, on the CPU");
  return *static_cast<const T*>(scale->const_data_ptr());
}
template float read_scale<float>(const OptionalTensor&);
template double read_scale<double>(const OptionalTensor&);

}  // namespace layerdrop_fast
