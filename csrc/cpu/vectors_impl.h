// Vectors of one register, and rows of any dtype read and written as them; see row_kernels.h and row_kernels_impl.h.
#pragma once

namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(LAYERDROP_REGISTER_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int64_t kLanes = LAYERDROP_REGISTER_BYTES / sizeof(T);

using Float32s = Vector<float>;
using Bits32 = Vector<uint32_t>;
// As many numbers of bfloat16 or float16 as Float32s has, and as many words as Vector<double> has numbers.
typedef uint16_t Halves __attribute__((vector_size(LAYERDROP_REGISTER_BYTES / 2)));
typedef uint32_t HalfBits32 __attribute__((vector_size(LAYERDROP_REGISTER_BYTES / 2)));

template <typename T>
constexpr DType kDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

template <typename V>
LAYERDROP_INLINE V load(const void* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}

template <typename V>
LAYERDROP_INLINE void store(V value, void* target) {
  __builtin_memcpy(target, &value, sizeof(V));
}

template <typename To, typename From>
LAYERDROP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

LAYERDROP_INLINE Float32s from_bfloat16(Halves halves) {
  return bit_cast<Float32s>(__builtin_convertvector(halves, Bits32) << 16);
}

// To the nearest, halves to even; every NaN becomes the same one.
LAYERDROP_INLINE Halves to_bfloat16(Float32s value) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(value != value ? Bits32{} + 0x7FC0u : rounded, Halves);
}

#if LAYERDROP_REGISTER_BYTES == 64

// With full masks: see fill_blocks_impl.h.
LAYERDROP_INLINE Float32s from_float16(Halves halves) {
  return bit_cast<Float32s>(_mm512_maskz_cvtph_ps(0xFFFF, bit_cast<__m256i>(halves)));
}

LAYERDROP_INLINE Halves to_float16(Float32s value) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xFFFF, bit_cast<__m512>(value), kNearest));
}

#elif LAYERDROP_REGISTER_BYTES == 32

LAYERDROP_INLINE Float32s from_float16(Halves halves) {
  return bit_cast<Float32s>(_mm256_cvtph_ps(bit_cast<__m128i>(halves)));
}

LAYERDROP_INLINE Halves to_float16(Float32s value) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(value), kNearest));
}

#else

// A normal number's exponent moves from a bias of 15 to one of 127; a subnormal one counts units of 2^-24.
LAYERDROP_INLINE Float32s from_float16(Halves halves) {
  const Bits32 bits = __builtin_convertvector(halves, Bits32), magnitude = bits & 0x7FFFu;
  const Bits32 normal = (magnitude << 13) + 0x38000000u;
  const Float32s units = __builtin_convertvector(bit_cast<Vector<int32_t> >(magnitude), Float32s);
  const Bits32 small = bit_cast<Bits32>(units * 0x1p-24f);
  const Bits32 special = magnitude << 13 | 0x7F800000u | (magnitude > 0x7C00u ? Bits32{} + 0x400000u : Bits32{});
  const Bits32 finite = magnitude < 0x400u ? small : normal;
  return bit_cast<Float32s>((magnitude >= 0x7C00u ? special : finite) | (bits & 0x8000u) << 16);
}

// Halves to even. Below 2^-14 the sum with 1/2 has float16's subnormal numbers for its last bits.
LAYERDROP_INLINE Halves to_float16(Float32s value) {
  const Bits32 bits = bit_cast<Bits32>(value), magnitude = bits & 0x7FFFFFFFu;
  const Bits32 small = bit_cast<Bits32>(bit_cast<Float32s>(magnitude) + 0.5f) - 0x3F000000u;
  const Bits32 normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const Bits32 nan = (magnitude >> 13 & 0x3FFu) | 0x7E00u;
  const Bits32 special = magnitude > 0x7F800000u ? nan : Bits32{} + 0x7C00u;
  const Bits32 finite = magnitude < 0x38800000u ? small : normal;
  return __builtin_convertvector((magnitude >= 0x477FF000u ? special : finite) | (bits >> 16 & 0x8000u), Halves);
}

#endif

template <Float32s convert(Halves)>
LAYERDROP_INLINE void widen(const void* source, int64_t n, float* wide) {
  const char* from = static_cast<const char*>(source);
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) store(convert(load<Halves>(from + 2 * i)), wide + i);
  if (i < n) {
    Halves rest = {};
    __builtin_memcpy(&rest, from + 2 * i, static_cast<size_t>(2 * (n - i)));
    store(convert(rest), wide + i);
  }
}

template <Halves convert(Float32s)>
LAYERDROP_INLINE void narrow(const float* wide, int64_t n, void* target) {
  char* to = static_cast<char*>(target);
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) store(convert(load<Float32s>(wide + i)), to + 2 * i);
  if (i < n) {
    const Halves rest = convert(load<Float32s>(wide + i));
    __builtin_memcpy(to + 2 * i, &rest, static_cast<size_t>(2 * (n - i)));
  }
}

template <typename From, typename To>
LAYERDROP_INLINE void cast(const void* source, int64_t n, void* target) {
  for (int64_t i = 0; i < n; ++i) {
    const To value = static_cast<To>(load<From>(static_cast<const From*>(source) + i));
    store(value, static_cast<To*>(target) + i);
  }
}

// Out of line: sixteen conversions in every kernel would make the object several times as large.
__attribute__((noinline)) void read_into(In in, int64_t n, float* room) {
  switch (in.dtype) {
    case DType::kFloat64:
      cast<double, float>(in.data, n, room);
      break;
    case DType::kFloat32:
      __builtin_memcpy(room, in.data, static_cast<size_t>(4 * n));
      break;
    case DType::kBFloat16:
      widen<from_bfloat16>(in.data, n, room);
      break;
    case DType::kFloat16:
      widen<from_float16>(in.data, n, room);
      break;
  }
}

__attribute__((noinline)) void read_into(In in, int64_t n, double* room) {
  float wide[kRowPadding];
  for (int64_t i = 0; i < n; i += kRowPadding) {
    const int64_t count = n - i < kRowPadding ? n - i : kRowPadding;
    const void* part = static_cast<const char*>(in.data) + i * size_of(in.dtype);
    if (in.dtype == DType::kFloat64) {
      __builtin_memcpy(room + i, part, static_cast<size_t>(8 * count));
    } else {
      read_into({part, in.dtype}, count, wide);
      cast<float, double>(wide, count, room + i);
    }
  }
}

__attribute__((noinline)) void write_from(const float* written, int64_t n, Out out) {
  switch (out.dtype) {
    case DType::kFloat64:
      cast<float, double>(written, n, out.data);
      break;
    case DType::kFloat32:
      __builtin_memcpy(out.data, written, static_cast<size_t>(4 * n));
      break;
    case DType::kBFloat16:
      narrow<to_bfloat16>(written, n, out.data);
      break;
    case DType::kFloat16:
      narrow<to_float16>(written, n, out.data);
      break;
  }
}

__attribute__((noinline)) void write_from(const double* written, int64_t n, Out out) {
  float wide[kRowPadding] = {};
  for (int64_t i = 0; i < n; i += kRowPadding) {
    const int64_t count = n - i < kRowPadding ? n - i : kRowPadding;
    void* part = static_cast<char*>(out.data) + i * size_of(out.dtype);
    if (out.dtype == DType::kFloat64) {
      __builtin_memcpy(part, written + i, static_cast<size_t>(8 * count));
    } else {
      cast<double, float>(written + i, count, wide);
      write_from(wide, count, {part, out.dtype});
    }
  }
}

// The row as T, zero beyond its end up to a whole number of vectors: the row itself where it is that already, else
// `room`, which has padded(n) elements.
template <typename T>
LAYERDROP_INLINE const T* read(In in, int64_t n, T* room) {
  if (in.dtype == kDType<T> && n % kLanes<T> == 0) return static_cast<const T*>(in.data);
  if (n % kLanes<T> != 0) store(Vector<T>{}, room + n / kLanes<T> * kLanes<T>);
  read_into(in, n, room);
  return room;
}

// Where to write a row of T: into the row itself where it takes whole vectors of T, else into `room`, from which
// `close` brings it to its place.
template <typename T>
LAYERDROP_INLINE T* open(Out out, int64_t n, T* room) {
  return out.dtype == kDType<T> && n % kLanes<T> == 0 ? static_cast<T*>(out.data) : room;
}

template <typename T>
LAYERDROP_INLINE void close(const T* written, int64_t n, Out out) {
  if (written != out.data) write_from(written, n, out);
}

inline In part_of(In row, int64_t start) {
  return {static_cast<const char*>(row.data) + start * size_of(row.dtype), row.dtype};
}
inline Out part_of(Out row, int64_t start) {
  return {static_cast<char*>(row.data) + start * size_of(row.dtype), row.dtype};
}

}  // namespace
}  // namespace layerdrop_fast::LAYERDROP_INSTRUCTIONS
