// What the ops do to one row of channels, in plain memory: no torch, no threads, no choice of instructions here.
//
// Every row is computed on its own and in one order of operations, however wide the registers are, and without fused
// multiply-add. So a row has the same bits on any processor and with any number of threads;
// only float64 activations, which call the C library, may differ from one C library to another. (Where flushing of
// subnormal numbers is switched on, in the threads that it is on for.)
#pragma once

#include <cstdint>

#include "../philox.h"

namespace layerdrop_fast {

enum class DType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Channels of one row, dense in memory, at any alignment.
struct In {
  const void* data;
  DType dtype;
};
struct Out {
  void* data;
  DType dtype;
};

// The mask of layerdrop_fast/reference/dropout.py.
struct Dropout {
  uint64_t threshold = uint64_t{1} << 32;  // an element is kept iff its u32 is below: always, by default
  double multiplier = 1.0;                 // of what is kept, 1 / (1 - p)
  Philox4 key = {};
  uint32_t site = 0;
};

enum class Activation : uint8_t { kGelu, kGeluTanh, kRelu, kSilu, kSwiglu, kIdentity };

// The norm kernels want room for this many rows of channels, each rounded up to kRowPadding elements.
constexpr int64_t kScratchRows = 3, kRowPadding = 16;
constexpr int64_t padded(int64_t n) {
  return (n + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Sums over rows, of so many channels at once; room for whole vectors of them.
constexpr int64_t kSumChannels = 512;
template <typename T>
struct ColumnSums {
  T *gamma, *beta;
};

// T is the arithmetic: double for a stream of float64, else float. n counts channels; `element` is the number of the
// row's first one in the full tensor. An In and an Out may be the same row, otherwise they do not overlap.
template <typename T>
struct RowKernels {
  // out = x + scale * dropout(y)
  void (*add_branch)(In x, In y, Out out, int64_t n, const Dropout& dropout, T scale, uint64_t element);
  // grad_y = scale * dropout(grad)
  void (*branch_gradient)(In grad, Out grad_y, int64_t n, const Dropout& dropout, T scale, uint64_t element);
  // xhat = (x - mean) * rstd, without the mean where rms; returns rstd
  T (*normalise)(In x, Out xhat, int64_t n, bool rms, T eps, T* scratch);
  // out = residual + rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) where rms;
  // residual.data == nullptr is 0
  void (*norm_gradient)(In residual, In g, In xhat, T rstd, Out out, int64_t n, bool rms, T* scratch);
  // grad_weight = product * gamma + total * beta, sums.gamma += weight * product, sums.beta += total * weight, for
  // at most kSumChannels channels; gamma.data == nullptr is 1, beta.data == nullptr is 0
  void (*weight_gradient)(
      In product, In weight, In gamma, In beta, T total, Out grad_weight, int64_t n, ColumnSums<T> sums);
  // a = dropout(act(u)); swiglu reads 2n channels of u
  void (*act)(Activation activation, In u, Out a, int64_t n, const Dropout& dropout, uint64_t element);
  // grad_u = dropout(grad_a) * act'(u), and a again
  void (*act_bwd)(
      Activation activation, In u, In grad_a, Out grad_u, Out a, int64_t n, const Dropout& dropout, uint64_t element);
};

// out[0 .. 4 * num_blocks): the words of blocks first_block and on, in element order. num_blocks is a multiple of
// kBlockGroup.
constexpr int64_t kBlockGroup = 8;
using FillBlocks = void(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out);

struct InstructionSet {
  const char* name;
  FillBlocks* fill_blocks;
  RowKernels<float> float32;
  RowKernels<double> float64;
};

}  // namespace layerdrop_fast
