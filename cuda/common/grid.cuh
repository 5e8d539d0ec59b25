// The grids as kernel parameters: small structs, passed by value, that turn x/s into codes and codes into levels. quest/grid.h has the
// formulas.
//
// Every grid has the same five functions:
//   prepare(table)            copies the tables that need it to shared memory (kTableFloats floats); the caller synchronises
//   step(s)                   what x is divided by
//   code(x_over_step, table)  the code
//   level(code, table)        x-hat/s
//   stored(code)              the byte that layout kValues holds
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/ptx.cuh"
#include "quest/grid.h"

namespace quest::cuda {

// A byte looked up for each of 4 nibbles of `selectors` (its low 16 bits) in a table of 16 bytes: two permutations of 8 bytes and a choice.
__device__ __forceinline__ uint32_t look_up_nibbles(uint4 table, uint32_t selectors) {
  const uint32_t low = __byte_perm(table.x, table.y, selectors & 0x7777u);
  const uint32_t high = __byte_perm(table.z, table.w, selectors & 0x7777u);
  const uint32_t is_high = __byte_perm(0x0000FF00u, 0u, selectors >> 3 & 0x1111u);
  return (low & ~is_high) | (high & is_high);
}

// int, int_zero and ternary: equal steps. code = rint(clamp(x/step, lowest, highest) + shift) + offset, v = mul code + add.
struct UniformGrid {
  static constexpr int kTableFloats = 1;
  float steps;  // step / s
  float lowest, highest, shift;
  int32_t offset;
  float mul, add;
  uint32_t stored_mul, stored_add;  // modulo 256

  __device__ void prepare(float*) const {}
  __device__ __forceinline__ float step(float scale) const { return steps * scale; }
  __device__ __forceinline__ uint32_t code(float x, const float*) const {
    return static_cast<uint32_t>(__float2int_rn(__fadd_rn(fminf(fmaxf(x, lowest), highest), shift)) + offset);
  }
  __device__ __forceinline__ float level(uint32_t code, const float*) const { return mul * static_cast<float>(code) + add; }
  __device__ __forceinline__ uint32_t stored(uint32_t code) const { return (code * stored_mul + stored_add) & 0xFFu; }
};

// E2M1: a sign bit and one of 8 magnitudes 0, 1, 2, 3, 4, 6, 8, 12 (in units of s).
struct Fp4Grid {
  static constexpr int kTableFloats = 1;
  uint4 values;  // v by code, 16 bytes

  __device__ void prepare(float*) const {}
  __device__ __forceinline__ float step(float scale) const { return scale; }
  __device__ __forceinline__ uint32_t code(float x, const float*) const {
    const float magnitude = fabsf(x);
    // The number of middles between neighbouring magnitudes that lie below.
    const uint32_t index = (magnitude > 0.5f) + (magnitude > 1.5f) + (magnitude > 2.5f) + (magnitude > 3.5f) + (magnitude > 5.0f) +
                           (magnitude > 7.0f) + (magnitude > 10.0f);
    return index | (x < 0.0f ? 8u : 0u);
  }
  __device__ __forceinline__ float level(uint32_t code, const float*) const {
    return static_cast<float>(static_cast<int8_t>(look_up_nibbles(values, code)));
  }
  __device__ __forceinline__ uint32_t stored(uint32_t code) const { return look_up_nibbles(values, code) & 0xFFu; }
};

// gauss: any ascending levels, found by bisection of the middles between them.
struct GaussGrid {
  static constexpr int kTableFloats = 2 * kMaxLevels;  // levels, then middles
  int32_t bits;
  float levels[kMaxLevels];

  __device__ void prepare(float* table) const {
    const int count = 1 << bits;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = thread; i < count; i += blockDim.x * blockDim.y) {
      table[i] = levels[i];
      // The levels are symmetric but for rounding: 0 takes the level below it, as in the int grid.
      const bool central = i + 1 == count / 2 || i + 1 == count;
      table[kMaxLevels + i] = central ? 0.0f : __fmul_rn(0.5f, __fadd_rn(levels[i], levels[i + 1]));
    }
  }
  __device__ __forceinline__ float step(float scale) const { return scale; }
  __device__ __forceinline__ uint32_t code(float x, const float* table) const {
    uint32_t code = 0;
    for (uint32_t half = 1u << (bits - 1); half > 0; half >>= 1) {
      if (x > table[kMaxLevels + code + half - 1]) code += half;
    }
    return code;
  }
  __device__ __forceinline__ float level(uint32_t code, const float* table) const { return table[code]; }
  __device__ __forceinline__ uint32_t stored(uint32_t code) const { return code; }
};

// ---- host: the parameters of a grid

// v by code as 16 bytes, for grids of at most 16 codes. Codes beyond the last level do not occur.
inline uint4 value_table(Grid grid) {
  uint32_t words[4] = {0, 0, 0, 0};
  for (int32_t code = 0; code < level_count(grid); ++code) {
    words[code / 4] |= (static_cast<uint32_t>(code_value(grid, code)) & 0xFFu) << (8 * (code % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

inline UniformGrid uniform_grid(Grid grid) {
  const Affine code = affine(grid, Layout::kCodes);
  const Affine value = affine(grid, Layout::kValues);
  const int32_t levels = level_count(grid);
  const bool centered = grid.kind == GridKind::kInt;
  UniformGrid result{};
  result.steps = centered ? 2.0f : 1.0f;
  result.offset = centered ? levels / 2 - 1 : -code.add;
  result.shift = centered ? 0.5f : 0.0f;
  result.lowest = centered ? -0.5f * static_cast<float>(levels - 1) : static_cast<float>(code.add);
  result.highest = centered ? 0.5f * static_cast<float>(levels - 1) : static_cast<float>(levels - 1 + code.add);
  result.mul = static_cast<float>(code.mul);
  result.add = static_cast<float>(code.add);
  // v = code.mul c + code.add = value.mul u + value.add
  result.stored_mul = static_cast<uint32_t>(code.mul / value.mul);
  result.stored_add = static_cast<uint32_t>((code.add - value.add) / value.mul) & 0xFFu;
  return result;
}

inline Fp4Grid fp4_grid() { return {value_table({GridKind::kFp4, 4})}; }

inline GaussGrid gauss_grid(Grid grid) {
  GaussGrid result{};
  result.bits = grid.bits;
  const float* levels = gauss_levels(grid.bits);
  for (int32_t i = 0; i < level_count(grid); ++i) result.levels[i] = levels[i];
  return result;
}

// Calls function(one of the structs above).
template <typename Function>
void with_grid(Grid grid, Function&& function) {
  switch (grid.kind) {
    case GridKind::kFp4: function(fp4_grid()); break;
    case GridKind::kGauss: function(gauss_grid(grid)); break;
    default: function(uniform_grid(grid));
  }
}

// The bits of a number twice, in Mma's type.
template <typename Mma>
uint32_t pair_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if constexpr (std::is_same_v<Mma, MmaBFloat16>) {
    bits = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  } else {
    bits = __half_as_ushort(__float2half_rn(value));
  }
  return bits | bits << 16;
}

}  // namespace quest::cuda
