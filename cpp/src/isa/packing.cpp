// Codes to and from the packed layouts, 64 columns a step.
#include "isa/simd.h"

namespace quest::QUEST_ISA {

int64_t find_above(const uint8_t* codes, int64_t count, int32_t limit) {
  constexpr int64_t kBlock = 4096;  // looked through as a whole, then, if it has one, code by code
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    int32_t found = 0;
    for (int64_t i = begin; i < end; ++i) found |= codes[i] >= limit;
    for (int64_t i = begin; found && i < end; ++i) {
      if (codes[i] >= limit) return i;
    }
  }
  return -1;
}

void pack_rows(const PackTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < task.k; i += kChunk) {
      uint8_t codes[kChunk];
      read_codes(task.codes + r * task.k, Layout::kCodes, task.bits, 0, task.k, i, codes);
      write_codes(task.packed + r * task.row_bytes, task.layout, task.bits, task.plane_stride, task.row_bytes, i, codes);
    }
    // A row of planes is padded to 16 bytes, two steps.
    const uint8_t zeros[kChunk] = {};
    const int64_t written = (task.k + kChunk - 1) / kChunk * kChunk;
    write_codes(task.packed + r * task.row_bytes, task.layout, task.bits, task.plane_stride, task.row_bytes, written, zeros);
  }
}

void unpack_rows(const PackTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < task.k; i += kChunk) {
      uint8_t codes[kChunk];
      read_codes(task.packed + r * task.row_bytes, task.layout, task.bits, task.plane_stride, task.row_bytes, i, codes);
      write_codes(task.codes + r * task.k, Layout::kCodes, task.bits, 0, task.k, i, codes);
    }
  }
}

}  // namespace quest::QUEST_ISA
