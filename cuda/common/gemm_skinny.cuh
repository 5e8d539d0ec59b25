// The product for at most 16 rows of a, where reading the weight once is all that counts: on mma.sync, weights straight from memory to
// registers.
//
// A thread block keeps all of a in shared memory and stays; it has two teams of 8 warps. A team makes 16 columns of y at a time: its warps
// share K, and their sums meet in shared memory in a fixed order, so there is one launch and no atomics. A warp always has the loads of its
// next few slices on their way, across tiles too. The code is short on purpose: it is read from memory once for a few microseconds of work.
//
// The weight is the left operand of the instruction, so its 16 rows are full. In a slice of 4 L columns, lane (g, t) = (lane / 4, lane % 4)
// holds the L columns from L t on of the weight rows g and g + 8 and of the rows g and g + 8 of a. The instruction sums over K in any order
// as long as both operands agree, so word i of a lane may be what it calls column 4t or 16 + 4t, and a is stored in whatever order
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
inline constexpr int kSumPitch = kSkinnyN + 4;  // words between rows of a warp's sums: its lanes then write to 32 banks

// Rows that start at multiples of 16 bytes, and what unpacking them takes.
struct SkinnyRows {
  const uint8_t* data;
  int64_t rows, row_bytes;
  int64_t plane_bytes;
  uint32_t flip;                // of bytes: 0x80808080 makes c - 128 of 8-bit codes
  uint4 table, high_table;      // of nibbles that are looked up: bytes, or the low and the high bytes of 16-bit floats
  float mul, add;               // level = mul code + add
  uint32_t mul_pair, add_pair;  // the same, twice each in 16 bits

  __device__ __forceinline__ uint4 load(int64_t row, int64_t byte) const {
    if (row >= rows || byte >= row_bytes) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(data + row * row_bytes + byte);
  }
};

// What a lane loads of a weight row, kLaneColumns, and what it becomes. `part`: of 16 bytes of a, `p`: words 2p and 2p + 1 of them (beyond
// the row: anything finite, a is 0 there). order: the 16 bytes of a that part belongs to, to the same order. kDepth: slices that a warp has
// on their way. kColumnBytes: of a column of a.
template <int COLUMN_BYTES>
struct ByteColumns {
  static constexpr int kDepth = 2, kLaneColumns = 32, kColumnBytes = COLUMN_BYTES;
  uint4 loaded[2];
  __device__ __forceinline__ void load(const SkinnyRows& source, int64_t row, int64_t column) {
    loaded[0] = source.load(row, column);
    loaded[1] = source.load(row, column + 16);
  }
};

template <int COLUMN_BYTES>
struct PackedColumns {
  static constexpr int kDepth = 4, kLaneColumns = 32, kColumnBytes = COLUMN_BYTES;
  uint4 loaded;
  __device__ __forceinline__ void load(const SkinnyRows& source, int64_t row, int64_t column) { loaded = source.load(row, column / 2); }
};

struct SkinnyBytes : ByteColumns<1> {
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint4& half = loaded[part];
    return p == 0 ? make_uint2(half.x ^ source.flip, half.y ^ source.flip) : make_uint2(half.z ^ source.flip, half.w ^ source.flip);
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Codes: the even ones of 8 and the odd ones.
struct SkinnyNibbles : PackedColumns<1> {
  __device__ __forceinline__ uint2 words(const SkinnyRows&, int part, int p) const {
    const uint32_t codes = word_of(loaded, 2 * part + p);
    return make_uint2(codes & 0x0F0F0F0Fu, codes >> 4 & 0x0F0F0F0Fu);
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) {
    return make_uint4(__byte_perm(columns.x, columns.y, 0x6420), __byte_perm(columns.x, columns.y, 0x7531),
                      __byte_perm(columns.z, columns.w, 0x6420), __byte_perm(columns.z, columns.w, 0x7531));
  }
};

// Values by table.
struct SkinnyTable : SkinnyNibbles {
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint32_t codes = word_of(loaded, 2 * part + p);
    return make_uint2(look_up_nibbles(source.table, codes), look_up_nibbles(source.table, codes >> 16));
  }
  static __device__ __forceinline__ uint4 order(uint4 columns) { return columns; }
};

// Where 16 bytes of lane t's lie in a row of a slice: neighbours swapped in odd rows, so that eight lanes read 32 banks.
__device__ __forceinline__ int part_offset(int row, int t, int part) { return (part ^ (row & 1)) * 64 + t * 16; }

__device__ __forceinline__ void team_barrier(int team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeamThreads) : "memory"); }

// TILES_M: of 8 rows of a.
template <typename Mma, typename W, typename Epilogue, int TILES_M>
__global__ __launch_bounds__(kSkinnyThreads, 1) void gemm_skinny_kernel(const __grid_constant__ SkinnyRows a_source,
                                                                        const __grid_constant__ SkinnyRows w_source,
                                                                        const __grid_constant__ Epilogue epilogue) {
  using Accumulator = typename Mma::Accumulator;
  constexpr int kRows = 8 * TILES_M;
  constexpr int kParts = W::kLaneColumns * W::kColumnBytes / 16, kSliceBytes = 4 * 16 * kParts;
  __shared__ Accumulator sums[kSkinnyTeams][2][kSkinnyWarps][kRows * kSumPitch];  // of a tile, and of the next
  uint8_t* const a_rows = dynamic_shared();
  const Output& y = epilogue.output;
  const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads, warp = thread / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, t = lane % 4;
  const int slices = static_cast<int>((a_source.row_bytes + kSliceBytes - 1) / kSliceBytes);
  const int first_slice = warp * slices / kSkinnyWarps, last_slice = (warp + 1) * slices / kSkinnyWarps;
  const int tiles = static_cast<int>((y.n + kSkinnyN - 1) / kSkinnyN), stride = kSkinnyTeams * static_cast<int>(gridDim.x);
  const int first_tile = team * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);

  dependents_may_launch();
  wait_for_prerequisites();

  W weight[W::kDepth][2];
  auto load = [&](W(&rows)[2], int tile, int slice) {
    const int64_t row = static_cast<int64_t>(tile) * kSkinnyN + group;
    const int64_t column = (static_cast<int64_t>(slice) * 4 + t) * W::kLaneColumns;
    rows[0].load(w_source, row, column);
    rows[1].load(w_source, row + 8, column);
  };
#pragma unroll
  for (int d = 0; d < W::kDepth; ++d) {
    if (first_slice + d < last_slice) load(weight[d], first_tile, first_slice + d);
  }

  // All of a, zeros beyond its rows and columns.
  constexpr int kPieces = kSliceBytes / 16, kBatch = 4;  // loads of a thread that are on their way together
  const int pieces = slices * kRows * kPieces;
  for (int first = threadIdx.x; first < pieces; first += kBatch * kSkinnyThreads) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      loaded[b] = a_source.load(row, static_cast<int64_t>(slice) * kSliceBytes + i % kPieces * 16);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSkinnyThreads, piece = i % kPieces, row = i / kPieces % kRows, slice = i / (kPieces * kRows);
      if (i < pieces) {
        *reinterpret_cast<uint4*>(a_rows + (slice * kRows + row) * kSliceBytes + part_offset(row, piece / kParts, piece % kParts)) =
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
    const int32_t column_sum = exists ? epilogue.load_column(n) : 0;
    Accumulator accumulators[TILES_M][4] = {};
    for (int slice = first_slice; slice < last_slice; slice += W::kDepth) {
#pragma unroll
      for (int d = 0; d < W::kDepth; ++d) {
        if (slice + d >= last_slice) break;
        const uint8_t* const a_slice = a_rows + ((slice + d) * kRows + group) * kSliceBytes;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint4 a_words[TILES_M];
#pragma unroll
          for (int j = 0; j < TILES_M; ++j) {
            a_words[j] = *reinterpret_cast<const uint4*>(a_slice + j * 8 * kSliceBytes + part_offset(group, t, part));
          }
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const uint2 top = weight[d][0].words(w_source, part, p), bottom = weight[d][1].words(w_source, part, p);
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

    Accumulator* const own = sums[team][buffer][warp];
#pragma unroll
    for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) own[(j * 8 + t * 2 + c % 2) * kSumPitch + group + c / 2 * 8] = accumulators[j][c];
    }
    team_barrier(team);
    if (exists) {
      Accumulator sum = 0;
#pragma unroll
      for (int w = 0; w < kSkinnyWarps; ++w) sum += sums[team][buffer][w][m * kSumPitch + n_in_tile];
      store_value(y, m, n, scaled(epilogue.product(sum, row_part, epilogue.column_of(column_sum)), row_scale, column_scale, bias));
    }
  }
}

// ---- host

// Whether the kernel takes the rows of an operand as they are stored: a as int8 integers, w also as 8-bit codes and nibbles.
inline bool is_skinny_a(const Operand& a, int64_t k) { return is_bytes(a) && is_aligned(a.data, 16) && k % 16 == 0; }
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
  SkinnyRows result{};
  result.data = static_cast<const uint8_t*>(operand.data);
  result.rows = rows;
  result.row_bytes = row_bytes(operand.layout, k);
  result.plane_bytes = rows * result.row_bytes;
  if (operand.layout == Layout::kCodes && operand.grid.bits == 8) result.flip = 0x80808080u;
  if (operand.layout == Layout::kPacked && has_values(operand.grid)) result.table = value_table(operand.grid);
  return result;
}

template <typename Mma, typename W, typename Epilogue>
void launch_skinny(const char* op, const SkinnyRows& a, const SkinnyRows& w, const Epilogue& epilogue, const Device& device,
                   cudaStream_t stream) {
  const int64_t m = epilogue.output.m, tiles = (epilogue.output.n + kSkinnyN - 1) / kSkinnyN;
  check(m <= kSkinnyM && tiles <= INT32_MAX / 2, op, ": expected m <= ", kSkinnyM, " and n <= ", int64_t{kSkinnyN} * (INT32_MAX / 2),
        ", got ", m, ", ", epilogue.output.n);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, device.sm_count)));
  const auto shared = static_cast<size_t>((m <= 8 ? 8 : kSkinnyM) * round_up(a.row_bytes, 4 * W::kLaneColumns * W::kColumnBytes));
  auto run = [&](auto kernel) {
    launch_with({1, device.hopper_code}, op, kernel, grid, dim3(kSkinnyThreads), shared, stream, a, w, epilogue);
  };
  m <= 8 ? run(gemm_skinny_kernel<Mma, W, Epilogue, 1>) : run(gemm_skinny_kernel<Mma, W, Epilogue, 2>);
}

}  // namespace quest::cuda
