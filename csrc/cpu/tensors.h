// Tensors as the row kernels see them: [samples, positions, channels] with checked sizes, rows, dropout and threads.
// Checks here protect memory; layerdrop_fast/ops tells users what is wrong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../stable_abi.h"
#include "instruction_sets.h"

namespace layerdrop_fast {

using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor);

// B, S (the product of the middle dimensions) and D.
struct Shape {
  int64_t samples, positions, channels;

  // The number of a row's first element in the full tensor.
  uint64_t element(int64_t sample, int64_t position) const {
    return static_cast<uint64_t>((sample * positions + position) * channels);
  }
};
Shape shape_of(const Tensor& tensor);

// A tensor to read, with any strides: copied only where its positions or channels are not evenly spaced.
class Input {
 public:
  // The sizes are those of `like` but for the number of samples.
  Input(const Tensor& tensor, const char* name, const Tensor& like, int64_t samples);
  explicit Input(const Tensor& tensor) : Input(tensor, "tensor", tensor, tensor.size(0)) {}

  In row(int64_t sample, int64_t position) const {
    return {data_ + sample * sample_stride_ + position * position_stride_, dtype_};
  }

 private:
  Tensor tensor_;
  DType dtype_;
  const char* data_;
  int64_t sample_stride_, position_stride_;  // bytes
};

// A contiguous tensor to write.
class Output {
 public:
  explicit Output(const Tensor& tensor);

  Out row(int64_t sample, int64_t position) const {
    return {data_ + (sample * positions_ + position) * row_bytes_, dtype_};
  }
  // Does nothing where the row stands there already.
  void copy(In row, int64_t sample, int64_t position) const;
  void clear(int64_t sample, int64_t position) const;

 private:
  DType dtype_;
  char* data_;
  int64_t positions_, row_bytes_;
};

// A new tensor of `samples` samples, otherwise of the sizes of `like`.
Tensor new_like(const Tensor& like, int64_t samples, ScalarType dtype);
// One number for each row of such a tensor, in the arithmetic's dtype.
Tensor new_rstd(const Tensor& like, int64_t samples);

// What new_rstd made, for the rows of xhat.
template <typename T>
const T* read_rstd(const Tensor& rstd, const Tensor& xhat);

// Throws unless the stream is contiguous and no memory of `other` lies in it.
void check_in_place(const Tensor& stream, const Tensor& other, const char* name);

// The samples that a branch ran for.
class Rows {
 public:
  // No tensor: all `batch` samples.
  Rows(const OptionalTensor& rows, const char* name, int64_t batch);
  // Of a tensor that holds `kept` samples of a batch of any size: for sample() alone.
  static Rows numbering(const OptionalTensor& rows, int64_t kept);

  int64_t size() const { return static_cast<int64_t>(samples_.size()); }
  int64_t sample(int64_t row) const { return samples_[static_cast<size_t>(row)]; }    // or -1
  int64_t slot(int64_t sample) const { return slots_[static_cast<size_t>(sample)]; }  // or -1

 private:
  Rows() = default;
  // Checks int32 [K], ascending below `bound` but for -1.
  void read(const Tensor& rows, const char* name, int64_t bound);

  std::vector<int32_t> samples_, slots_;
};

// Zeros in the place of spare rows: of `out`, and of rstds [K, S] unless it is nullptr.
template <typename T>
void clear_spare_rows(const Rows& rows, const Shape& shape, const Output& out, T* rstds) {
  for (int64_t row = 0; row < rows.size(); ++row) {
    if (rows.sample(row) >= 0) continue;
    for (int64_t position = 0; position < shape.positions; ++position) {
      out.clear(row, position);
      if (rstds) rstds[row * shape.positions + position] = T{0};
    }
  }
}

Dropout read_dropout(double p, const OptionalTensor& key, const OptionalTensor& site);

template <typename T>
T read_scale(const OptionalTensor& scale);

// Calls body(sample, position, scratch) for all rows, on torch's threads, with room for `scratch_rows` rows of T. Each
// thread gets about its share of every sample, since kept samples cost more than others.
template <typename T, typename Body>
void for_each_row(const Shape& shape, int64_t scratch_rows, const Body& body) {
  constexpr int64_t kGrain = 1 << 15;  // channels: some ten microseconds of work
  // Rows of one sample follow each other in memory: go along them where that splits evenly, else across samples.
  const bool along = shape.positions >= 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t items = along ? shape.positions : shape.positions * shape.samples;
  const int64_t cost = std::max<int64_t>(along ? shape.samples * shape.channels : shape.channels, 1);
  torch::stable::parallel_for(0, items, kGrain / cost + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(scratch_rows * padded(shape.channels))]);
    if (along) {
      for (int64_t sample = 0; sample < shape.samples; ++sample) {
        for (int64_t position = begin; position < end; ++position) body(sample, position, scratch.get());
      }
    } else {
      for (int64_t i = begin; i < end; ++i) body(i % shape.samples, i / shape.samples, scratch.get());
    }
  });
}

// Calls f with a value of the arithmetic's type: double for float64, float for the others.
template <typename F>
auto with_arithmetic(const Tensor& stream, const F& f) {
  return dtype_of(stream) == DType::kFloat64 ? f(double{}) : f(float{});
}

}  // namespace layerdrop_fast
