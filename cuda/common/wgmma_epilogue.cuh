// From the accumulators of a warpgroup to its 64 columns of y.
//
// The accumulators hold y transposed: a thread has two columns and a pair of rows in every 8. They become pieces of some rows in shared
// memory, transposed on the way by stmatrix, which the copy engine writes to y. Where it cannot (float32, or rows that do not start at
// multiples of 16 bytes), and in the kernels of few rows, threads store single elements or two.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/epilogue.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace quest::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWarpgroupColumns = 64;
inline constexpr int kStoreRowBytes = 2 * kWarpgroupColumns;

// Of this thread in its block: the same in all lanes, and the compiler is to know, so that what follows from it (descriptors of operands
// above all) is reckoned once a warp and needs no vector registers.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0); }
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) % kWarpgroup / 32, 0); }

// The registers of a thread, of which warpgroups give some to others later.
constexpr int registers_at_start(int threads) { return 65536 / threads / 8 * 8; }

// The named barrier of a multiplying warpgroup; others have lower numbers, or those behind the last group's.
__device__ __forceinline__ int group_barrier(int group) { return 2 + group; }

template <int ROWS_>
struct OutputPiece {
  static constexpr int ROWS = ROWS_, BYTES = ROWS * kStoreRowBytes;
  static_assert(ROWS % 16 == 0, "two matrices of stmatrix");
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

// Sums of real a, whose rows have no factors.
template <typename Accumulator>
inline constexpr bool kRealSums = std::is_same_v<Accumulator, float>;

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
        factors[in_tile] = {scale_[i], output.epilogue.row_of(sum_[i])};
      }
    }
  }

 private:
  static constexpr int kRows = (BLOCK_M + kWarpgroup - 1) / kWarpgroup;  // a thread
  float scale_[kRows];
  int32_t sum_[kRows];
};

struct NoRowLoads {  // where there are kRealSums
  __device__ __forceinline__ NoRowLoads(const TileOutput&, int) {}
};

// Among a warp's 16 columns of y the `i`-th of this lane's two.
__device__ __forceinline__ int lane_column(bool adjacent, int i) {
  const int g = threadIdx.x % 32 / 4;
  return adjacent ? 2 * g + i : g + 8 * i;
}

class ColumnLoads {
 public:
  __device__ __forceinline__ ColumnLoads(const TileOutput& output, int first_n, bool adjacent) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = first_n + threadIdx.x % kWarpgroup / 32 * 16 + lane_column(adjacent, i);
      const Output& y = output.epilogue.output;
      const bool exists = n < y.n;
      scale_[i] = exists ? output.epilogue.column_scale(n) : 0.0f;
      sum_[i] = exists ? output.epilogue.w.load(n) : 0;
      bias_[i] = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
    }
  }
  __device__ __forceinline__ ColumnFactors factors(const TileOutput& output) const {
    return {{scale_[0], scale_[1]}, {bias_[0], bias_[1]}, {output.epilogue.column_of(sum_[0]), output.epilogue.column_of(sum_[1])}};
  }

 private:
  float scale_[2], bias_[2];
  int32_t sum_[2];
};

// What a lane has of 8 rows from first_m on, before last_m, and a warp's 16 columns from first_n on: two rows and two columns, value(c) for
// row c % 2 and column c / 2. Adjacent columns are stored together, so that the memory gets whole sectors of 32 bytes (a kernel of 64 rows
// is 2 to 7 % faster).
template <typename Value>
__device__ __forceinline__ void store_four(const Output& y, int first_m, int last_m, int first_n, bool adjacent, Value value) {
  const int m = first_m + threadIdx.x % 4 * 2, n = first_n + lane_column(adjacent, 0);
  uint8_t* const first = element_of(y, m, n);
  const int64_t next_row = element_of(y, 1, 0) - element_of(y, 0, 0);
  if (adjacent) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (m + c < last_m && n < y.n) store_two_at(y, first + c * next_row, value(c), value(2 + c));
    }
  } else {
    const int64_t next_column = element_of(y, 0, 8) - element_of(y, 0, 0);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (m + c % 2 < last_m && n + c / 2 * 8 < y.n) store_at(y, first + c % 2 * next_row + c / 2 * next_column, value(c));
    }
  }
}

// 8 rows of a warpgroup's tile.
template <typename Accumulator>
__device__ __forceinline__ void store_group(const TileOutput& output, const Accumulator (&accumulators)[4], const RowFactors* factors,
                                            const ColumnFactors& column, int first_m, int first_n, bool adjacent) {
  const Output& y = output.epilogue.output;
  const int warp_n = first_n + threadIdx.x % kWarpgroup / 32 * 16;
  store_four(y, first_m, static_cast<int>(y.m), warp_n, adjacent, [&](int c) {
    if constexpr (kRealSums<Accumulator>) {
      return scaled(accumulators[c], 1.0f, column.scale[c / 2], column.bias[c / 2]);
    } else {
      const RowFactors& row = factors[threadIdx.x % 4 * 2 + c % 2];
      const float product = output.epilogue.product(accumulators[c], row.part, column.part[c / 2]);
      return scaled(product, row.scale, column.scale[c / 2], column.bias[c / 2]);
    }
  });
}

// The rows from `first` on of a warpgroup's tile to a piece in shared memory. factors: of the tile's rows.
template <typename Piece, typename Accumulator, int COUNT>
__device__ __forceinline__ void write_piece(const TileOutput& output, const Accumulator (&accumulators)[COUNT], int first,
                                            const RowFactors* factors, const ColumnFactors& column, uint8_t* buffer) {
  const uint32_t mul = output.epilogue.mul;
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  const int row_in_matrix = lane / 16 * 8 + lane % 8;
  uint8_t* const target = buffer + row_in_matrix * kStoreRowBytes + ((warp * 2 + lane / 8 % 2) ^ (row_in_matrix & 7)) * 16;
  const bool bfloat16 = output.epilogue.output.dtype == DType::kBFloat16;
#pragma unroll
  for (int j = 0; j < Piece::ROWS; j += 16) {
    float low[4], high[4];  // of this thread's pair of rows: in the first 8 of its two columns, then in the second
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 pair =
          kRealSums<Accumulator> ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(factors + first + j + half * 8 + lane % 4 * 2);
      const int index = (first + j + half * 8) / 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto value = [&](Accumulator accumulator, uint32_t scale, uint32_t part) {
          if constexpr (kRealSums<Accumulator>) {
            return scaled(accumulator, 1.0f, column.scale[i], column.bias[i]);
          } else {
            const uint32_t sum = mul * static_cast<uint32_t>(accumulator) + part + column.part[i];
            return scaled(static_cast<float>(static_cast<int32_t>(sum)), __uint_as_float(scale), column.scale[i], column.bias[i]);
          }
        };
        low[half * 2 + i] = value(accumulators[index + 2 * i], pair.x, pair.y);
        high[half * 2 + i] = value(accumulators[index + 2 * i + 1], pair.z, pair.w);
      }
    }
    uint32_t words[4];
    if (bfloat16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack_bfloat16(low[i], high[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack_float16(low[i], high[i]);
    }
    stmatrix_x4_transposed(target + j * kStoreRowBytes, words);
  }
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
