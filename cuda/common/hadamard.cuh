// The stages of a Walsh-Hadamard transform, strides ascending as on the CPU: 1, 2, 4 inside a thread's chunk, 8 ... 128 between the lanes
// of a warp.
#pragma once

#include <cstdint>

#include "common/chunk.cuh"

namespace quest::cuda {

// One butterfly between the registers x[i] and x[i + STRIDE] of a thread.
template <int COUNT, int STRIDE>
__device__ __forceinline__ void butterfly(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if ((i & STRIDE) == 0) {
      const float low = x[i], high = x[i + STRIDE];
      x[i] = low + high;
      x[i + STRIDE] = low - high;
    }
  }
}

// The transform (without its 1/sqrt(block)) of blocks of `block` <= 256 values that lie 8 a lane in consecutive lanes. All lanes of the
// warp call.
__device__ __forceinline__ void hadamard_warp(float (&x)[kChunk], int block) {
  if (block > 1) butterfly<kChunk, 1>(x);
  if (block > 2) butterfly<kChunk, 2>(x);
  if (block > 4) butterfly<kChunk, 4>(x);
  for (int lanes = 1; lanes * kChunk < block && lanes < 32; lanes *= 2) {
    const bool upper = (threadIdx.x & lanes) != 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], lanes);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
}

template <int COUNT>
__device__ __forceinline__ void multiply(float (&x)[COUNT], float factor) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] *= factor;
}

}  // namespace quest::cuda
