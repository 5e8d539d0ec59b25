// quantize_backward: dx = (g M) H^T, with the mask M one bit a value; for output "original" g is rotated first: dx = ((g H) M) H^T.
// Without rotation dx = g M. One read of g and of the bits, one write of dx; H/sqrt(B) is symmetric, so both rotations are the forward one.
#include <cmath>

#include "common/check.h"
#include "common/hadamard.cuh"
#include "common/rows.cuh"
#include "quest/cuda/quantize.h"
#include "quest/grid.h"
#include "quest/packing.h"
#include "quest/rotation.h"

namespace quest::cuda {
namespace {

struct Problem {
  const void* grad;
  const uint8_t* mask;
  void* dx;
  DType dtype;
  int64_t rows, k, warps_a_row, mask_row_bytes;
  int block;  // 1: no rotation
  float factor;
  bool rotate_first;
  bool vectorized;
};

__global__ __launch_bounds__(kRowsThreads) void quantize_backward_kernel(const __grid_constant__ Problem problem) {
  const ChunkPosition at = chunk_position(problem.rows, problem.k, problem.warps_a_row);
  if (!at.exists) return;
  const int64_t index = at.row * problem.k + at.chunk * kChunk;
  float x[kChunk];
  load_chunk(x, problem.grad, problem.dtype, index, at.count, problem.vectorized);
  const uint32_t mask = at.count > 0 ? problem.mask[at.row * problem.mask_row_bytes + at.chunk] : 0u;
  if (problem.rotate_first) {
    hadamard_warp(x, problem.block);
    multiply(x, problem.factor);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = (mask >> i & 1u) != 0 ? x[i] : 0.0f;
  if (problem.block > 1) {
    hadamard_warp(x, problem.block);
    multiply(x, problem.factor);
  }
  store_chunk(problem.dx, x, problem.dtype, index, at.count, problem.vectorized);
}

}  // namespace

void quantize_backward(const Quantizer& quantizer, const void* grad, const uint8_t* mask, void* dx, DType dtype, int64_t rows, int64_t k,
                       cudaStream_t stream) {
  const char* op = "quantize_backward";
  check_grid(quantizer.grid);
  if (rows == 0 || k == 0) return;
  current_device(op);
  const int64_t block = quantizer.rotation == Rotation::kHadamard ? default_block(k) : 1;
  Problem problem{};
  problem.grad = grad;
  problem.mask = mask;
  problem.dx = dx;
  problem.dtype = dtype;
  problem.rows = rows;
  problem.k = k;
  problem.warps_a_row = warps_of_row(k);
  problem.mask_row_bytes = plane_row_bytes(k);
  problem.block = static_cast<int>(block);
  problem.factor = 1.0f / std::sqrt(static_cast<float>(block));
  problem.rotate_first = quantizer.original && block > 1;
  problem.vectorized = is_aligned(grad, 16) && is_aligned(dx, 16) && k * element_size(dtype) % 16 == 0;
  launch(op, quantize_backward_kernel, grid_of(op, blocks_of_rows(rows, k)), dim3(kRowsThreads), 0, stream, problem);
}

}  // namespace quest::cuda
