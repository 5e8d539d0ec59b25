// quantize_backward: dx = (g M) H^T, with the mask M one bit a value; for output "original" g is rotated first: dx = ((g H) M) H^T.
// Without rotation dx = g M. One read of g and of the bits, one write of dx; H/sqrt(B) is symmetric, so both rotations are the forward one.
//
// Rows of whole aligned blocks of 128 values have no padding, not even in the mask: the problem is one flat array of blocks, a quad of
// lanes each (hadamard.cuh). All other rows go chunk by chunk (rows.cuh).
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

template <DType DTYPE>
__global__ __launch_bounds__(kRowsThreads) void quantize_backward_blocks_kernel(const void* grad, const uint8_t* mask, void* dx,
                                                                                int64_t blocks, float factor, bool rotate_first,
                                                                                bool rotate_last) {
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kRowsThreads + threadIdx.x) / 4;
  const int quad_lane = threadIdx.x % 4;
  const bool exists = block < blocks;
  const int64_t first = (block * (kQuadBlock / kChunk) + quad_lane) * RawChunk<DTYPE>::kBytes;
  RawChunk<DTYPE> raw[4];
  uint4 bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw[i].clear();
    if (exists) raw[i].load(static_cast<const uint8_t*>(grad) + first + i * 4 * RawChunk<DTYPE>::kBytes);
  }
  if (exists) bits = reinterpret_cast<const uint4*>(mask)[block];
  float x[kQuadValues];
#pragma unroll
  for (int i = 0; i < 4; ++i) raw[i].to_floats(x + i * kChunk);
  if (rotate_first) {
    hadamard_quad(x);
    multiply(x, factor);
  }
  // Chunk t + 4i has byte t of word i.
  const uint32_t words[4] = {bits.x >> (8 * quad_lane), bits.y >> (8 * quad_lane), bits.z >> (8 * quad_lane), bits.w >> (8 * quad_lane)};
#pragma unroll
  for (int i = 0; i < kQuadValues; ++i) x[i] = (words[i / kChunk] >> (i % kChunk) & 1u) != 0 ? x[i] : 0.0f;
  if (rotate_last) {
    hadamard_quad(x);
    multiply(x, factor);
  }
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw[i].from_floats(x + i * kChunk);
    raw[i].store(static_cast<uint8_t*>(dx) + first + i * 4 * RawChunk<DTYPE>::kBytes);
  }
}

}  // namespace

void quantize_backward(const Quantizer& quantizer, const void* grad, const uint8_t* mask, void* dx, DType dtype, int64_t rows, int64_t k,
                       cudaStream_t stream) {
  const char* op = "quantize_backward";
  check_grid(quantizer.grid);
  if (rows == 0 || k == 0) return;
  current_device(op);
  const int64_t block = rotation_block(quantizer, k);
  const bool rotate_first = quantizer.original && block > 1;
  const float factor = 1.0f / std::sqrt(static_cast<float>(block));
  const bool aligned = is_aligned(grad, 16) && is_aligned(dx, 16);
  if (k % kQuadBlock == 0 && aligned && is_aligned(mask, 16)) {
    const int64_t blocks = rows * (k / kQuadBlock);
    const dim3 grid = grid_of(op, (blocks * 4 + kRowsThreads - 1) / kRowsThreads);
    with_dtype(dtype, [&](auto type) {
      launch(op, quantize_backward_blocks_kernel<type()>, grid, dim3(kRowsThreads), 0, stream, grad, mask, dx, blocks, factor, rotate_first,
             block > 1);
    });
    return;
  }
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
  problem.factor = factor;
  problem.rotate_first = rotate_first;
  problem.vectorized = aligned && k * element_size(dtype) % 16 == 0;
  launch(op, quantize_backward_kernel, grid_of(op, blocks_of_rows(rows, k)), dim3(kRowsThreads), 0, stream, problem);
}

}  // namespace quest::cuda
