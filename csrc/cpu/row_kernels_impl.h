// The row kernels of row_kernels.h, written once. Each file that includes this one names the instructions that the
// compiler may use, LAYERDROP_INSTRUCTIONS, which is also the namespace, and the bytes of their registers,
// LAYERDROP_REGISTER_BYTES. What is here has internal linkage, so that the linker never picks one file's for another's.
#pragma once

#include "activations_impl.h"
#include "fill_blocks_impl.h"
#include "vectors_impl.h"

namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS {
namespace {

// Elementwise kernels go through a row in parts that stay in the first-level cache.
constexpr int64_t kPart = 512;

LAYERDROP_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static_assert(kPart % kRowPadding == 0 && kRowPadding % kLanes<float> == 0, "parts and rows are whole vectors");

// dropout(value) for the elements of one part. A copy in the loop that uses it: the compiler then knows that what the
// loop stores does not change it.
template <typename T>
struct Keep {
  const uint32_t* words;  // nullptr: nothing is dropped
  uint64_t threshold;
  T multiplier;

  // For the part's elements i and on.
  LAYERDROP_INLINE Vector<T> apply(Vector<T> value, int64_t i) const {
    const Vector<T> kept = value * multiplier;
    if (!words) return kept;
    if constexpr (sizeof(T) == 8) {
      const Vector<uint64_t> drawn = __builtin_convertvector(load<HalfBits32>(words + i), Vector<uint64_t>);
      return drawn < threshold ? kept : Vector<T>{};
    } else {
      return load<Bits32>(words + i) < static_cast<uint32_t>(threshold) ? kept : Vector<T>{};
    }
  }
};

// Room for the words of one part: it may begin inside its first block, and whole groups of blocks are drawn.
struct Words {
  static_assert(kBlockGroup * LAYERDROP_REGISTER_BYTES % 64 == 0, "groups of blocks are whole vectors");
  uint32_t words[kPart + 4 * kBlockGroup];

  // For the part's elements, `element` and on, as many as whole vectors of them have.
  template <typename T>
  LAYERDROP_INLINE Keep<T> draw(const Dropout& dropout, uint64_t element, int64_t n) {
    const T multiplier = static_cast<T>(dropout.multiplier);
    if (dropout.threshold >= uint64_t{1} << 32) return {nullptr, dropout.threshold, multiplier};
    const uint64_t first = element / 4, last = (element + static_cast<uint64_t>(padded(n)) + 3) / 4;
    const int64_t groups = (static_cast<int64_t>(last - first) + kBlockGroup - 1) / kBlockGroup;
    fill_blocks(dropout.key, dropout.site, first, groups * kBlockGroup, words);
    return {words + element % 4, dropout.threshold, multiplier};
  }
};

template <typename T>
void add_branch(In x, In y, Out out, int64_t n, const Dropout& dropout, T scale, uint64_t element) {
  T x_room[kPart], y_room[kPart], out_room[kPart];
  Words words;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t count = smaller(n - start, kPart);
    const T* from = read(part_of(x, start), count, x_room);
    const T* branch = read(part_of(y, start), count, y_room);
    T* to = open(part_of(out, start), count, out_room);
    const Keep<T> keep = words.draw<T>(dropout, element + static_cast<uint64_t>(start), count);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vector<T> added = keep.apply(load<Vector<T>>(branch + i), i) * scale;
      store(load<Vector<T>>(from + i) + added, to + i);
    }
    close(to, count, part_of(out, start));
  }
}

template <typename T>
void branch_gradient(In grad, Out grad_y, int64_t n, const Dropout& dropout, T scale, uint64_t element) {
  T grad_room[kPart], out_room[kPart];
  Words words;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t count = smaller(n - start, kPart);
    const T* from = read(part_of(grad, start), count, grad_room);
    T* to = open(part_of(grad_y, start), count, out_room);
    const Keep<T> keep = words.draw<T>(dropout, element + static_cast<uint64_t>(start), count);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(keep.apply(load<Vector<T>>(from + i), i) * scale, to + i);
    }
    close(to, count, part_of(grad_y, start));
  }
}

// The sum of n terms, read in whole vectors: term i goes to partial sum i % kPartialSums, and these are added in pairs,
// however many lie in one register. Several registers, so that an addition need not wait for the one before it.
template <typename T, typename Terms>
LAYERDROP_INLINE T sum(int64_t n, const Terms& terms) {
  constexpr int64_t kPartialSums = 128 / sizeof(T), kVectors = kPartialSums / kLanes<T>;
  Vector<T> partial[kVectors] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= n; i += kPartialSums) {
    for (int64_t j = 0; j < kVectors; ++j) partial[j] += terms(i + j * kLanes<T>);
  }
  for (int64_t j = 0; i < n; i += kLanes<T>, ++j) partial[j] += terms(i);
  T sums[kPartialSums];
  __builtin_memcpy(sums, partial, sizeof(sums));
  for (int64_t width = kPartialSums / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

// The vector of the row's elements i and on, 0 beyond its end.
template <typename T>
LAYERDROP_INLINE Vector<T> within(Vector<T> value, int64_t i, int64_t n) {
  if (i + kLanes<T> <= n) return value;
  for (int64_t lane = n - i; lane < kLanes<T>; ++lane) value[lane] = T{0};
  return value;
}

template <typename T>
LAYERDROP_INLINE T square_root(T value) {
  if constexpr (sizeof(T) == 8) return __builtin_sqrt(value);
  return __builtin_sqrtf(value);
}

template <typename T>
T normalise(In x, Out xhat, int64_t n, bool rms, T eps, T* scratch) {
  const T* from = read(x, n, scratch);
  const T mean = rms ? T{0} : sum<T>(n, [&](int64_t i) { return load<Vector<T>>(from + i); }) / static_cast<T>(n);
  const T squares = sum<T>(n, [&](int64_t i) {
    const Vector<T> centred = within<T>(load<Vector<T>>(from + i) - mean, i, n);
    return centred * centred;
  });
  const T rstd = T{1} / square_root<T>(squares / static_cast<T>(n) + eps);
  T* to = open(xhat, n, scratch);
  for (int64_t i = 0; i < n; i += kLanes<T>) store((load<Vector<T>>(from + i) - mean) * rstd, to + i);
  close(to, n, xhat);
  return rstd;
}

template <typename T>
void norm_gradient(In residual, In g, In xhat, T rstd, Out out, int64_t n, bool rms, T* scratch) {
  const int64_t row = padded(n);
  const T* grad = read(g, n, scratch);
  const T* normalised = read(xhat, n, scratch + row);
  const T* before = residual.data ? read(residual, n, scratch + 2 * row) : nullptr;
  T* to = open(out, n, scratch);
  const T count = static_cast<T>(n);
  const T mean = rms ? T{0} : sum<T>(n, [&](int64_t i) { return load<Vector<T>>(grad + i); }) / count;
  const T projection =
      sum<T>(n, [&](int64_t i) { return load<Vector<T>>(grad + i) * load<Vector<T>>(normalised + i); }) / count;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vector<T> value = load<Vector<T>>(grad + i) - load<Vector<T>>(normalised + i) * projection - mean;
    value *= rstd;
    store(before ? load<Vector<T>>(before + i) + value : value, to + i);
  }
  close(to, n, out);
}

template <typename T>
void weight_gradient(
    In product, In weight, In gamma, In beta, T total, Out grad_weight, int64_t n, ColumnSums<T> sums) {
  T product_room[kSumChannels], weight_room[kSumChannels], gamma_room[kSumChannels], beta_room[kSumChannels],
      out_room[kSumChannels];
  const T* from = read(product, n, product_room);
  const T* weights = read(weight, n, weight_room);
  const T* factor = gamma.data ? read(gamma, n, gamma_room) : nullptr;
  const T* shift = beta.data ? read(beta, n, beta_room) : nullptr;
  T* to = open(grad_weight, n, out_room);
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vector<T> p = load<Vector<T>>(from + i), w = load<Vector<T>>(weights + i);
    store(load<Vector<T>>(sums.gamma + i) + w * p, sums.gamma + i);
    store(load<Vector<T>>(sums.beta + i) + w * total, sums.beta + i);
    Vector<T> value = factor ? p * load<Vector<T>>(factor + i) : p;
    if (shift) value += load<Vector<T>>(shift + i) * total;
    store(value, to + i);
  }
  close(to, n, grad_weight);
}

template <Activation activation, typename T>
void act_as(In u, Out a, int64_t n, const Dropout& dropout, uint64_t element) {
  T u_room[kPart], value_room[kPart], out_room[kPart];
  Words words;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t count = smaller(n - start, kPart);
    const T* from = read(part_of(u, start), count, u_room);
    const T* second = activation == Activation::kSwiglu ? read(part_of(u, n + start), count, value_room) : nullptr;
    T* to = open(part_of(a, start), count, out_room);
    const Keep<T> keep = words.draw<T>(dropout, element + static_cast<uint64_t>(start), count);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      Vector<T> value = activate<activation, T>(load<Vector<T>>(from + i)).value;
      if constexpr (activation == Activation::kSwiglu) value *= load<Vector<T>>(second + i);
      store(keep.apply(value, i), to + i);
    }
    close(to, count, part_of(a, start));
  }
}

template <Activation activation, typename T>
void act_bwd_as(In u, In grad_a, Out grad_u, Out a, int64_t n, const Dropout& dropout, uint64_t element) {
  constexpr bool kGated = activation == Activation::kSwiglu;
  T u_room[kPart], value_room[kPart], grad_room[kPart], grad_u_room[kPart], grad_value_room[kPart], a_room[kPart];
  Words words;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t count = smaller(n - start, kPart);
    const T* from = read(part_of(u, start), count, u_room);
    const T* second = kGated ? read(part_of(u, n + start), count, value_room) : nullptr;
    const T* grad = read(part_of(grad_a, start), count, grad_room);
    T* to = open(part_of(grad_u, start), count, grad_u_room);
    T* to_second = kGated ? open(part_of(grad_u, n + start), count, grad_value_room) : nullptr;
    T* again = open(part_of(a, start), count, a_room);
    const Keep<T> keep = words.draw<T>(dropout, element + static_cast<uint64_t>(start), count);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const ValueAndSlope<T> at = activate<activation, T>(load<Vector<T>>(from + i));
      const Vector<T> g = keep.apply(load<Vector<T>>(grad + i), i);
      if constexpr (kGated) {
        const Vector<T> value = load<Vector<T>>(second + i);
        store(keep.apply(at.value * value, i), again + i);
        store(g * (at.slope * value), to + i);
        store(g * at.value, to_second + i);
      } else {
        store(keep.apply(at.value, i), again + i);
        store(g * at.slope, to + i);
      }
    }
    close(to, count, part_of(grad_u, start));
    if constexpr (kGated) close(to_second, count, part_of(grad_u, n + start));
    close(again, count, part_of(a, start));
  }
}

template <typename T>
void act(Activation activation, In u, Out a, int64_t n, const Dropout& dropout, uint64_t element) {
  switch (activation) {
    case Activation::kGelu:
      return act_as<Activation::kGelu, T>(u, a, n, dropout, element);
    case Activation::kGeluTanh:
      return act_as<Activation::kGeluTanh, T>(u, a, n, dropout, element);
    case Activation::kRelu:
      return act_as<Activation::kRelu, T>(u, a, n, dropout, element);
    case Activation::kSilu:
      return act_as<Activation::kSilu, T>(u, a, n, dropout, element);
    case Activation::kSwiglu:
      return act_as<Activation::kSwiglu, T>(u, a, n, dropout, element);
    case Activation::kIdentity:
      return act_as<Activation::kIdentity, T>(u, a, n, dropout, element);
  }
}

template <typename T>
void act_bwd(
    Activation activation, In u, In grad_a, Out grad_u, Out a, int64_t n, const Dropout& dropout, uint64_t element) {
  switch (activation) {
    case Activation::kGelu:
      return act_bwd_as<Activation::kGelu, T>(u, grad_a, grad_u, a, n, dropout, element);
    case Activation::kGeluTanh:
      return act_bwd_as<Activation::kGeluTanh, T>(u, grad_a, grad_u, a, n, dropout, element);
    case Activation::kRelu:
      return act_bwd_as<Activation::kRelu, T>(u, grad_a, grad_u, a, n, dropout, element);
    case Activation::kSilu:
      return act_bwd_as<Activation::kSilu, T>(u, grad_a, grad_u, a, n, dropout, element);
    case Activation::kSwiglu:
      return act_bwd_as<Activation::kSwiglu, T>(u, grad_a, grad_u, a, n, dropout, element);
    case Activation::kIdentity:
      return act_bwd_as<Activation::kIdentity, T>(u, grad_a, grad_u, a, n, dropout, element);
  }
}

template <typename T>
constexpr RowKernels<T> kRowKernels = {
    add_branch<T>, branch_gradient<T>, normalise<T>, norm_gradient<T>, weight_gradient<T>, act<T>, act_bwd<T>};

#define LAYERDROP_NAME_OF(x) #x
#define LAYERDROP_NAME(x) LAYERDROP_NAME_OF(x)

}  // namespace

extern const InstructionSet kInstructionSet;
constexpr InstructionSet kInstructionSet = {
    LAYERDROP_NAME(LAYERDROP_INSTRUCTIONS), fill_blocks, kRowKernels<float>, kRowKernels<double>};

}  // namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS
