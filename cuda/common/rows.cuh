// Elementwise kernels over rows: each warp takes 32 neighbouring chunks of one row, so that a rotation block lies within the warp, or
// several times as many, one after another.
#pragma once

#include <cstdint>

#include "common/chunk.cuh"

namespace quest::cuda {

inline constexpr int kRowsThreads = 256;

struct ChunkPosition {
  int64_t row, chunk;
  int count;    // values of the row in this chunk; 0 beyond its end
  bool exists;  // false for all lanes of a warp beyond the last row
};

__device__ __forceinline__ ChunkPosition in_span(const ChunkPosition& first, int span, int64_t k) {
  const int64_t chunk = first.chunk + span * 32, left = k - chunk * kChunk;
  return {first.row, chunk, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk), first.exists};
}
// SPANS: of 32 chunks, that a warp has; this is the first of them.
template <int SPANS = 1>
__device__ __forceinline__ ChunkPosition chunk_position(int64_t rows, int64_t k, int64_t warps_a_row) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kRowsThreads + threadIdx.x) / 32;
  const int64_t row = warp / warps_a_row;
  const int64_t chunk = (warp - row * warps_a_row) * SPANS * 32 + threadIdx.x % 32;
  return in_span({row, chunk, 0, row < rows}, 0, k);
}

inline int64_t warps_of_row(int64_t k, int spans = 1) { return (k + spans * 32 * kChunk - 1) / (spans * 32 * kChunk); }
inline int64_t blocks_of_rows(int64_t rows, int64_t k, int spans = 1) {
  return (rows * warps_of_row(k, spans) * 32 + kRowsThreads - 1) / kRowsThreads;
}

}  // namespace quest::cuda
