// From the accumulators of a warpgroup to its BLOCK_M x 64 of y.
//
// The accumulators hold y transposed: a thread has two columns and a pair of rows in every 8. They become pieces of 64 rows in shared
// memory, transposed on the way by stmatrix, which the copy engine writes to y. Where it cannot (float32, or rows that do not start at
// multiples of 16 bytes), threads store single elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/epilogue.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace quest::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kMultipliers = 2;  // warpgroups
inline constexpr int kWarpgroupColumns = 64;
inline constexpr int kStoreRowBytes = 2 * kWarpgroupColumns;
inline constexpr int kStoreRows = 64;

// Of this thread in its block: the same in all lanes, and the compiler is to know, so that what follows from it (descriptors of operands
// above all) is reckoned once a warp and needs no vector registers.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0); }

// ---- named barriers: of both warpgroups, of one, of the pieces of y, and of whose turn it is

inline constexpr int kBothBarrier = 1, kPieceBarriers = 4;
__device__ __forceinline__ int group_barrier(int group) { return 2 + group; }
__device__ __forceinline__ int piece_barrier(int group, int piece) { return 2 + kMultipliers + group * kPieceBarriers + piece; }
__device__ __forceinline__ int turn_barrier(int group) { return 2 + kMultipliers * (1 + kPieceBarriers) + group; }

// The pieces of a warpgroup's tile, and how many of them have a buffer of their own.
template <int BLOCK_M_, int BUFFERS_>
struct Pieces {
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int ROWS = std::min(BLOCK_M, kStoreRows), COUNT = BLOCK_M / ROWS;
  static constexpr int BUFFERS = std::min(COUNT, BUFFERS_);
  static constexpr int BYTES = ROWS * kStoreRowBytes;  // of a piece
  static_assert(COUNT <= kPieceBarriers, "a barrier for each piece");
};

struct TileOutput {
  IntegerEpilogue epilogue;
  bool tensor_store;  // y is 16-bit, in rows that the copy engine can write
};

// What the epilogue needs of one row of y.
struct RowFactors {
  float scale;
  uint32_t part;
};

// And of the two columns of a thread.
struct ColumnFactors {
  float scale[2], bias[2];
  uint32_t part[2];
};

// Both are loaded before a main loop and looked at after it: until then memory has time.
template <int BLOCK_M>
class RowLoads {
 public:
  __device__ __forceinline__ RowLoads(const TileOutput& output, int first_m) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int in_tile = i * kWarpgroup + static_cast<int>(threadIdx.x % kWarpgroup), row = first_m + in_tile;
      const bool exists = in_tile < BLOCK_M && row < output.epilogue.output.m;
      scale_[i] = exists ? output.epilogue.row_scale(row) : 0.0f;
      sum_[i] = exists ? output.epilogue.a.load(row) : 0;
    }
  }
  __device__ __forceinline__ void store(const TileOutput& output, RowFactors* factors) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int in_tile = i * kWarpgroup + static_cast<int>(threadIdx.x % kWarpgroup);
      if (in_tile < BLOCK_M) {
        factors[in_tile] = {scale_[i], output.epilogue.a.of_codes(sum_[i]) + output.epilogue.constant};
      }
    }
  }

 private:
  static constexpr int kRows = (BLOCK_M + kWarpgroup - 1) / kWarpgroup;  // a thread
  float scale_[kRows];
  int32_t sum_[kRows];
};

// The column of y of a thread's `i`-th one, of a warpgroup whose first is first_n.
__device__ __forceinline__ int thread_column(int first_n, int i) {
  const int thread = threadIdx.x % kWarpgroup;
  return first_n + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
}

class ColumnLoads {
 public:
  __device__ __forceinline__ ColumnLoads(const TileOutput& output, int first_n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = thread_column(first_n, i);
      const Output& y = output.epilogue.output;
      const bool exists = n < y.n;
      scale_[i] = exists ? output.epilogue.column_scale(n) : 0.0f;
      sum_[i] = exists ? output.epilogue.w.load(n) : 0;
      bias_[i] = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
    }
  }
  __device__ __forceinline__ ColumnFactors factors(const TileOutput& output) const {
    return {{scale_[0], scale_[1]}, {bias_[0], bias_[1]}, {output.epilogue.w.of_codes(sum_[0]), output.epilogue.w.of_codes(sum_[1])}};
  }

 private:
  float scale_[2], bias_[2];
  int32_t sum_[2];
};

// A warpgroup's tile by the copy engine. Where each piece has a buffer, no warp but the one that starts the copies waits for the others
// after the first.
template <typename Piece, bool BFLOAT16>
__device__ __forceinline__ void store_pieces(const int32_t (&accumulators)[Piece::BLOCK_M / 2], uint32_t mul, const RowFactors* factors,
                                             const ColumnFactors& column, uint8_t* buffers, const CUtensorMap* y_map, int first_m,
                                             int first_n, int group) {
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = threadIdx.x % 32;
  const int row_in_matrix = lane / 16 * 8 + lane % 8;
  const int target = row_in_matrix * kStoreRowBytes + ((warp * 2 + lane / 8 % 2) ^ (row_in_matrix & 7)) * 16;
  auto value = [&](int index, float scale, uint32_t part, int i) {
    const uint32_t sum = mul * static_cast<uint32_t>(accumulators[index]) + part + column.part[i];
    return scaled(static_cast<float>(static_cast<int32_t>(sum)), scale, column.scale[i], column.bias[i]);
  };
#pragma unroll
  for (int piece = 0; piece < Piece::COUNT; ++piece) {
    const int first = piece * Piece::ROWS;
    uint8_t* const buffer = buffers + piece % Piece::BUFFERS * Piece::BYTES;
    if (piece == 0 || piece >= Piece::BUFFERS) {
      if (thread == 0) {
        if (piece == 0) {
          bulk_wait_read<0>();  // all buffers: the copies of the tile before have had its successor's main loop to end
        } else {
          bulk_wait_read<Piece::BUFFERS - 1>();
        }
      }
      named_barrier(group_barrier(group), kWarpgroup);  // the buffer is free; before the first piece: the factors are there
    }
    uint4 pairs[Piece::ROWS / 8];  // the factors of this thread's two rows in every 8
#pragma unroll
    for (int j = 0; j < Piece::ROWS / 8; ++j) pairs[j] = *reinterpret_cast<const uint4*>(factors + first + j * 8 + lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < Piece::ROWS; j += 16) {
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 pair = pairs[j / 8 + half];
        const int index = (first + j + half * 8) / 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float low = value(index + 2 * i, __uint_as_float(pair.x), pair.y, i);
          const float high = value(index + 2 * i + 1, __uint_as_float(pair.z), pair.w, i);
          words[half * 2 + i] = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
        }
      }
      stmatrix_x4_transposed(buffer + target + j * kStoreRowBytes, words);
    }
    async_proxy_fence();
    if (warp == 0) {
      named_barrier(piece_barrier(group, piece), kWarpgroup);
      if (lane == 0) {
        tensor_store(y_map, buffer, first_n, first_m + first);
        bulk_commit();
      }
      __syncwarp();
    } else {
      named_barrier_arrive(piece_barrier(group, piece), kWarpgroup);
    }
  }
}

// Group j of 8 rows of a warpgroup's tile, element by element.
__device__ __forceinline__ void store_group(const TileOutput& output, const int32_t (&accumulators)[4], const RowFactors* factors,
                                            const ColumnFactors& column, int first_m, int first_n, int j) {
  const Output& y = output.epilogue.output;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int row = j * 8 + threadIdx.x % 4 * 2 + c % 2, i = c / 2, n = thread_column(first_n, i);
    if (first_m + row < y.m && n < y.n) {
      const float product = output.epilogue.product(accumulators[c], factors[row].part, column.part[i]);
      store_value(y, first_m + row, n, scaled(product, factors[row].scale, column.scale[i], column.bias[i]));
    }
  }
}

// A warpgroup's tile of y. factors: of its rows, written by this warpgroup without a barrier since.
template <typename Piece>
__device__ __forceinline__ void store_tile(const TileOutput& output, const int32_t (&accumulators)[Piece::BLOCK_M / 2],
                                           const RowFactors* factors, const ColumnFactors& column, uint8_t* buffers,
                                           const CUtensorMap* y_map, int first_m, int first_n, int group) {
  const Output& y = output.epilogue.output;
  if (output.tensor_store) {
    auto store = [&](auto bfloat16) {
      store_pieces<Piece, bfloat16.value>(accumulators, output.epilogue.mul, factors, column, buffers, y_map, first_m, first_n, group);
    };
    y.dtype == DType::kBFloat16 ? store(std::true_type{}) : store(std::false_type{});
    return;
  }
  named_barrier(group_barrier(group), kWarpgroup);
#pragma unroll
  for (int j = 0; j < Piece::BLOCK_M / 8; ++j) {
    const int32_t four[4] = {accumulators[4 * j], accumulators[4 * j + 1], accumulators[4 * j + 2], accumulators[4 * j + 3]};
    store_group(output, four, factors, column, first_m, first_n, j);
  }
  named_barrier(group_barrier(group), kWarpgroup);  // the factors are read before the next tile's are written
}

// ---- host

// Completes `output`, and makes the copy engine's map of y (of pieces of `rows` rows).
inline CUtensorMap output_map(const char* op, TileOutput& output, int rows) {
  const Output& y = output.epilogue.output;
  output.tensor_store = y.vectorized && y.dtype != DType::kFloat32;
  if (!output.tensor_store) return {};
  return tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT16, y.y, {{y.n, 2, kWarpgroupColumns}, {y.m, y.n * 2, static_cast<uint32_t>(rows)}},
                    CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace quest::cuda
