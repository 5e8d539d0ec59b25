// cuda/common/ptx.cuh on the host. A warp's lanes meet before and after they read each other's operands.
#pragma once

#include "common/check.h"

namespace quest::cuda {

// ---- conversions
inline uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
inline uint32_t bits_of(__half value) { return __half_as_ushort(value); }
inline float bfloat16_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
inline float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
inline uint32_t pack_bfloat16(float low, float high) { return bits_of(__float2bfloat16(low)) | bits_of(__float2bfloat16(high)) << 16; }
inline uint32_t pack_float16(float low, float high) { return bits_of(__float2half_rn(low)) | bits_of(__float2half_rn(high)) << 16; }

// Clamped to so many bits, as cvt.pack.sat does it.
template <int BITS>
uint32_t pack_saturated(uint32_t low, uint32_t high, uint32_t above) {
  auto saturated = [](uint32_t value) { return static_cast<uint32_t>(std::clamp(static_cast<int32_t>(value), 0, (1 << BITS) - 1)); };
  return above << 2 * BITS | saturated(high) << BITS | saturated(low);
}
inline uint32_t pack_nibbles(uint32_t low, uint32_t high, uint32_t above) { return pack_saturated<4>(low, high, above); }
inline uint32_t pack_two_bits(uint32_t low, uint32_t high, uint32_t above) { return pack_saturated<2>(low, high, above); }

// ---- the special function unit: subnormal numbers are 0, but under a square root
inline float without_subnormals(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float exp2_approximate(float x) { return without_subnormals(std::exp2(without_subnormals(x))); }
inline float reciprocal_approximate(float x) { return without_subnormals(1.0f / without_subnormals(x)); }
inline float sqrt_approximate(float x) { return std::sqrt(x); }

inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

// ---- memory. An address in shared memory is the distance from its start.
template <typename T>
T load(const void* source) {
  T value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
inline uint8_t* dynamic_shared() { return emulated::block->shared; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulated::block->shared);
}
inline uint4 load_once(const void* global) { return load<uint4>(global); }
template <typename T>
T* keep(T* pointer) {
  return pointer;
}
inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile uint8_t*>(global)); }
template <typename T>
void settle(T&) {}
template <typename T>
void settle_global(T*&) {}
inline uint32_t shared_add(uint32_t* shared, uint32_t value) { return atomicAdd(shared, value + threadIdx.x % emulated::kWarp); }
inline uint32_t load_shared_16(uint32_t address) { return load<uint16_t>(emulated::block->shared + address); }
inline uint32_t load_shared_32(uint32_t address) { return load<uint32_t>(emulated::block->shared + address); }
inline uint2 load_shared_64(uint32_t address) { return load<uint2>(emulated::block->shared + address); }
inline uint4 load_shared_128(uint32_t address) { return load<uint4>(emulated::block->shared + address); }
inline void cp_async_16(void* shared, const void* global, bool valid) {
  valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
}
inline void cp_async_4(void* shared, const void* global, bool valid) { valid ? std::memcpy(shared, global, 4) : std::memset(shared, 0, 4); }
inline void cp_async_commit() {}
template <int PENDING>
void cp_async_wait() {}
inline void wait_for_prerequisites() {}
inline void launch_dependents() {}
inline void named_barrier(int id, int threads) { emulated::block->named[id].sync(emulated::block->meeting, threads); }

// ---- what a lane shows the others of its warp
template <typename Read>
void among_lanes(const uint32_t (&shown)[6], Read read) {
  auto& lanes = emulated::block->lanes[emulated::thread() / emulated::kWarp];
  std::memcpy(lanes[emulated::thread() % emulated::kWarp], shown, sizeof shown);
  __syncwarp();
  read(lanes);
  __syncwarp();
}

// Of all lanes.
template <typename T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  among_lanes({word}, [&](auto& all) { word = all[lane][0]; });
  std::memcpy(&value, &word, sizeof word);
  return value;
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int lanes) {
  return from_lane(value, threadIdx.x % emulated::kWarp ^ lanes);
}
template <typename T>
T __shfl_down_sync(uint32_t, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % emulated::kWarp, other = lane + lanes;
  return from_lane(value, other < emulated::kWarp ? other : lane);
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  uint32_t sum = 0;
  among_lanes({value}, [&](auto& all) {
    for (const auto& shown : all) sum += shown[0];
  });
  return sum;
}
inline void ldmatrix_x4(uint32_t (&words)[4], uint32_t address) {
  const int lane = threadIdx.x % emulated::kWarp;
  among_lanes({address}, [&](auto& lanes) {
    for (int i = 0; i < 4; ++i) words[i] = load<uint32_t>(emulated::block->shared + lanes[i * 8 + lane / 4][0] + lane % 4 * 4);
  });
}
inline void ldmatrix_x4(uint32_t (&words)[4], const void* shared) { ldmatrix_x4(words, shared_address(shared)); }

// d[c] += dot(row of a, row of b) of 8 words each.
template <typename Accumulator, typename Dot>
void multiply(Accumulator (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Dot dot) {
  const int lane = threadIdx.x % emulated::kWarp, group = lane / 4, t = lane % 4;
  among_lanes({a[0], a[1], a[2], a[3], b0, b1}, [&](auto& lanes) {
    for (int c = 0; c < 4; ++c) {
      const int row = group + c / 2 * 8, column = 2 * t + c % 2;
      for (int word = 0; word < 8; ++word) {
        d[c] += dot(lanes[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2], lanes[column * 4 + word % 4][4 + word / 4]);
      }
    }
  });
}

struct MmaInt8 {
  using Accumulator = int32_t;
  static void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, [](uint32_t x, uint32_t y) { return __dp4a(static_cast<int>(x), static_cast<int>(y), 0); });
  }
};

struct MmaNibbles {
  using Accumulator = int32_t;
  static void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, [](uint32_t x, uint32_t y) {
      int32_t sum = 0;
      for (int i = 0; i < 32; i += 4) sum += static_cast<int32_t>((x >> i & 15) * (y >> i & 15));
      return sum;
    });
  }
};

struct MmaBits {
  using Accumulator = int32_t;
  static void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, [](uint32_t x, uint32_t y) { return __builtin_popcount(x & y); });
  }
};

// Pairs of 16-bit floats; one rounding of a fused multiplication and addition.
template <typename Convert, typename Pack>
uint32_t fused_pair(uint32_t a, uint32_t b, uint32_t c, Convert convert, Pack pack) {
  auto half = [&](int shift) {
    auto value = [&](uint32_t pair) { return static_cast<double>(convert(static_cast<uint16_t>(pair >> shift))); };
    return static_cast<float>(value(a) * value(b) + value(c));
  };
  return pack(half(0), half(16));
}

template <typename Convert>
float product_of_pairs(uint32_t a, uint32_t b, Convert convert) {
  auto value = [&](uint32_t bits) { return convert(static_cast<uint16_t>(bits)); };
  return value(a) * value(b) + value(a >> 16) * value(b >> 16);
}

struct MmaBFloat16 {
  using Accumulator = float;
  static constexpr int kSmallest = 133, kLargest = 127;
  static constexpr uint32_t pair_of_power(int exponent) { return static_cast<uint32_t>(exponent + kLargest) * 0x00800080u; }
  static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fused_pair(a, b, c, bfloat16_to_float, pack_bfloat16); }
  static uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  static float to_float(uint32_t bits) { return bfloat16_to_float(bits); }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, [](uint32_t x, uint32_t y) { return product_of_pairs(x, y, bfloat16_to_float); });
  }
};

struct MmaFloat16 {
  using Accumulator = float;
  static constexpr int kSmallest = 24, kLargest = 15;
  static constexpr uint32_t pair_of_power(int exponent) { return static_cast<uint32_t>(exponent + kLargest) * 0x04000400u; }
  static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fused_pair(a, b, c, float16_to_float, pack_float16); }
  static uint32_t pack(float low, float high) { return pack_float16(low, high); }
  static float to_float(uint32_t bits) { return float16_to_float(static_cast<uint16_t>(bits)); }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, [](uint32_t x, uint32_t y) { return product_of_pairs(x, y, float16_to_float); });
  }
};

}  // namespace quest::cuda
