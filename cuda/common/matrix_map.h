// The tensor map of a matrix, or of several one behind another.
#pragma once

#include <cstdint>

#include "common/tensor_map.h"

namespace quest::cuda {

struct Box {
  uint32_t columns, rows;
  CUtensorMapSwizzle swizzle;
};

// planes x rows x columns elements of `bytes` each, rows `row_bytes` apart.
inline CUtensorMap matrix_map(const char* op, CUtensorMapDataType type, int64_t bytes, const void* base, int64_t columns, int64_t rows,
                              int64_t planes, int64_t row_bytes, Box box) {
  return tensor_map(op, type, base, {{columns, bytes, box.columns}, {rows, row_bytes, box.rows}, {planes, row_bytes * rows, 1}},
                    box.swizzle);
}

}  // namespace quest::cuda
