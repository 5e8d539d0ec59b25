// The tensor maps of a matrix, or of several one behind another, and of a weight, and where its boxes are.
#pragma once

#include <cstdint>

#include "common/tensor_map.h"

namespace quest::cuda {

struct Box {
  uint32_t columns, rows;
  CUtensorMapSwizzle swizzle;
  uint32_t planes = 1;
};

// planes x rows x columns elements of `bytes` each, rows `row_bytes` apart.
inline CUtensorMap matrix_map(const char* op, CUtensorMapDataType type, int64_t bytes, const void* base, int64_t columns, int64_t rows,
                              int64_t planes, int64_t row_bytes, Box box) {
  return tensor_map(op, type, base, {{columns, bytes, box.columns}, {rows, row_bytes, box.rows}, {planes, row_bytes * rows, box.planes}},
                    box.swizzle);
}

// A weight for the left operand of the tensor cores, planes x rows x row_bytes bytes, in five dimensions. evens_first: of 16 rows the even
// ones come first, then the odd ones, so that a lane, which has rows g and g + 8 of 16, has two neighbours. `rows` and a box's are
// multiples of 16 then.
inline CUtensorMap weight_map(const char* op, const void* base, int64_t rows, int64_t planes, int64_t row_bytes, Box box,
                              bool evens_first) {
  const TensorDimension columns{row_bytes, 1, box.columns}, plane{planes, row_bytes * rows, box.planes}, one{1, row_bytes, 1};
  if (!evens_first) {
    return tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, base, {columns, {rows, row_bytes, box.rows}, one, one, plane}, box.swizzle);
  }
  return tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, base,
                    {columns, {8, 2 * row_bytes, 8}, {2, row_bytes, 2}, {rows / 16, 16 * row_bytes, box.rows / 16}, plane}, box.swizzle);
}

// Where a box is, in five dimensions.
struct BoxAt {
  int at[5];
};

// A weight's at (column, row, plane).
__device__ __forceinline__ BoxAt weight_at(int column, int row, int plane, bool evens_first) {
  return {{column, evens_first ? 0 : row, 0, evens_first ? row / 16 : 0, plane}};
}

}  // namespace quest::cuda
