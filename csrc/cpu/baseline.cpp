// The row kernels for any x86-64, and any other processor.
#include "row_kernels_headers.h"

#define LAYERDROP_INSTRUCTIONS baseline
#define LAYERDROP_REGISTER_BYTES 16
#include "row_kernels_impl.h"
