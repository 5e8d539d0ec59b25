// Tensor maps: how the copy engine of sm_90 finds a box of a matrix, made on the host for each launch and passed to it by value.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"

namespace quest::cuda {

// The driver's cuTensorMapEncodeTiled, found at run time so that nothing links against the driver library.
inline auto tensor_map_encoder(const char* op) {
  static PFN_cuTensorMapEncodeTiled_v12000 const encoder = [op] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    check(result == cudaDriverEntryPointSuccess, op, ": expected a driver with cuTensorMapEncodeTiled (CUDA 12.0 or newer), found none");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// A dimension of a tensor: its elements, the bytes from one to the next (of the first dimension: those of an element), and how many a box
// has.
struct TensorDimension {
  int64_t size, stride;
  uint32_t box;
};

// What a box holds beyond the tensor is zero. base and strides but the first: multiples of 16.
template <size_t RANK>
CUtensorMap tensor_map(const char* op, CUtensorMapDataType type, const void* base, const TensorDimension (&dimensions)[RANK],
                       CUtensorMapSwizzle swizzle) {
  cuuint64_t sizes[RANK], strides[RANK];
  cuuint32_t extents[RANK], steps[RANK];
  for (size_t i = 0; i < RANK; ++i) {
    sizes[i] = static_cast<cuuint64_t>(dimensions[i].size);
    strides[i] = static_cast<cuuint64_t>(dimensions[i].stride);
    extents[i] = dimensions[i].box;
    steps[i] = 1;
  }
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder(op)(&map, type, RANK, const_cast<void*>(base), sizes, strides + 1, extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, op, ": the driver refused a tensor map of ", dimensions[0].size, " elements in rows of ",
        dimensions[1].stride, " bytes (error ", static_cast<int>(result), ")");
  return map;
}

}  // namespace quest::cuda
