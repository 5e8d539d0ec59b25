// The products on Hopper's wgmma (gemm_wgmma.cuh), as the operations call them: instantiated in kernels/gemm_*_wgmma.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/check.h"
#include "common/epilogue.cuh"
#include "quest/gemm.h"
#include "quest/plan.h"

namespace quest::cuda {

// Whether the copy engine can read both operands: rows that start at multiples of 16 bytes.
inline bool copies_tensors(const Operand& a, const Operand& w, int64_t k) {
  return k > 0 && is_aligned(a.data, 16) && is_aligned(w.data, 16) && row_bytes(a.layout, k) % 16 == 0 && row_bytes(w.layout, k) % 16 == 0;
}

// a: kValues, w: kPacked. Not fp4 with 8 bits.
void gemm_int4_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                     const Device& device, cudaStream_t stream);
// a: kValues, w: kValues or kCodes. fp4: as kValues, and with another grid only where that is kValues of less than 8 bits.
void gemm_int8_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                     const Device& device, cudaStream_t stream);
// a, w: kPlanes.
void gemm_planes_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                       const Device& device, cudaStream_t stream);

}  // namespace quest::cuda
