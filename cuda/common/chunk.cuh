// A chunk is 8 consecutive values of a row: what one thread holds. 8 is one 16-byte load of 16-bit floats, one 4-byte word of 4-bit codes,
// one byte of a bit plane and one group of 4:8 sparsity. Code chunks are 8 bytes in two words, the first code in the lowest byte.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"
#include "quest/types.h"

namespace quest::cuda {

inline constexpr int kChunk = 8;

inline constexpr float kLargestFloat = 3.402823466e38f;
// Added to a float of at most 2^22, this leaves the float rounded, ties to even, as an integer in the low bits.
inline constexpr float kIntegerFloat = 12582912.0f;
inline constexpr uint32_t kIntegerFloatBits = 0x4B400000u;  // the bits of that

// The first `count` (at most 8) values at element `index` of `base`, the others 0. vectorized: rows and base allow 16-byte accesses.
__device__ __forceinline__ void load_chunk(float (&x)[kChunk], const void* base, DType dtype, int64_t index, int count, bool vectorized) {
  if (dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(base) + index;
    if (vectorized && count >= kChunk) {
      const float4 low = reinterpret_cast<const float4*>(source)[0];
      const float4 high = reinterpret_cast<const float4*>(source)[1];
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = i < count ? source[i] : 0.0f;
    }
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(base) + index;
  uint32_t words[kChunk / 2];
  if (vectorized && count >= kChunk) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(source);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      words[i] = (2 * i < count ? source[2 * i] : 0u) | (2 * i + 1 < count ? static_cast<uint32_t>(source[2 * i + 1]) << 16 : 0u);
    }
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      x[2 * i] = float16_to_float(static_cast<uint16_t>(words[i]));
      x[2 * i + 1] = float16_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  }
}

__device__ __forceinline__ void store_chunk(void* base, const float (&x)[kChunk], DType dtype, int64_t index, int count, bool vectorized) {
  if (dtype == DType::kFloat32) {
    float* target = static_cast<float*>(base) + index;
    if (vectorized && count >= kChunk) {
      reinterpret_cast<float4*>(target)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(target)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i < count) target[i] = x[i];
      }
    }
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(base) + index;
  uint32_t words[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    words[i] = dtype == DType::kBFloat16 ? pack_bfloat16(x[2 * i], x[2 * i + 1]) : pack_float16(x[2 * i], x[2 * i + 1]);
  }
  if (vectorized && count >= kChunk) {
    *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) target[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

// ---- the same for rows that are whole aligned chunks of a type known when compiling: loads that need no branch, so that a thread can have
// several of them on their way

template <DType DTYPE>
struct RawChunk {
  static constexpr int kBytes = DTYPE == DType::kFloat32 ? 4 * kChunk : 2 * kChunk;
  uint4 vectors[kBytes / 16];

  // address: a multiple of 16.
  __device__ __forceinline__ void load(const void* address) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) vectors[i] = static_cast<const uint4*>(address)[i];
  }
  __device__ __forceinline__ void store(void* address) const {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) static_cast<uint4*>(address)[i] = vectors[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) vectors[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void to_floats(float* x) const {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint32_t words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (DTYPE == DType::kFloat32) {
          x[4 * i + j] = __uint_as_float(words[j]);
        } else if constexpr (DTYPE == DType::kBFloat16) {
          x[2 * j] = __uint_as_float(words[j] << 16);
          x[2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
        } else {
          x[2 * j] = float16_to_float(static_cast<uint16_t>(words[j]));
          x[2 * j + 1] = float16_to_float(static_cast<uint16_t>(words[j] >> 16));
        }
      }
    }
  }
  __device__ __forceinline__ void from_floats(const float* x) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = DTYPE == DType::kFloat32    ? __float_as_uint(x[4 * i + j])
                   : DTYPE == DType::kBFloat16 ? pack_bfloat16(x[2 * j], x[2 * j + 1])
                                               : pack_float16(x[2 * j], x[2 * j + 1]);
      }
      vectors[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

// Calls function(std::integral_constant<DType, dtype>).
template <typename Function>
void with_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: function(std::integral_constant<DType, DType::kFloat32>()); break;
    case DType::kBFloat16: function(std::integral_constant<DType, DType::kBFloat16>()); break;
    case DType::kFloat16: function(std::integral_constant<DType, DType::kFloat16>()); break;
  }
}

// Eight bytes of which the first `count` exist, the others 0. vectorized: 8-byte accesses are aligned.
__device__ __forceinline__ uint2 load_bytes(const uint8_t* source, int count, bool vectorized) {
  if (vectorized && count >= kChunk) return *reinterpret_cast<const uint2*>(source);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < count) words[i / 4] |= static_cast<uint32_t>(source[i]) << (8 * (i % 4));
  }
  return make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void store_bytes(uint8_t* target, uint2 bytes, int count, bool vectorized) {
  if (vectorized && count >= kChunk) {
    *reinterpret_cast<uint2*>(target) = bytes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < count) target[i] = static_cast<uint8_t>((i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4)));
  }
}

// 8 codes below 16 <-> one word of nibbles, the first code lowest.
__device__ __forceinline__ uint32_t codes_to_nibbles(uint2 codes) {
  return __byte_perm(codes.x | codes.x >> 4, codes.y | codes.y >> 4, 0x6420);
}

__device__ __forceinline__ uint2 nibbles_to_codes(uint32_t nibbles) {
  const uint32_t even = nibbles & 0x0F0F0F0Fu;
  const uint32_t odd = nibbles >> 4 & 0x0F0F0F0Fu;
  return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
}

// The 8 codes of chunk `chunk` of a row in layout kEvenOdd, at multiples of 4: the even ones, and 32 bytes further the odd ones.
__device__ __forceinline__ int64_t even_odd_offset(int64_t chunk) { return chunk / 8 * 64 + chunk % 8 * 4; }

__device__ __forceinline__ void store_even_odd(uint8_t* row, int64_t chunk, uint2 codes) {
  uint32_t* const target = reinterpret_cast<uint32_t*>(row + even_odd_offset(chunk));
  target[0] = __byte_perm(codes.x, codes.y, 0x6420);
  target[8] = __byte_perm(codes.x, codes.y, 0x7531);
}

__device__ __forceinline__ uint2 load_even_odd(const uint8_t* row, int64_t chunk) {
  const uint32_t* const source = reinterpret_cast<const uint32_t*>(row + even_odd_offset(chunk));
  const uint32_t even = source[0], odd = source[8];
  return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
}

// Bit `plane` of 8 codes as one byte. The multiplication gathers the lowest bits of four bytes in its top byte.
__device__ __forceinline__ uint32_t codes_to_plane(uint2 codes, int plane) {
  const uint32_t low = (codes.x >> plane & 0x01010101u) * 0x01020408u >> 24;
  const uint32_t high = (codes.y >> plane & 0x01010101u) * 0x01020408u >> 24;
  return low | high << 4;
}

// The inverse: 8 bits spread to the lowest bits of 8 bytes, moved to bit `plane`.
__device__ __forceinline__ uint2 plane_to_codes(uint32_t bits, int plane) {
  const uint32_t low = (bits & 15u) * 0x00204081u & 0x01010101u;
  const uint32_t high = (bits >> 4 & 15u) * 0x00204081u & 0x01010101u;
  return make_uint2(low << plane, high << plane);
}

__device__ __forceinline__ uint32_t byte_of(uint2 bytes, int i) { return (i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4)) & 0xFFu; }

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

}  // namespace quest::cuda
