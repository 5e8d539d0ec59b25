// hadamard: y = x blockdiag(H/sqrt(B)), B = 2 ... 32768, one read and one write.
//
// B divides k, so the rows are one flat array of blocks. A thread block of 256 threads takes tiles of 2048 values, 8 a thread (chunk.cuh):
// strides 1 to 4 are butterflies in a thread's registers, 8 to 128 shuffles between lanes, 256 to 1024 one exchange between the 8 warps
// through shared memory, after which each thread holds the 8 values that differ in the warp alone. For B > 2048 a thread keeps the chunks
// of all B/2048 tiles and the remaining strides are again butterflies in registers.
#include <cmath>

#include "common/check.h"
#include "common/hadamard.cuh"
#include "quest/cuda/rotation.h"

namespace quest::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kThreads * kChunk;

// The butterflies between warps: strides 256, 512, 1024 below `block`. Value v of warp w moves to the thread that holds v of all warps, and
// back.
__device__ void hadamard_warps(float (&x)[kChunk], float* buffer, int block) {
  const int own = threadIdx.x * kChunk;
  // Words 4 to 7 of odd groups of 4 lanes swap places with words 0 to 3, which spreads 16-byte accesses over all banks.
  float4* vectors = reinterpret_cast<float4*>(buffer);
  const int swap = threadIdx.x >> 2 & 1;
  vectors[own / 4 + swap] = make_float4(x[0], x[1], x[2], x[3]);
  vectors[own / 4 + 1 - swap] = make_float4(x[4], x[5], x[6], x[7]);
  __syncthreads();
  float column[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) column[w] = buffer[w * 32 * kChunk + threadIdx.x];
  butterfly<kWarps, 1>(column);
  if (block > 512) butterfly<kWarps, 2>(column);
  if (block > 1024) butterfly<kWarps, 4>(column);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) buffer[w * 32 * kChunk + threadIdx.x] = column[w];
  __syncthreads();
  // From here to the next tile's first barrier a thread touches its own values alone: one buffer is enough.
  const float4 low = vectors[own / 4 + swap];
  const float4 high = vectors[own / 4 + 1 - swap];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <int TILES>
__global__ __launch_bounds__(kThreads) void hadamard_kernel(const void* x, void* y, DType dtype, int64_t count, int block, float factor,
                                                            bool vectorized) {
  __shared__ __align__(16) float buffer[kTile];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * TILES * kTile + threadIdx.x * kChunk;
  float values[TILES][kChunk];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int64_t index = first + i * kTile;
    const int64_t left = count - index;
    load_chunk(values[i], x, dtype, index, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk), vectorized);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    hadamard_warp(values[i], block);
    if (block > 256) hadamard_warps(values[i], buffer, block);
  }
#pragma unroll
  for (int stride = 1; stride < TILES; stride *= 2) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if ((i & stride) == 0) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const float low = values[i][j], high = values[i + stride][j];
          values[i][j] = low + high;
          values[i + stride][j] = low - high;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int64_t index = first + i * kTile;
    const int64_t left = count - index;
    multiply(values[i], factor);
    store_chunk(y, values[i], dtype, index, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk), vectorized);
  }
}

}  // namespace

void hadamard(const void* x, void* y, DType dtype, int64_t rows, int64_t k, int64_t block, cudaStream_t stream) {
  const char* op = "hadamard";
  check_block(k, block);
  const int64_t count = rows * k;
  if (count == 0) return;
  current_device(op);
  const bool vectorized = is_aligned(x, 16) && is_aligned(y, 16);
  const float factor = 1.0f / std::sqrt(static_cast<float>(block));
  auto run = [&](auto kernel, int64_t tiles) {
    const int64_t values = tiles * kTile;
    launch(op, kernel, grid_of(op, (count + values - 1) / values), dim3(kThreads), 0, stream, x, y, dtype, count, static_cast<int>(block),
           factor, vectorized);
  };
  switch (block / kTile) {
    case 2: run(hadamard_kernel<2>, 2); break;
    case 4: run(hadamard_kernel<4>, 4); break;
    case 8: run(hadamard_kernel<8>, 8); break;
    case 16: run(hadamard_kernel<16>, 16); break;
    default: run(hadamard_kernel<1>, 1);
  }
}

}  // namespace quest::cuda
