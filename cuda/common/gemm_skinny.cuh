// The product for at most 16 rows of a, where reading the weight once is all that counts: on mma.sync, weights straight from memory to
// registers.
//
// A thread block keeps all of a in shared memory and stays; it has two teams of 8 warps. A team makes 16 columns of y at a time: its warps
// share K, and their sums meet in shared memory in a fixed order, so there is one launch and no atomics. A warp always has the loads of its
// next few slices on their way, across tiles too. The code is short on purpose: it is read from memory once for a few microseconds of work.
//
// The weight is the left operand of the instruction, so its 16 rows are full. In a slice of 128 columns, lane (g, t) = (lane / 4, lane % 4)
// holds the columns 32 t ... 32 t + 31 of the weight rows g and g + 8 and of the rows g and g + 8 of a. The instruction sums over K in any
// order as long as both operands agree, so word i of a lane may be what it calls column 4t or 16 + 4t, and a is stored in whatever order
// unpacking the weight is cheapest.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/epilogue.cuh"
#include "common/operands.cuh"
#include "common/ptx.cuh"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kSkinnyTeams = 2, kSkinnyWarps = 8;
inline constexpr int kTeamThreads = 32 * kSkinnyWarps, kSkinnyThreads = kSkinnyTeams * kTeamThreads;
inline constexpr int kSkinnyM = 16, kSkinnyN = 16;
inline constexpr int kSliceColumns = 128;
inline constexpr int kLaneColumns = 32;
inline constexpr int kSumPitch = kSkinnyN + 4;  // words between rows of a warp's sums: its lanes then write to 32 banks

// Rows that start at multiples of 16 bytes.
struct SkinnyRows {
  const uint8_t* data;
  int64_t rows, row_bytes;
  uint32_t flip;  // of bytes: 0x80808080 makes c - 128 of 8-bit codes
  uint4 table;    // of nibbles that are looked up

  __device__ __forceinline__ uint4 load(int64_t row, int64_t byte) const {
    if (row >= rows || byte >= row_bytes) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(data + row * row_bytes + byte);
  }
};

// What a lane loads of a weight row, 32 columns, and the words that quarter `p` of it becomes (beyond the row: anything, a is 0 there).
// order: 16 columns of a, to the same order.
struct SkinnyBytes {
  static constexpr int kDepth = 2;  // slices that a warp has on their way
  uint4 loaded[2];
  __device__ __forceinline__ void load(const SkinnyRows& source, int64_t row, int64_t column) {
    loaded[0] = source.load(row, column);
    loaded[1] = source.load(row, column + 16);
  }
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int p) const {
    const uint4& half = loaded[p / 2];
    return p % 2 == 0 ? make_uint2(half.x ^ source.flip, half.y ^ source.flip) : make_uint2(half.z ^ source.flip, half.w ^ source.flip);
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

// Codes: the even ones of 8 and the odd ones.
struct SkinnyNibbles {
  static constexpr int kDepth = 4;
  uint4 loaded;
  __device__ __forceinline__ void load(const SkinnyRows& source, int64_t row, int64_t column) { loaded = source.load(row, column / 2); }
  __device__ __forceinline__ uint32_t quarter(int p) const { return p == 0 ? loaded.x : p == 1 ? loaded.y : p == 2 ? loaded.z : loaded.w; }
  __device__ __forceinline__ uint2 words(const SkinnyRows&, int p) const {
    return make_uint2(quarter(p) & 0x0F0F0F0Fu, quarter(p) >> 4 & 0x0F0F0F0Fu);
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) {
    return make_uint4(__byte_perm(columns.x, columns.y, 0x6420), __byte_perm(columns.x, columns.y, 0x7531),
                      __byte_perm(columns.z, columns.w, 0x6420), __byte_perm(columns.z, columns.w, 0x7531));
  }
};

// Values by table.
struct SkinnyTable : SkinnyNibbles {
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int p) const {
    return make_uint2(look_up_nibbles(source.table, quarter(p)), look_up_nibbles(source.table, quarter(p) >> 16));
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

// Where piece `half` (16 columns) of lane t's 32 lies in a row of a slice: swapped in odd rows, so that eight lanes read 32 banks.
__device__ __forceinline__ int piece_offset(int row, int t, int half) { return (half ^ (row & 1)) * 64 + t * 16; }

__device__ __forceinline__ void team_barrier(int team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeamThreads) : "memory"); }

// TILES_M: of 8 rows of a. columns: bytes of a row of a.
template <typename Mma, typename W, int TILES_M>
__global__ __launch_bounds__(kSkinnyThreads, 1) void gemm_skinny_kernel(const __grid_constant__ SkinnyRows a_source,
                                                                        const __grid_constant__ SkinnyRows w_source,
                                                                        const __grid_constant__ IntegerEpilogue epilogue) {
  constexpr int kRows = 8 * TILES_M;
  __shared__ int32_t sums[kSkinnyTeams][2][kSkinnyWarps][kRows * kSumPitch];  // of a tile, and of the next
  uint8_t* const a_rows = dynamic_shared();
  const Output& y = epilogue.output;
  const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads, warp = thread / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, t = lane % 4;
  const int slices = static_cast<int>((a_source.row_bytes + kSliceColumns - 1) / kSliceColumns);
  const int first_slice = warp * slices / kSkinnyWarps, last_slice = (warp + 1) * slices / kSkinnyWarps;
  const int tiles = static_cast<int>((y.n + kSkinnyN - 1) / kSkinnyN), stride = kSkinnyTeams * static_cast<int>(gridDim.x);
  const int first_tile = team * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);

  dependents_may_launch();
  wait_for_prerequisites();

  W weight[W::kDepth][2];
  auto load = [&](W(&rows)[2], int tile, int slice) {
    const int64_t row = static_cast<int64_t>(tile) * kSkinnyN + group;
    const int64_t column = static_cast<int64_t>(slice) * kSliceColumns + t * kLaneColumns;
    rows[0].load(w_source, row, column);
    rows[1].load(w_source, row + 8, column);
  };
#pragma unroll
  for (int d = 0; d < W::kDepth; ++d) {
    if (first_slice + d < last_slice) load(weight[d], first_tile, first_slice + d);
  }

  // All of a, zeros beyond its rows and columns.
  constexpr int kPieces = kSliceColumns / 16, kBatch = 4;  // loads of a thread that are on their way together
  const int pieces = slices * kRows * kPieces;
  for (int first = threadIdx.x; first < pieces; first += kBatch * kSkinnyThreads) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      loaded[b] = a_source.load(row, static_cast<int64_t>(slice) * kSliceColumns + i % kPieces * 16);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, piece = i % kPieces, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      if (i < pieces) {
        *reinterpret_cast<uint4*>(a_rows + (slice * kRows + row) * kSliceColumns + piece_offset(row, piece / 2, piece % 2)) =
            W::order(loaded[b]);
      }
    }
  }
  __syncthreads();

  // The element of each tile that this thread writes, and what it needs for that.
  const int m = thread / kSkinnyN, n_in_tile = thread % kSkinnyN;
  const bool writes = thread < kRows * kSkinnyN && m < y.m;
  const float row_scale = writes ? epilogue.row_scale(m) : 0.0f;
  const uint32_t row_part = writes ? epilogue.row_part(m, 0) : 0;

  int buffer = 0;
  for (int tile = first_tile; tile < tiles; tile += stride, buffer ^= 1) {
    const int64_t n = static_cast<int64_t>(tile) * kSkinnyN + n_in_tile;
    const bool exists = writes && n < y.n;
    const float column_scale = exists ? epilogue.column_scale(n) : 0.0f, bias = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
    const int32_t column_sum = exists ? epilogue.w.load(n) : 0;
    int32_t accumulators[TILES_M][4] = {};
    for (int slice = first_slice; slice < last_slice; slice += W::kDepth) {
#pragma unroll
      for (int d = 0; d < W::kDepth; ++d) {
        if (slice + d >= last_slice) break;
        const uint8_t* const a_slice = a_rows + ((slice + d) * kRows + group) * kSliceColumns;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 a_words[TILES_M];
#pragma unroll
          for (int j = 0; j < TILES_M; ++j) {
            a_words[j] = *reinterpret_cast<const uint4*>(a_slice + j * 8 * kSliceColumns + piece_offset(group, t, half));
          }
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const uint2 top = weight[d][0].words(w_source, 2 * half + p), bottom = weight[d][1].words(w_source, 2 * half + p);
            const uint32_t fragment[4] = {top.x, bottom.x, top.y, bottom.y};
#pragma unroll
            for (int j = 0; j < TILES_M; ++j) {
              Mma::mma(accumulators[j], fragment, p == 0 ? a_words[j].x : a_words[j].z, p == 0 ? a_words[j].y : a_words[j].w);
            }
          }
        }
        // The slice that comes to these registers next: of this tile, or the same of the next (beyond the last: zeros, not loaded).
        const bool ends = slice + d + W::kDepth >= last_slice;
        load(weight[d], ends ? tile + stride : tile, ends ? first_slice + d : slice + d + W::kDepth);
      }
    }

    int32_t* const own = sums[team][buffer][warp];
#pragma unroll
    for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) own[(j * 8 + t * 2 + c % 2) * kSumPitch + group + c / 2 * 8] = accumulators[j][c];
    }
    team_barrier(team);
    if (exists) {
      int32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kSkinnyWarps; ++w) sum += sums[team][buffer][w][m * kSumPitch + n_in_tile];
      store_value(y, m, n, scaled(epilogue.product(sum, row_part, epilogue.w.of_codes(column_sum)), row_scale, column_scale, bias));
    }
  }
}

// ---- host

// Whether the kernel takes the rows of an operand as they are stored: a as int8 integers, w also as 8-bit codes and nibbles.
inline bool is_skinny_a(const Operand& a, int64_t k) {
  const bool bytes = a.layout == Layout::kValues || (a.layout == Layout::kCodes && a.grid.bits < 8 && !is_fp4(a));
  return bytes && is_aligned(a.data, 16) && k % 16 == 0;
}
inline bool is_skinny_w(const Operand& w, int64_t k) {
  if (w.layout == Layout::kPacked) return is_aligned(w.data, 16);
  return (w.layout == Layout::kValues || !is_fp4(w)) && is_aligned(w.data, 16) && k % 16 == 0;
}

// The map of the integers that the kernel makes of an operand (8-bit codes are flipped to those of kValues).
inline Affine skinny_affine(const Operand& operand, bool looks_up) {
  if (looks_up) return {1, 0};
  const bool flips = operand.layout == Layout::kCodes && operand.grid.bits == 8;
  return affine(operand.grid, flips ? Layout::kValues : operand.layout);
}

inline SkinnyRows skinny_rows(const Operand& operand, int64_t rows, int64_t k) {
  SkinnyRows result{static_cast<const uint8_t*>(operand.data), rows, row_bytes(operand.layout, k), 0, {}};
  if (operand.layout == Layout::kCodes && operand.grid.bits == 8) result.flip = 0x80808080u;
  if (operand.layout == Layout::kPacked) result.table = value_table(operand.grid);
  return result;
}

template <typename Mma, typename W>
void launch_skinny(const char* op, const SkinnyRows& a, const SkinnyRows& w, const IntegerEpilogue& epilogue, const Device& device,
                   cudaStream_t stream) {
  const int64_t m = epilogue.output.m, tiles = (epilogue.output.n + kSkinnyN - 1) / kSkinnyN;
  check(m <= kSkinnyM && tiles <= INT32_MAX / 2, op, ": expected m <= ", kSkinnyM, " and n <= ", int64_t{kSkinnyN} * (INT32_MAX / 2),
        ", got ", m, ", ", epilogue.output.n);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, device.sm_count)));
  const int64_t slices = (a.row_bytes + kSliceColumns - 1) / kSliceColumns;
  const auto shared = static_cast<size_t>((m <= 8 ? 8 : kSkinnyM) * slices * kSliceColumns);
  auto run = [&](auto kernel) {
    launch_with({1, device.hopper_code}, op, kernel, grid, dim3(kSkinnyThreads), shared, stream, a, w, epilogue);
  };
  m <= 8 ? run(gemm_skinny_kernel<Mma, W, 1>) : run(gemm_skinny_kernel<Mma, W, 2>);
}

}  // namespace quest::cuda
