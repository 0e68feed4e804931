// The row kernels for AVX2.
#include "row_kernels_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
#define LAYERDROP_INSTRUCTIONS avx2
#define LAYERDROP_REGISTER_BYTES 32
#include "row_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
