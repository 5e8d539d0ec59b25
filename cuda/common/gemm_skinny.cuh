// The product for at most 16 rows of a, where reading the weight once is all that counts: on mma.sync, weights straight from memory to
// registers.
//
// A thread block keeps all of a in shared memory and stays; it has two teams of 8 warps. A team makes 16 columns of y at a time: its warps
// share K, and their sums meet in shared memory in a fixed order, so there is one launch and no atomics. A warp always has the loads of its
// next few slices on their way, across tiles too.
//
// The weight is the left operand of the instruction, so its 16 rows are full. In a slice of 128 columns, lane (g, t) = (lane / 4, lane % 4)
// holds the columns 32 t ... 32 t + 31 of the weight rows g and g + 8 and of the rows g and g + 8 of a. The instruction sums over K in any
// order as long as both operands agree, so word i of a lane may be what it calls column 4t or 16 + 4t, and a is stored in whatever order
// unpacking the weight is cheapest.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/epilogue.cuh"
#include "common/gemm_tile.cuh"
#include "common/ptx.cuh"

namespace quest::cuda {

inline constexpr int kSkinnyTeams = 2, kSkinnyWarps = 8;
inline constexpr int kTeamThreads = 32 * kSkinnyWarps, kSkinnyThreads = kSkinnyTeams * kTeamThreads;
inline constexpr int kSkinnyM = 16, kSkinnyN = 16;
inline constexpr int kSliceColumns = 128;
inline constexpr int kLaneColumns = 32;
inline constexpr int kSumPitch = kSkinnyN + 4;  // words between rows of a warp's sums: its lanes then write to 32 banks

// What a lane loads of a weight row, 32 columns, and the words that quarter `p` of it becomes (beyond the row: anything, a is 0 there).
// order: 16 columns of a, to the same order.
struct SkinnyBytes {
  using Source = ByteRows;
  static constexpr int kDepth = 2;  // slices that a warp has on their way
  uint4 loaded[2];
  __device__ __forceinline__ void load(const ByteRows& source, int64_t row, int64_t column) {
    loaded[0] = source.load_stored(0, row, column);
    loaded[1] = source.load_stored(0, row, column + 16);
  }
  __device__ __forceinline__ uint2 words(const ByteRows& source, int p) const {
    const uint4& half = loaded[p / 2];
    return p % 2 == 0 ? make_uint2(source.widen(half.x), source.widen(half.y)) : make_uint2(source.widen(half.z), source.widen(half.w));
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

// Codes: the even ones of 8 and the odd ones.
struct SkinnyNibbles {
  using Source = NibbleRows;
  static constexpr int kDepth = 4;
  uint4 loaded;
  __device__ __forceinline__ void load(const NibbleRows& source, int64_t row, int64_t column) { loaded = source.load(row, column / 2); }
  __device__ __forceinline__ uint32_t quarter(int p) const { return p == 0 ? loaded.x : p == 1 ? loaded.y : p == 2 ? loaded.z : loaded.w; }
  __device__ __forceinline__ uint2 words(const NibbleRows&, int p) const {
    const uint32_t nibbles = quarter(p);
    return make_uint2(nibbles & 0x0F0F0F0Fu, nibbles >> 4 & 0x0F0F0F0Fu);
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) {
    return make_uint4(__byte_perm(columns.x, columns.y, 0x6420), __byte_perm(columns.x, columns.y, 0x7531),
                      __byte_perm(columns.z, columns.w, 0x6420), __byte_perm(columns.z, columns.w, 0x7531));
  }
};

// Values by table.
struct SkinnyTable : SkinnyNibbles {
  __device__ __forceinline__ uint2 words(const NibbleRows& source, int p) const { return source.widen(quarter(p)); }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

// 16 columns of a row of a, as integers.
__device__ __forceinline__ uint4 load_columns(const ByteRows& source, int64_t row, int64_t column) { return source.load(0, row, column); }
__device__ __forceinline__ uint4 load_columns(const NibbleRows& source, int64_t row, int64_t column) {
  if (row >= source.rows || column / 2 >= source.row_bytes) return make_uint4(0, 0, 0, 0);
  const uint2 nibbles = *reinterpret_cast<const uint2*>(source.data + row * source.row_bytes + column / 2);
  const uint2 low = source.widen(nibbles.x), high = source.widen(nibbles.y);
  return make_uint4(low.x, low.y, high.x, high.y);
}

// Where piece `half` (16 columns) of lane t's 32 lies in a row of a slice: swapped in odd rows, so that eight lanes read 32 banks.
__device__ __forceinline__ int piece_offset(int row, int t, int half) { return (half ^ (row & 1)) * 64 + t * 16; }

// Adds a lane's partial sum to the sum of a row. Integers: the order of the atomics does not matter.
__device__ __forceinline__ void add_row_sum(int32_t* sum, uint32_t word) { atomicAdd(sum, __dp4a(static_cast<int>(word), 0x01010101, 0)); }

// TILES_M: of 8 rows of a. columns: bytes of a row of a as it is stored here.
template <typename Mma, typename ASource, typename W, int TILES_M>
__global__ __launch_bounds__(kSkinnyThreads, 1) void gemm_skinny_kernel(const __grid_constant__ ASource a_source,
                                                                        const __grid_constant__ typename W::Source w_source,
                                                                        int64_t columns, const __grid_constant__ IntegerEpilogue epilogue) {
  constexpr int kRows = 8 * TILES_M, kSums = kRows * kSumPitch;
  __shared__ int32_t sums[kSkinnyTeams][2][kSkinnyWarps][kSums];  // of a tile, and of the next
  __shared__ int32_t a_sums[kRows], w_sums[kSkinnyTeams][2][kSkinnyN];
  uint8_t* const a_rows = dynamic_shared();
  const Output& y = epilogue.output;
  const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads, warp = thread / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, t = lane % 4;
  const int slices = static_cast<int>((columns + kSliceColumns - 1) / kSliceColumns);
  // A warp without a slice has one that does not exist.
  int first_slice = warp * slices / kSkinnyWarps, last_slice = (warp + 1) * slices / kSkinnyWarps;
  if (first_slice == last_slice) first_slice = slices, last_slice = slices + 1;
  const int tiles = static_cast<int>((y.n + kSkinnyN - 1) / kSkinnyN), stride = kSkinnyTeams * static_cast<int>(gridDim.x);
  const int first_tile = team * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);

  dependents_may_launch();
  wait_for_prerequisites();

  W weight[W::kDepth][2];
  int loading_tile = first_tile, loading_slice = first_slice;
  auto load_next = [&](W(&rows)[2]) {
    const int64_t row = loading_tile < tiles ? static_cast<int64_t>(loading_tile) * kSkinnyN + group : y.n;
    const int64_t column = static_cast<int64_t>(loading_slice) * kSliceColumns + t * kLaneColumns;
    rows[0].load(w_source, row, column);
    rows[1].load(w_source, row + 8, column);
    if (++loading_slice == last_slice) loading_slice = first_slice, loading_tile += stride;
  };
#pragma unroll
  for (int d = 0; d < W::kDepth; ++d) load_next(weight[d]);

  // All of a, zeros beyond its rows and columns.
  if (threadIdx.x < kRows) a_sums[threadIdx.x] = 0;
  if (threadIdx.x < kSkinnyTeams * 2 * kSkinnyN) (&w_sums[0][0][0])[threadIdx.x] = 0;
  __syncthreads();
  constexpr int kPieces = kSliceColumns / 16, kBatch = 8;  // loads of a thread that are on their way together
  for (int first = threadIdx.x; first < slices * kRows * kPieces; first += kBatch * kSkinnyThreads) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, piece = i % kPieces, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      loaded[b] =
          row < y.m ? load_columns(a_source, row, static_cast<int64_t>(slice) * kSliceColumns + piece * 16) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, piece = i % kPieces, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      if (slice >= slices) break;
      if (epilogue.a.sums_values) {
        for (const uint32_t word : {loaded[b].x, loaded[b].y, loaded[b].z, loaded[b].w}) add_row_sum(&a_sums[row], word);
      }
      *reinterpret_cast<uint4*>(a_rows + (slice * kRows + row) * kSliceColumns + piece_offset(row, piece / 2, piece % 2)) =
          W::order(loaded[b]);
    }
  }
  __syncthreads();

  // The element of each tile that this thread writes, and what it needs for that.
  const int m = thread / kSkinnyN, n_in_tile = thread % kSkinnyN;
  const bool writes = thread < kRows * kSkinnyN && m < y.m;
  const float row_scale = writes ? epilogue.row_scale(m) : 0.0f;
  const uint32_t row_part = writes ? epilogue.row_part(m, a_sums[m]) : 0;
  float column_scale = 0, bias = 0;
  int32_t column_sum = 0;
  auto load_column = [&](int tile) {
    const int64_t n = static_cast<int64_t>(tile) * kSkinnyN + n_in_tile;
    if (!writes || n >= y.n) return;
    column_scale = epilogue.column_scale(n);
    column_sum = epilogue.w.sums_values ? 0 : epilogue.w.load(n);
    if (y.bias != nullptr) bias = y.bias[n];
  };
  load_column(first_tile);

  int32_t accumulators[TILES_M][4] = {};
  int tile = first_tile, slice = first_slice, buffer = 0;
  while (tile < tiles) {
#pragma unroll
    for (int d = 0; d < W::kDepth; ++d) {
      if (tile >= tiles) break;
      const uint8_t* const a_slice = a_rows + (slice * kRows + group) * kSliceColumns;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (slice >= slices) continue;
        uint4 a_words[TILES_M];
#pragma unroll
        for (int j = 0; j < TILES_M; ++j) {
          a_words[j] = *reinterpret_cast<const uint4*>(a_slice + j * 8 * kSliceColumns + piece_offset(group, t, half));
        }
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const uint2 top = weight[d][0].words(w_source, 2 * half + p), bottom = weight[d][1].words(w_source, 2 * half + p);
          if (epilogue.w.sums_values) {
            add_row_sum(&w_sums[team][buffer][group], top.x);
            add_row_sum(&w_sums[team][buffer][group], top.y);
            add_row_sum(&w_sums[team][buffer][group + 8], bottom.x);
            add_row_sum(&w_sums[team][buffer][group + 8], bottom.y);
          }
          const uint32_t fragment[4] = {top.x, bottom.x, top.y, bottom.y};
#pragma unroll
          for (int j = 0; j < TILES_M; ++j) {
            Mma::mma(accumulators[j], fragment, p == 0 ? a_words[j].x : a_words[j].z, p == 0 ? a_words[j].y : a_words[j].w);
          }
        }
      }
      load_next(weight[d]);
      if (++slice < last_slice) continue;

      // The tile's last slice of this warp.
      int32_t* const own = sums[team][buffer][warp];
#pragma unroll
      for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          own[(j * 8 + t * 2 + c % 2) * kSumPitch + group + c / 2 * 8] = accumulators[j][c];
          accumulators[j][c] = 0;
        }
      }
      asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeamThreads) : "memory");
      const int64_t n = static_cast<int64_t>(tile) * kSkinnyN + n_in_tile;
      if (writes && n < y.n) {
        int32_t sum = 0;
#pragma unroll
        for (int w = 0; w < kSkinnyWarps; ++w) sum += sums[team][buffer][w][m * kSumPitch + n_in_tile];
        const uint32_t column_part =
            epilogue.w.sums_values ? epilogue.column_part(n, w_sums[team][buffer][n_in_tile]) : epilogue.w.of_codes(column_sum);
        store_value(y, m, n, scaled(epilogue.product(sum, row_part, column_part), row_scale, column_scale, bias));
      }
      if (epilogue.w.sums_values) {  // seldom: fp4 whose other operand is no values
        asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeamThreads) : "memory");
        if (thread < kSkinnyN) w_sums[team][buffer][thread] = 0;
      }
      slice = first_slice, tile += stride, buffer ^= 1;
      load_column(tile);
    }
  }
}

// ---- host

// Bytes of shared memory of a: rows of a in slices.
constexpr int64_t skinny_bytes(int64_t m, int64_t columns) {
  return (m <= 8 ? 8 : kSkinnyM) * ((columns + kSliceColumns - 1) / kSliceColumns * kSliceColumns);
}

template <typename Mma, typename W, typename ASource>
void launch_skinny(const char* op, const ASource& a, const typename W::Source& w, int64_t columns, const IntegerEpilogue& epilogue,
                   const Device& device, cudaStream_t stream) {
  const int64_t m = epilogue.output.m, tiles = (epilogue.output.n + kSkinnyN - 1) / kSkinnyN;
  check(m <= kSkinnyM && tiles <= INT32_MAX / 2, op, ": expected m <= ", kSkinnyM, " and n <= ", int64_t{kSkinnyN} * (INT32_MAX / 2),
        ", got ", m, ", ", epilogue.output.n);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, device.sm_count)));
  const auto shared = static_cast<size_t>(skinny_bytes(m, columns));
  auto run = [&](auto kernel) {
    launch_with({1, device.hopper_code}, op, kernel, grid, dim3(kSkinnyThreads), shared, stream, a, w, columns, epilogue);
  };
  m <= 8 ? run(gemm_skinny_kernel<Mma, ASource, W, 1>) : run(gemm_skinny_kernel<Mma, ASource, W, 2>);
}

}  // namespace quest::cuda
