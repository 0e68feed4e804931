// Activations and their derivatives; see row_kernels.h and row_kernels_impl.h. The specification, and the sources, are
// in layerdrop_fast/reference/act_linear.py.
#pragma once

#include "vectors_impl.h"

namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS {
namespace {

template <typename T>
struct ValueAndSlope {
  Vector<T> value, slope;
};

// Polynomials are added in pairs (Estrin's scheme): their terms need not wait for one another.

// exp(x) = power * rest: x = n ln 2 + r with |r| <= ln 2 / 2, power = 2^n for n in [-126, 127], rest = exp(r).
struct Exponential {
  Float32s power, rest;
};

LAYERDROP_INLINE Exponential exponential_parts(Float32s x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  // ln 2 in two parts: the first has 9 bits, so that its product with n is exact.
  constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  // Adding 1.5 * 2^23 rounds to an integer and puts it into the low bits.
  const Float32s shifted = x * kLog2E + 0x1.8p23f;
  const Float32s n = shifted - 0x1.8p23f;
  const Float32s r = (x - n * kLn2High) - n * kLn2Low, r2 = r * r;
  // exp(r) = 1 + r + r^2 p(r), p a minimax polynomial with an error of 2^-27 of exp(r).
  const Float32s low = r * 0.166665769622f + 0.499999995502f, high = r * 0.0083632000573f + 0.0416668540943f;
  const Float32s p = low + r2 * (high + r2 * 0.00139013098185f);
  return {bit_cast<Float32s>((bit_cast<Bits32>(shifted) + 127u) << 23), r2 * p + r + 1.0f};
}

// Relative error below 2^-22. A result below 2^-126 is 0.
LAYERDROP_INLINE Float32s exponential_of_negative(Float32s x) {
  const Exponential parts = exponential_parts(x);
  return x < -0x1.5d589ep6f ? Float32s{} : parts.rest * parts.power;
}

// The same for any x; a result below 2^-125 is 0, one above float32 infinite.
LAYERDROP_INLINE Float32s exponential(Float32s x) {
  const Exponential parts = exponential_parts(x);
  // n = 128 has left in power the bits of an exponent that float32 does not have: half of it, twice the result.
  const Float32s half_power = bit_cast<Float32s>(bit_cast<Bits32>(parts.power) - (1u << 23));
  const Float32s result = parts.rest * half_power * 2.0f;
  const Float32s saturated = x > 0x1.62e43p6f ? Float32s{} + __builtin_inff() : result;
  return x < -0x1.5a92d6p6f ? Float32s{} : saturated;
}

// exp(z^2) * erfc(z) / 2 for z >= 0: t * q(t), t = 1 / (1 + 0.45 z), q a minimax polynomial with an error of 2^-24.
LAYERDROP_INLINE Float32s half_scaled_erfc(Float32s z) {
  const Float32s t = 1.0f / (1.0f + 0.45f * z), t2 = t * t, t4 = t2 * t2;
  const Float32s q01 = t * 0.1269415815f + 0.1269426604f, q23 = t * 0.08762608283f + 0.1141358192f;
  const Float32s q45 = t * -0.01117863435f + 0.05997510884f, q67 = t * -0.1502906011f + 0.07119987338f;
  const Float32s q89 = t * -0.02069547246f + 0.09534358872f;
  return t * ((q01 + t2 * q23) + t4 * ((q45 + t2 * q67) + t4 * q89));
}

struct NormalDistribution32 {
  Float32s cdf, bell;  // bell = exp(-u^2 / 2)
};

LAYERDROP_INLINE NormalDistribution32 normal_distribution(Float32s u) {
  const Float32s bell = exponential_of_negative(u * u * -0.5f);
  const Float32s magnitude = bit_cast<Float32s>(bit_cast<Bits32>(u) & 0x7FFFFFFFu);
  const Float32s tail = half_scaled_erfc(magnitude * 0.707106781187f) * bell;
  return {u < 0.0f ? tail : 1.0f - tail, bell};
}

// float64 serves checks of gradients: it calls the C library, one element at a time.
struct NormalDistribution64 {
  Vector<double> cdf, bell;
};

LAYERDROP_INLINE NormalDistribution64 normal_distribution(Vector<double> u) {
  NormalDistribution64 result;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    result.cdf[lane] = ::erfc(u[lane] * -0.70710678118654752440) / 2;
    result.bell[lane] = ::exp(u[lane] * u[lane] * -0.5);
  }
  return result;
}

LAYERDROP_INLINE Vector<double> exponential(Vector<double> x) {
  Vector<double> result;
  for (int lane = 0; lane < kLanes<double>; ++lane) result[lane] = ::exp(x[lane]);
  return result;
}

template <typename T>
struct Sigmoid {
  Vector<T> value, complement;  // complement = 1 - value, with the digits that the difference would lose
};

template <typename T>
LAYERDROP_INLINE Sigmoid<T> sigmoid(Vector<T> x) {
  const Vector<T> e = exponential(-x), value = T{1} / (T{1} + e);
  return {value, x > T{0} ? e * value : T{1} - value};
}

template <typename T>
LAYERDROP_INLINE ValueAndSlope<T> gelu(Vector<T> u) {
  const auto normal = normal_distribution(u);
  return {u * normal.cdf, normal.cdf + u * normal.bell * T(0.39894228040143267794)};
}

// (1 + tanh(w)) / 2 is the sigmoid of 2w.
template <typename T>
LAYERDROP_INLINE ValueAndSlope<T> gelu_tanh(Vector<T> u) {
  constexpr T kTwiceSlope = T(1.59576912160573071176);  // 2 sqrt(2 / pi)
  const Vector<T> square = u * u;
  const Sigmoid<T> s = sigmoid<T>(kTwiceSlope * (u + T(0.044715) * square * u));
  return {u * s.value, s.value + u * s.value * s.complement * kTwiceSlope * (T{1} + T(3 * 0.044715) * square)};
}

template <typename T>
LAYERDROP_INLINE ValueAndSlope<T> silu(Vector<T> u) {
  const Sigmoid<T> s = sigmoid<T>(u);
  return {u * s.value, s.value * (T{1} + u * s.complement)};
}

template <typename T>
LAYERDROP_INLINE ValueAndSlope<T> relu(Vector<T> u) {
  const Vector<T> zero = {};
  return {u < T{0} ? zero : u, u > T{0} ? zero + T{1} : zero};
}

template <Activation activation, typename T>
LAYERDROP_INLINE ValueAndSlope<T> activate(Vector<T> u) {
  if constexpr (activation == Activation::kGelu) return gelu<T>(u);
  if constexpr (activation == Activation::kGeluTanh) return gelu_tanh<T>(u);
  if constexpr (activation == Activation::kRelu) return relu<T>(u);
  if constexpr (activation == Activation::kSilu || activation == Activation::kSwiglu) return silu<T>(u);
  if constexpr (activation == Activation::kIdentity) return {u, Vector<T>{} + T{1}};
}

}  // namespace
}  // namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS
