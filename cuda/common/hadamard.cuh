// The stages of a Walsh-Hadamard transform, strides ascending as on the CPU: between registers of a thread, or between lanes of a warp.
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

// One butterfly between the lanes whose numbers differ in the bit `lanes`. The upper one of two subtracts: a multiplication by +-1 in one
// instruction with the addition rounds as the addition alone does.
template <int COUNT>
__device__ __forceinline__ void butterfly_lanes(float (&x)[COUNT], int lanes) {
  const float sign = (threadIdx.x & lanes) != 0 ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xFFFFFFFFu, x[i], lanes));
}

// The transform (without its 1/sqrt(block)) of blocks of `block` <= 256 values that lie 8 a lane in consecutive lanes. All lanes of the
// warp call.
__device__ __forceinline__ void hadamard_warp(float (&x)[kChunk], int block) {
  if (block > 1) butterfly<kChunk, 1>(x);
  if (block > 2) butterfly<kChunk, 2>(x);
  if (block > 4) butterfly<kChunk, 4>(x);
  for (int lanes = 1; lanes * kChunk < block && lanes < 32; lanes *= 2) butterfly_lanes(x, lanes);
}

// ---- blocks of 128 values in four lanes: half the exchanges of hadamard_warp, and what a lane needs of memory is four independent loads

inline constexpr int kQuadBlock = 128;
inline constexpr int kQuadValues = kQuadBlock / 4;

// The transform (without its 1/sqrt(128)) where lane t = 0 ... 3 of a quad holds the chunks t, t + 4, t + 8, t + 12 of its block in this
// order: strides 1 to 4 and 32, 64 lie in its registers.
__device__ __forceinline__ void hadamard_quad(float (&x)[kQuadValues]) {
  butterfly<kQuadValues, 1>(x);
  butterfly<kQuadValues, 2>(x);
  butterfly<kQuadValues, 4>(x);
  butterfly_lanes(x, 1);
  butterfly_lanes(x, 2);
  butterfly<kQuadValues, 8>(x);
  butterfly<kQuadValues, 16>(x);
}

template <int COUNT>
__device__ __forceinline__ void multiply(float (&x)[COUNT], float factor) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] *= factor;
}

}  // namespace quest::cuda
