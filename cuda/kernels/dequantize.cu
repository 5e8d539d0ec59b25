// dequantize: x-hat = s v(c) from any layout, rotated back for output "original". One read of the codes, one write of y.
#include <cmath>

#include "common/check.h"
#include "common/grid.cuh"
#include "common/hadamard.cuh"
#include "common/rows.cuh"
#include "quest/cuda/quantize.h"
#include "quest/packing.h"
#include "quest/rotation.h"

namespace quest::cuda {
namespace {

struct Problem {
  const uint8_t* codes;
  const float* scale;
  const uint8_t* index;  // nullptr: dense
  bool half;             // only the kept codes are stored
  void* y;
  Layout layout;
  int bits;
  DType dtype;
  int64_t rows, k, warps_a_row, code_row_bytes, index_row_bytes;
  float value_mul, value_add;  // of layout kValues: v = value_mul u + value_add
  int block;                   // 1: not rotated back
  float factor;
  bool vectorized_codes, vectorized_output;
};

// The codes of one chunk. Where only 4 are kept, they move to the pairs that `pairs` names; the others are not meant.
__device__ uint2 load_codes(const Problem& problem, const ChunkPosition& at, uint32_t pairs) {
  const bool half = problem.half;
  const uint8_t* row = problem.codes + at.row * problem.code_row_bytes;
  uint2 codes = make_uint2(0, 0);
  switch (problem.layout) {
    case Layout::kCodes:
    case Layout::kValues:
      codes = half ? load_bytes(row + at.chunk * 4, 4, false) : load_bytes(row + at.chunk * kChunk, at.count, problem.vectorized_codes);
      break;
    case Layout::kPacked:
      codes = nibbles_to_codes(half ? *reinterpret_cast<const uint16_t*>(row + at.chunk * 2)
                                    : *reinterpret_cast<const uint32_t*>(row + at.chunk * 4));
      break;
    case Layout::kEvenOdd: codes = load_even_odd(row, at.chunk); break;
    case Layout::kPlanes:
      for (int j = 0; j < problem.bits; ++j) {
        const uint2 plane = plane_to_codes(row[j * problem.rows * problem.code_row_bytes + at.chunk], j);
        codes.x |= plane.x;
        codes.y |= plane.y;
      }
      break;
  }
  if (!half) return codes;
  const uint64_t spread = static_cast<uint64_t>(codes.x & 0xFFFFu) << (16 * (pairs & 3u)) | static_cast<uint64_t>(codes.x >> 16)
                                                                                                << (16 * (pairs >> 2));
  return make_uint2(static_cast<uint32_t>(spread), static_cast<uint32_t>(spread >> 32));
}

constexpr int kSpans = 4;  // a thread has that many loads on their way

template <typename Grid>
__global__ __launch_bounds__(kRowsThreads) void dequantize_kernel(const __grid_constant__ Problem problem,
                                                                  const __grid_constant__ Grid grid) {
  __shared__ float table[Grid::kTableFloats];
  grid.prepare(table);
  __syncthreads();
  const ChunkPosition first = chunk_position<kSpans>(problem.rows, problem.k, problem.warps_a_row);
  if (!first.exists) return;
  uint2 codes[kSpans];
  uint32_t kept[kSpans];  // of a chunk's pairs, a bit each
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
    const ChunkPosition at = in_span(first, span, problem.k);
    codes[span] = make_uint2(0, 0);
    kept[span] = 15;
    if (at.count == 0) continue;
    uint32_t pairs = 0;
    if (problem.index != nullptr) {
      pairs = problem.index[at.row * problem.index_row_bytes + at.chunk / 2] >> (4 * (at.chunk % 2)) & 15u;
      kept[span] = 1u << (pairs & 3u) | 1u << (pairs >> 2);
    }
    codes[span] = load_codes(problem, at, pairs);
  }
  const float scale = problem.scale[first.row];
#pragma unroll
  for (int span = 0; span < kSpans; ++span) {
    const ChunkPosition at = in_span(first, span, problem.k);
    float x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t code = byte_of(codes[span], i);
      float level = problem.layout == Layout::kValues
                        ? problem.value_mul * static_cast<float>(static_cast<int8_t>(code)) + problem.value_add
                        : grid.level(code, table);
      if ((kept[span] >> (i / 2) & 1u) == 0) level = 0.0f;
      x[i] = i < at.count ? __fmul_rn(scale, level) : 0.0f;
    }
    if (problem.block > 1) {
      hadamard_warp(x, problem.block);
      multiply(x, problem.factor);
    }
    store_chunk(problem.y, x, problem.dtype, at.row * problem.k + at.chunk * kChunk, at.count, problem.vectorized_output);
  }
}

}  // namespace

void dequantize(const Quantizer& quantizer, Layout layout, const void* codes, const float* scale, const uint8_t* index, void* y,
                DType dtype, int64_t rows, int64_t k, cudaStream_t stream) {
  const char* op = "dequantize";
  check_layout(op, quantizer, layout, rows, k);
  check_index(op, quantizer, index != nullptr);
  if (rows == 0 || k == 0) return;
  current_device(op);
  if (layout == Layout::kPacked || layout == Layout::kEvenOdd) check_aligned(op, "codes", codes);

  const bool rotate = quantizer.original && quantizer.rotation == Rotation::kHadamard;
  const Affine value = has_values(quantizer.grid) ? affine(quantizer.grid, Layout::kValues) : Affine{};
  Problem problem{};
  problem.codes = static_cast<const uint8_t*>(codes);
  problem.scale = scale;
  problem.index = index;
  const int64_t stored = stored_codes(quantizer, layout, k);
  problem.half = stored < k;
  problem.y = y;
  problem.layout = layout;
  problem.bits = quantizer.grid.bits;
  problem.dtype = dtype;
  problem.rows = rows;
  problem.k = k;
  problem.warps_a_row = warps_of_row(k, kSpans);
  problem.code_row_bytes = row_bytes(layout, stored);
  problem.index_row_bytes = index_row_bytes(k);
  problem.value_mul = static_cast<float>(value.mul);
  problem.value_add = static_cast<float>(value.add);
  problem.block = rotate ? static_cast<int>(default_block(k)) : 1;
  problem.factor = 1.0f / std::sqrt(static_cast<float>(problem.block));
  problem.vectorized_codes = is_aligned(codes, 8) && k % 8 == 0;
  problem.vectorized_output = is_aligned(y, 16) && k * element_size(dtype) % 16 == 0;
  with_grid(quantizer.grid, [&](auto grid) {
    launch(op, dequantize_kernel<decltype(grid)>, grid_of(op, blocks_of_rows(rows, k, kSpans)), dim3(kRowsThreads), 0, stream, problem,
           grid);
  });
}

}  // namespace quest::cuda
