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

struct Box {
  uint32_t columns, rows;
  CUtensorMapSwizzle swizzle;
};

// planes x rows x columns elements, rows `row_bytes` apart; what a box holds beyond them is zero. base and row_bytes: multiples of 16.
inline CUtensorMap tensor_map(const char* op, CUtensorMapDataType type, int rank, const void* base, int64_t columns, int64_t rows,
                              int64_t planes, int64_t row_bytes, Box box) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(row_bytes * rows)};
  const cuuint32_t extents[3] = {box.columns, box.rows, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides,
                                                 extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, box.swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, op, ": the driver refused a tensor map of ", rows, " x ", columns, " elements in rows of ", row_bytes,
        " bytes (error ", static_cast<int>(result), ")");
  return map;
}

}  // namespace quest::cuda
