// cuda/common/wgmma.cuh on the host: products happen when they are started.
#pragma once

#include "common/hopper.cuh"

namespace quest::cuda {

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <typename T, int COUNT>
void wgmma_owned(T (&)[COUNT]) {}
template <int PENDING>
void wgmma_wait() {}
inline void replace_metadata(uint32_t& metadata, uint32_t by, uint32_t) { metadata = by; }

// The address in units of 16 bytes, as in a descriptor, so that 2 more are the next 32 bytes of every row.
inline uint64_t swizzled_tile(const void* shared) {
  if (shared_address(shared) % 1024 != 0) std::abort();
  return shared_address(shared) >> 4;
}
inline uint8_t tile_byte(uint64_t tile, int row, int byte) {
  const uint32_t offset = static_cast<uint32_t>(tile << 4) + row * 128 + byte;
  return emulated::block->shared[swizzled(offset, CU_TENSOR_MAP_SWIZZLE_128B)];
}

// Byte `byte` of row `row` of the operand that a warpgroup holds in registers.
inline uint8_t register_byte(int row, int byte) {
  const auto& rows = emulated::block->operands[threadIdx.x / emulated::kWarpgroup];
  return static_cast<uint8_t>(rows[row][byte / 4] >> 8 * (byte % 4));
}

// d[i] of this thread += dot(row of a, row of b); show: before the warpgroup meets.
template <typename Sum, int COUNT, typename Show, typename Dot>
void multiply_warpgroup(Sum (&d)[COUNT], int32_t accumulate, Show show, Dot dot) {
  const int thread = threadIdx.x % emulated::kWarpgroup, group = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + group;
  emulated::block->sync_warpgroup(threadIdx.x);
  show(row, t);
  emulated::block->sync_warpgroup(threadIdx.x);
  for (int i = 0; i < COUNT; ++i) {
    const Sum product = dot(row + i % 4 / 2 * 8, i / 4 * 8 + 2 * t + i % 2);
    d[i] = (accumulate != 0 ? d[i] : 0) + product;
  }
  emulated::block->sync_warpgroup(threadIdx.x);
}
template <size_t WORDS>
void show_words(const uint32_t (&a)[WORDS], int row, int t) {
  auto& rows = emulated::block->operands[threadIdx.x / emulated::kWarpgroup];
  rows[row][t] = a[0], rows[row + 8][t] = a[1], rows[row][4 + t] = a[2], rows[row + 8][4 + t] = a[3];
}

template <typename Byte>
struct WgmmaBytes {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  template <int COUNT>
  static void mma(int32_t (&d)[COUNT], const uint32_t (&a)[4], uint64_t b_tile, int32_t accumulate) {
    multiply_warpgroup(
        d, accumulate, [&](int row, int t) { show_words(a, row, t); },
        [&](int m, int n) {
          int32_t sum = 0;
          for (int k = 0; k < kBytes; ++k) {
            sum += static_cast<Byte>(register_byte(m, k)) * static_cast<Byte>(tile_byte(b_tile, n, k));
          }
          return sum;
        });
  }
};
using WgmmaInt8 = WgmmaBytes<int8_t>;
using WgmmaUnsigned = WgmmaBytes<uint8_t>;

struct WgmmaSparseInt8 {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 5, kBytes = 64;
  template <int COUNT>
  static void mma(int32_t (&d)[COUNT], const uint32_t (&a)[5], uint64_t b_tile, int32_t accumulate) {
    auto& metadata = emulated::block->metadata[threadIdx.x / emulated::kWarpgroup];
    multiply_warpgroup(
        d, accumulate,
        [&](int row, int t) {
          show_words(a, row, t);
          metadata[row + t % 2 * 8][t / 2] = a[4];
        },
        [&](int m, int n) {
          int32_t sum = 0;
          for (int k = 0; k < kBytes / 2; ++k) {  // two of every four
            const int place = static_cast<int>(metadata[m][k / 16] >> k % 16 * 2 & 3);
            sum += static_cast<int8_t>(register_byte(m, k)) * tile_byte(b_tile, n, k / 2 * 4 + place);
          }
          return sum;
        });
  }
};

// 16-bit floats.
template <typename Type>
struct WgmmaReals {
  using Accumulator = float;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  template <int COUNT>
  static void mma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b_tile, int32_t accumulate) {
    multiply_warpgroup(
        d, accumulate, [&](int row, int t) { show_words(a, row, t); },
        [&](int m, int n) {
          float sum = 0;
          for (int k = 0; k < kBytes; k += 2) {
            sum += Type::to_float(register_byte(m, k) | register_byte(m, k + 1) << 8) *
                   Type::to_float(tile_byte(b_tile, n, k) | tile_byte(b_tile, n, k + 1) << 8);
          }
          return sum;
        });
  }
};
using WgmmaBFloat16 = WgmmaReals<MmaBFloat16>;
using WgmmaFloat16 = WgmmaReals<MmaFloat16>;

struct WgmmaBits {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = true;
  static constexpr int kWords = 4, kBytes = 32;
  template <int COUNT>
  static void mma(int32_t (&d)[COUNT], const uint32_t (&a)[4], uint64_t b_tile, int32_t accumulate) {
    count(d, accumulate, [&](int row, int t) { show_words(a, row, t); }, [](int m, int k) { return register_byte(m, k); }, b_tile);
  }
  template <int COUNT>
  static void mma(int32_t (&d)[COUNT], uint64_t a_tile, uint64_t b_tile, int32_t accumulate) {
    count(d, accumulate, [](int, int) {}, [&](int m, int k) { return tile_byte(a_tile, m, k); }, b_tile);
  }

 private:
  template <int COUNT, typename Show, typename Byte>
  static void count(int32_t (&d)[COUNT], int32_t accumulate, Show show, Byte a_byte, uint64_t b_tile) {
    multiply_warpgroup(d, accumulate, show, [&](int m, int n) {
      int32_t sum = 0;
      for (int k = 0; k < kBytes; ++k) sum += __builtin_popcount(a_byte(m, k) & tile_byte(b_tile, n, k));
      return sum;
    });
  }
};

}  // namespace quest::cuda
