// cuda/common/tensor_map.h: a CUtensorMap whose 128 bytes hold a description of the host's own.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/check.h"

namespace quest::cuda {

struct TensorDimension {
  int64_t size, stride;
  uint32_t box;
};

constexpr int kMostDimensions = 5;
struct TensorDescription {
  int32_t rank;
  uint8_t* base;
  int64_t stride[kMostDimensions];  // the first: of an element
  int32_t size[kMostDimensions];
  uint16_t box[kMostDimensions];
  uint8_t swizzle;
};
static_assert(sizeof(TensorDescription) <= sizeof(CUtensorMap), "it travels in its place");

template <size_t RANK>
CUtensorMap tensor_map(const char* op, CUtensorMapDataType, const void* base, const TensorDimension (&dimensions)[RANK],
                       CUtensorMapSwizzle swizzle) {
  check(is_aligned(base, 16), op, ": a tensor map of memory at no multiple of 16");
  TensorDescription description{};
  description.rank = static_cast<int32_t>(RANK);
  description.base = static_cast<uint8_t*>(const_cast<void*>(base));
  description.swizzle = static_cast<uint8_t>(swizzle);
  for (int i = 0; i < kMostDimensions; ++i) {
    const bool exists = i < static_cast<int>(RANK);
    const TensorDimension dimension = exists ? dimensions[exists ? i : 0] : TensorDimension{1, 0, 1};
    check(dimension.size > 0 && dimension.size <= INT32_MAX && dimension.box <= 256, op, ": a tensor map with a size or box out of range");
    check(i == 0 || dimension.stride % 16 == 0, op, ": a tensor map with a stride that is no multiple of 16");
    description.size[i] = static_cast<int32_t>(dimension.size);
    description.stride[i] = dimension.stride;
    description.box[i] = static_cast<uint16_t>(dimension.box);
  }
  CUtensorMap map;
  std::memcpy(static_cast<void*>(&map), &description, sizeof description);
  return map;
}

}  // namespace quest::cuda
