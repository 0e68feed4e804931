// Random words of many consecutive elements, with the widest instructions that this processor has.
#pragma once

#include <cstdint>
#include <vector>

#include "../philox.h"

namespace layerdrop_fast {

// fill_blocks writes whole groups of this many blocks.
constexpr int64_t kBlockGroup = 8;

// out[0 .. 4 * num_blocks): the words of blocks first_block and on, in element order.
// num_blocks is a multiple of kBlockGroup.
using FillBlocks = void(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out);

struct InstructionSet {
  const char* name;
  FillBlocks* fill_blocks;
};

// Those that this processor can run, the widest first; the last is plain C++. They write the same words.
const std::vector<InstructionSet>& instruction_sets();

inline void fill_blocks(const Philox4& key, uint32_t site, uint64_t first_block, int64_t num_blocks, uint32_t* out) {
  static FillBlocks* const widest = instruction_sets().front().fill_blocks;
  widest(key, site, first_block, num_blocks, out);
}

}  // namespace layerdrop_fast
