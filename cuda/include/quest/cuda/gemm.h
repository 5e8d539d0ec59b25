// The low-bit matrix products on the GPU: quest/gemm.h says what they compute.
//
// All pointers are device memory. Asynchronous on `stream`; no workspace; the same operands give the same bits in every run.
// kPacked and kPlanes operands and indices must start at a multiple of 16 bytes; other operands are fastest when they do and 16 bytes
// divide a row. Integer sums are exact. gemm_weight_only of bfloat16 or float16 rounds the levels of a gauss grid to that type (other
// levels are exact in it). On Hopper, where plan_fixed says so and plan_widened does not, it takes x as fixed-point numbers of 16 bits (15
// for 8-bit weights), in which a bfloat16 of at least 2^-6 (2^-5) of the largest magnitude in its 512 or 1024 columns is exact, a float16
// of at least 2^-3 (2^-2), and what is smaller is off by about 2^-15 (2^-14) of the largest; a row with a NaN or an infinity gives NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quest/gemm.h"
#include "quest/plan.h"

namespace quest::cuda {

// A product's shape and the current device, for plan_operands. (Without the code of sm_90a, Hopper counts as the generation before it.)
GemmShape shape_on_device(int64_t m, int64_t n, int64_t k);

void gemm_int8(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream);
void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream);
void gemm_planes(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 cudaStream_t stream);
void gemm_sparse(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 cudaStream_t stream);
void gemm_weight_only(const void* x, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                      cudaStream_t stream);

// Whether a product with the dequantized weight, of which there are fast ones for floats, is faster than gemm_weight_only (of operands that
// start at multiples of 16 bytes); and what is left of one: y += bias, rounded.
bool weight_only_dequantizes(const Operand& w, DType dtype, int64_t m, int64_t n, int64_t k);
void add_bias(const float* bias, void* y, DType dtype, int64_t m, int64_t n, cudaStream_t stream);

}  // namespace quest::cuda
