// Low-bit matrix products: y[m, n] = s_a[m] s_w[n] sum_k v_a[m, k] v_w[n, k] + bias[n].
//
// The sum is an exact int32, whatever integers u are stored. With v = mul u + add for each operand (grid.h: affine), U = sum of u over the
// row:
//   sum v_a v_w = mul_a mul_w sum u_a u_w + mul_a add_w U_a + mul_w add_a U_w + K add_a add_w
// taken modulo 2^32 (unsigned), so that no intermediate overflows before the result, which fits: check_gemm_depth. Then, in float32 on
// every backend, y = fma(float(sum) * s_a, s_w, bias): three roundings, and one to the type of y.
// Bit planes: sum c_a c_w = sum_ij 2^(i+j) popcount(plane_i(a) & plane_j(w)).
#pragma once

#include <cstdint>

#include "quest/parallel.h"
#include "quest/types.h"

namespace quest {

// One side of a product: a [rows, K] matrix of codes with a scale per row, as `quantize` writes it.
struct Operand {
  Grid grid;
  Layout layout;
  const void* data;
  const float* scale;              // [rows]
  const int32_t* code_sum;         // [rows]
  const uint8_t* index = nullptr;  // 4:8 sparse weight: [rows, index_row_bytes(K)]; data then holds the K/2 kept codes
};

// The largest K for which the sum of products of two grids fits int32: 33 025 at 8 x 8 bits, 133 144 at 7 x 7.
int64_t max_gemm_depth(Grid a, Grid w);
// Throws quest::Error, with `op` as the operation's name, when k is larger.
void check_gemm_depth(const char* op, Grid a, Grid w, int64_t k);

// a: [m, k], w: [n, k]; bias: float32 [n] or nullptr; y: [m, n] of dtype.
// gemm_int8: each operand kValues or kCodes (any grid with values).
void gemm_int8(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               const ParallelFor& parallel_for);
// gemm_int4: w kPacked; a kEvenOdd (whose columns meet the halves of w's bytes), kPacked, kValues or kCodes.
void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               const ParallelFor& parallel_for);
// gemm_planes: both kPlanes, int grids of 1 to 4 bits.
void gemm_planes(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 const ParallelFor& parallel_for);
// gemm_sparse: w kPacked with a 4:8 index; a kEvenOdd (which Hopper's sparse instructions take), kValues or kPacked, dense. 8 divides k.
void gemm_sparse(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 const ParallelFor& parallel_for);
// gemm_weight_only: x is real, [m, k] of dtype (rotated already if w is); w any grid, kCodes, kPacked or kPlanes. Accumulates in float32.
void gemm_weight_only(const void* x, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                      const ParallelFor& parallel_for);

}  // namespace quest
