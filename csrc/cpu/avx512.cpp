// The row kernels for AVX-512.
#include "row_kernels_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif
#define LAYERDROP_INSTRUCTIONS avx512
#define LAYERDROP_REGISTER_BYTES 64
#include "row_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
