// The kernels of row_kernels.h, compiled once for each set of instructions and chosen when the program runs.
#pragma once

#include <vector>

#include "row_kernels.h"

namespace layerdrop_fast {

// Those that this processor can run, the widest first; the last runs on any x86-64. They write the same bits.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the widest, unless a test asked for another.
const InstructionSet& instruction_set();
void use_instruction_set(const InstructionSet& wanted);

template <typename T>
const RowKernels<T>& row_kernels();
template <>
inline const RowKernels<float>& row_kernels() {
  return instruction_set().float32;
}
template <>
inline const RowKernels<double>& row_kernels() {
  return instruction_set().float64;
}

}  // namespace layerdrop_fast
