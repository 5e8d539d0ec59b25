// What the products on Hopper's wgmma share: their problem, and the weight on its way to the tensor cores.
//
// The weight is the left operand of the instruction and goes through registers, so that it can lie in memory in any width: 4-bit codes are
// widened there. A step of the main loop takes 128 bytes of every row of a, 128 int8 or 1024 bits, and as many columns of 128 rows of w.
#pragma once

#include <cstdint>

#include "common/steps.cuh"
#include "common/wgmma_epilogue.cuh"

namespace quest::cuda {

inline constexpr int kWgmmaThreads = (1 + kMultipliers) * kWarpgroup;
inline constexpr int kWgmmaN = kWarpgroupColumns * kMultipliers;  // rows of w a block
inline constexpr int kStepRowBytes = 128;                         // of a: what the 128-byte swizzle covers

struct WgmmaProblem {
  TileOutput output;
  Steps steps;
  int32_t tiles_m, clusters_n;    // of the tile's rows of y, of the cluster's columns
  int32_t split;                  // blocks that share a tile along K
  uint32_t flip;                  // ByteFragments
  uint4 table;                    // TableFragments
  uint32_t value_mul, value_add;  // SparseFragments: v + 128, four bytes, of four codes
};

// From a tile of 64 rows a warpgroup in shared memory to the words of the instruction, for all instructions of a step: `fetch` loads what
// lies there, `widen` makes the words. `offset`: of this lane's bytes in the tile; the copy engine's swizzle turns the step to the next
// columns into an exclusive or.

// One byte an integer (flip: 0x80808080 makes c - 128 of 8-bit codes), or 8 bits of a plane.
struct ByteFragments {
  static constexpr int kRowBytes = kStepRowBytes, kIndexBytes = 0, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    Words words;
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row & 7)) * 16;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) ldmatrix_x4(fetched.words[i], address ^ i * 32);
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = fetched.words[i][j] ^ problem.flip;
    }
  }
};

// Two 4-bit codes a byte, and a in the order of kEvenOdd: its 32 even columns of 64 meet the low halves of 32 bytes, its odd ones the high
// halves.
struct CodeFragments {
  static constexpr int kRowBytes = kStepRowBytes / 2, kIndexBytes = 0, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    uint32_t codes[kInstructions / 2][4];
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    return row * kRowBytes + (row >> 1 & 3) * 16 + lane % 4 * 4;  // the same swizzle for row + 8
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions / 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fetched.codes[i][j] = load_shared_32((address ^ (2 * i + j / 2) * 16) + j % 2 * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem&) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = fetched.codes[i / 2][j] >> i % 2 * 4 & 0x0F0F0F0Fu;
    }
  }
};

// Two 4-bit codes a byte, by table, and a in the order of its columns.
struct TableFragments {
  static constexpr int kRowBytes = kStepRowBytes / 2, kIndexBytes = 0, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    Words codes;  // 4 each
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    return row * kRowBytes + (row >> 1 & 3) * 16 + lane % 4 * 2;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fetched.codes[i][j] = load_shared_16((address ^ i * 16) + j / 2 * 8 + j % 2 * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = look_up_nibbles(problem.table, fetched.codes[i][j]);
    }
  }
};

// The kept codes of a 4:8 sparse weight, and behind their tile the pair indices: 16 bytes of every row, the copy engine's least, of which a
// step needs the first or the last 8.
//
// With a in the order of kEvenOdd each half of 64 columns has one value of every pair, so that two kept pairs of four are two kept values
// of four, and the index of 64 columns is the instruction's metadata as it is, for both halves. A word of a row holds 8 codes, of the pairs
// of two groups: its even nibbles are in the first half, its odd ones in the second.
struct SparseFragments {
  static constexpr int kRowBytes = kStepRowBytes / 4, kIndexBytes = 16, kInstructions = 2;
  using Words = uint32_t[kInstructions][5];
  struct Fetched {
    uint32_t codes[2 * kInstructions];  // of row g and row g + 8 for each instruction
    uint2 index;
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row >> 2 & 1)) * 16;
  }
  static __device__ __forceinline__ uint32_t index_offset(int first_row) {
    const int lane = threadIdx.x % 32;
    return kWgmmaN * kRowBytes + (first_row + lane / 4 + lane % 2 * 8) * kIndexBytes;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address, uint32_t index_address) {
    ldmatrix_x4(fetched.codes, address);
    fetched.index = load_shared_64(index_address);
  }
  // The words' products have been waited for.
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        words[i][row] = value(fetched.codes[2 * i + row] & 0x0F0F0F0Fu, problem);
        words[i][2 + row] = value(fetched.codes[2 * i + row] >> 4 & 0x0F0F0F0Fu, problem);
      }
    }
    replace_metadata(words[0][4], fetched.index.x, problem.value_mul);
    replace_metadata(words[1][4], fetched.index.y, problem.value_mul);
  }

 private:
  // 4 codes to mul c + add; v + 128 carries nothing from byte to byte.
  static __device__ __forceinline__ uint32_t value(uint32_t four, const WgmmaProblem& problem) {
    return (four * problem.value_mul + problem.value_add) ^ 0x80808080u;
  }
};

}  // namespace quest::cuda
