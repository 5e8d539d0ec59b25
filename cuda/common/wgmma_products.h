// The products on Hopper's wgmma (gemm_wgmma.cuh, gemm_few.cuh, gemm_stationary.cuh, gemm_fixed.cuh), as the operations call them:
// instantiated in kernels/gemm_*_wgmma.cu.
//
// Each runs the product and returns true if it can: on a GPU that has this code, for operands that the copy engine can read and whose
// values follow from what is stored. Otherwise it does nothing and returns false.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/check.h"
#include "common/epilogue.cuh"
#include "quest/gemm.h"
#include "quest/plan.h"

namespace quest::cuda {

// a: kEvenOdd, kValues or kCodes, w: kPacked.
bool gemm_int4_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream);
// a, w: kValues or kCodes.
bool gemm_int8_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream);
// a, w: kPlanes.
bool gemm_planes_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream);
// a: kEvenOdd, w: kPacked with a 4:8 index.
bool gemm_sparse_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream);

// x: few rows of 16-bit floats (gemm_fixed.cuh), w: on a grid of integers.
bool gemm_weight_only_wgmma(const char* op, const void* x, const Operand& w, const Output& output, int64_t k, const Device& device,
                            cudaStream_t stream);

// x: many rows of 16-bit floats, w: on a grid of integers (gemm_wgmma.cuh).
bool gemm_widened_wgmma(const char* op, const void* x, const Operand& w, const Output& output, int64_t k, const Device& device,
                        cudaStream_t stream);

}  // namespace quest::cuda
