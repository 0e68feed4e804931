// Everything that row_kernels_impl.h needs from elsewhere, included before the compiler is told of newer instructions:
// code in these headers may be shared with the rest of the program and must run on any processor.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "row_kernels.h"
