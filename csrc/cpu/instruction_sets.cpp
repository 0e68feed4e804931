#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace layerdrop_fast {

#if defined(__x86_64__)
namespace avx512 {
extern const InstructionSet kInstructionSet;
}
namespace avx2 {
extern const InstructionSet kInstructionSet;
}
#endif
namespace baseline {
extern const InstructionSet kInstructionSet;
}

namespace {

std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports does not know F16C in clang 14. avx2 implies that the system saves the wider registers.
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(avx512::kInstructionSet);
  if (avx2) found.push_back(avx2::kInstructionSet);
#endif
  found.push_back(baseline::kInstructionSet);
  return found;
}

const InstructionSet*& in_use() {
  static const InstructionSet* set = &instruction_sets().front();
  return set;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> found = find_instruction_sets();
  return found;
}

const InstructionSet& instruction_set() {
  return *in_use();
}

void use_instruction_set(const InstructionSet& wanted) {
  in_use() = &wanted;
}

}  // namespace layerdrop_fast
