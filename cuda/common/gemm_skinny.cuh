// The product for few rows of a, where reading the weight once is all that counts: on mma.sync, weights straight from memory to
// registers.
//
// A thread block takes neighbouring columns of y and stays; it has teams of a few warps. A team makes 16 columns at a time: its warps share
// K, and their sums meet in shared memory in a fixed order, so there is one launch and no atomics. A warp always has the loads of its next
// few slices on their way, across tiles too. The code is short on purpose: it runs for a few microseconds, of which instructions that are
// executed once, and fetched for it, are a large part (half of the instructions before the main loop took 1 us less, of 6 to 17).
//
// The weight is the left operand of the instruction, so its 16 rows are full. In a slice of 4 L columns, lane (g, t) = (lane / 4, lane % 4)
// holds the L columns from L t on of the weight rows g and g + 8 and of the rows g and g + 8 of a. The instruction sums over K in any order
// as long as both operands agree, so word i of a lane may be what it calls column 4t or 16 + 4t, and a is brought to whatever order
// unpacking the weight is cheapest.
//
// a goes the way of the weight: every warp loads the part of it that it multiplies, and the first cache keeps it for the next tile. (In
// shared memory it would have to be there before the first product: 1 to 3 us. gemm_stream.cuh, for large weights, does that.)
// gemm_held.cuh and gemm_fixed.cuh have real activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/epilogue.cuh"
#include "common/operands.cuh"
#include "common/ptx.cuh"
#include "common/shares.cuh"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kSkinnyThreads = 32 * kSkinnyWarps;
inline constexpr int kSkinnyParts = 2;          // of 16 bytes of a, that a lane has of a slice
inline constexpr int kLoadedBytes = 256;        // of a lane, on their way from memory: half of its registers
inline constexpr int kSumPitch = kSkinnyN + 4;  // words between rows of a warp's sums: its lanes then write to 32 banks

// Rows that start at multiples of 16 bytes, and what unpacking them takes.
struct SkinnyRows {
  const uint8_t* data;
  uint32_t rows, row_bytes;
  uint32_t flip;  // of bytes: 0x80808080 makes c - 128 of 8-bit codes
  uint4 table;    // of nibbles that are looked up

  __device__ __forceinline__ const uint8_t* row(uint32_t i) const { return data + static_cast<uint64_t>(i) * row_bytes; }
};

// ---- what a lane loads of a weight row, kLaneBytes, and what it becomes: words 2p and 2p + 1 of `part`, which belongs to 16 bytes of a.
// Bytes beyond the row are its last ones: what comes of them is multiplied by a zero. kDepth: the most slices that a warp has on their way.

__device__ __forceinline__ uint4 load_weight(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
  return load_once(row + min(byte, source.row_bytes - 16));
}

struct PackedColumns {
  static constexpr int kDepth = 4, kLaneBytes = 16;
  uint4 loaded;
  __device__ __forceinline__ void load(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
    loaded = load_weight(source, row, byte);
  }
};

// Bytes, or the bits of a plane.
struct SkinnyBytes {
  static constexpr int kDepth = 2, kLaneBytes = 32;
  uint4 loaded[2];
  __device__ __forceinline__ void load(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
    loaded[0] = load_weight(source, row, byte);
    loaded[1] = load_weight(source, row, byte + 16);
  }
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint4& half = loaded[part];
    return p == 0 ? make_uint2(half.x ^ source.flip, half.y ^ source.flip) : make_uint2(half.z ^ source.flip, half.w ^ source.flip);
  }
};

// Codes: the even ones of 8 and the odd ones.
struct SkinnyNibbles : PackedColumns {
  __device__ __forceinline__ uint2 words(const SkinnyRows&, int part, int p) const {
    const uint32_t codes = word_of(loaded, 2 * part + p);
    return make_uint2(codes & 0x0F0F0F0Fu, codes >> 4 & 0x0F0F0F0Fu);
  }
};

// Values by table.
struct SkinnyTable : PackedColumns {
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint32_t codes = word_of(loaded, 2 * part + p);
    return make_uint2(look_up_nibbles(source.table, codes), look_up_nibbles(source.table, codes >> 16));
  }
};

// ---- the same for a, whose bytes beyond the row are zeros

__device__ __forceinline__ uint4 load_activation(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
  uint4 loaded = make_uint4(0, 0, 0, 0);
  if (byte < source.row_bytes) loaded = *reinterpret_cast<const uint4*>(row + byte);
  return loaded;
}

// For SkinnyNibbles.
struct StreamedNibbles {
  static constexpr int kLaneBytes = 16;
  uint4 loaded;
  __device__ __forceinline__ void load(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
    loaded = load_activation(source, row, byte);
  }
  __device__ __forceinline__ uint4 part(int i) const {
    const uint32_t first = word_of(loaded, 2 * i), second = word_of(loaded, 2 * i + 1);
    return make_uint4(first & 0x0F0F0F0Fu, first >> 4 & 0x0F0F0F0Fu, second & 0x0F0F0F0Fu, second >> 4 & 0x0F0F0F0Fu);
  }
};

// EVEN_ODD: for SkinnyNibbles.
template <bool EVEN_ODD>
struct StreamedBytes {
  static constexpr int kLaneBytes = 32;
  uint4 loaded[2];
  __device__ __forceinline__ void load(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
    loaded[0] = load_activation(source, row, byte);
    loaded[1] = load_activation(source, row, byte + 16);
  }
  __device__ __forceinline__ uint4 part(int i) const {
    const uint4& x = loaded[i];
    if constexpr (!EVEN_ODD) return x;
    return make_uint4(__byte_perm(x.x, x.y, 0x6420), __byte_perm(x.x, x.y, 0x7531), __byte_perm(x.z, x.w, 0x6420),
                      __byte_perm(x.z, x.w, 0x7531));
  }
};

// What the epilogue needs of a row of y.
struct SkinnyRow {
  float scale;
  uint32_t part;
};

// TILES_M: of 8 rows of a. TEAM_WARPS: that share K.
template <typename Mma, typename W, typename A, int TILES_M, int TEAM_WARPS>
struct SkinnyKernel {
  static constexpr int kRows = 8 * TILES_M, kTeams = kSkinnyWarps / TEAM_WARPS, kTeamThreads = 32 * TEAM_WARPS;
  static constexpr int kWeightSlice = 4 * W::kLaneBytes;
  // Many rows of a would take all registers: they are loaded when they are needed, which is soon enough for what the first cache has.
  static constexpr bool kLoadsAhead = TILES_M <= 2;
  static constexpr int kSliceBytes = 2 * sizeof(W) + (kLoadsAhead ? TILES_M * sizeof(A) : 0);
  static constexpr int kDepth = std::min(W::kDepth, kLoadedBytes / kSliceBytes);
  static constexpr int kBuffers = TILES_M <= 2 ? 2 : 1;  // of sums: of a tile, and of the next
  static constexpr int kBufferSums = TEAM_WARPS * kRows * kSumPitch;
  static constexpr int kSharedBytes =
      kTeams * (kBuffers * kBufferSums * static_cast<int>(sizeof(int32_t)) + kRows * static_cast<int>(sizeof(SkinnyRow)));
};

template <typename Mma, typename W, typename A, int TILES_M, int TEAM_WARPS>
__global__ __launch_bounds__(kSkinnyThreads, 1) void gemm_skinny_kernel(const __grid_constant__ SkinnyRows a_source,
                                                                        const __grid_constant__ SkinnyRows w_source,
                                                                        const __grid_constant__ Shares eights,
                                                                        const __grid_constant__ IntegerEpilogue epilogue) {
  using Kernel = SkinnyKernel<Mma, W, A, TILES_M, TEAM_WARPS>;
  constexpr int kRows = Kernel::kRows, kTeams = Kernel::kTeams, kTeamThreads = Kernel::kTeamThreads, kDepth = Kernel::kDepth;
  const Output& y = epilogue.output;
  const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads, warp = thread / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, t = lane % 4;

  int32_t* const sums = reinterpret_cast<int32_t*>(dynamic_shared()) + team * Kernel::kBuffers * Kernel::kBufferSums;
  SkinnyRow* const row_factors =
      reinterpret_cast<SkinnyRow*>(reinterpret_cast<int32_t*>(dynamic_shared()) + kTeams * Kernel::kBuffers * Kernel::kBufferSums) +
      team * kRows;

  const int slices = static_cast<int>((w_source.row_bytes + Kernel::kWeightSlice - 1) / Kernel::kWeightSlice);
  const int first_slice = warp * slices / TEAM_WARPS, last_slice = (warp + 1) * slices / TEAM_WARPS;
  const int block = static_cast<int>(blockIdx.x);
  const int block_n = 8 * eights.first(block), last_n = min(8 * eights.first(block + 1), static_cast<int>(y.n));
  const int first_n = block_n + team * kSkinnyN;
  auto team_barrier = [&] { named_barrier(1 + team, kTeamThreads); };

  // Rows beyond the block's last one are that one: nothing of them is stored.
  struct WeightRows {
    const uint8_t *top, *bottom;
  };
  auto rows_of = [&](int n) {
    return WeightRows{keep(w_source.row(min(n + group, last_n - 1))), keep(w_source.row(min(n + group + 8, last_n - 1)))};
  };
  uint32_t a_offsets[TILES_M];
#pragma unroll
  for (int j = 0; j < TILES_M; ++j) a_offsets[j] = min(j * 8 + group, static_cast<int>(a_source.rows) - 1) * a_source.row_bytes;
  auto load_a = [&](auto& a, int slice) {
#pragma unroll
    for (int j = 0; j < TILES_M; ++j) a[j].load(a_source, a_source.data + a_offsets[j], (slice * 4 + t) * A::kLaneBytes);
  };
  struct Slice {
    W w[2];
    A a[Kernel::kLoadsAhead ? TILES_M : 1];
  };
  Slice loaded[kDepth];
  auto load = [&](Slice& target, const uint8_t* top, const uint8_t* bottom, int slice) {
    const uint32_t byte = (slice * 4 + t) * W::kLaneBytes;
    target.w[0].load(w_source, top, byte);
    target.w[1].load(w_source, bottom, byte);
    if constexpr (Kernel::kLoadsAhead) load_a(target.a, slice);
  };

  launch_dependents();  // at once: up to 0.3 us faster here
  wait_for_prerequisites();

  WeightRows rows = rows_of(first_n), next_rows = rows;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (first_slice + d < last_slice) load(loaded[d], rows.top, rows.bottom, first_slice + d);
  }
  if (thread < kRows) {  // the first barrier of the team comes before they are read
    const bool exists = thread < y.m;
    row_factors[thread] = {exists ? epilogue.row_scale(thread) : 0.0f, exists ? epilogue.row_part(thread, 0) : 0};
  }

  const int n_in_tile = thread % kSkinnyN;
  int buffer = 0;
  for (int tile_n = first_n; tile_n < last_n; tile_n += kTeams * kSkinnyN) {
    rows = next_rows;
    next_rows = rows_of(tile_n + kTeams * kSkinnyN);
    const int n = tile_n + n_in_tile;
    const bool exists = n < last_n;
    const float column_scale = exists ? epilogue.column_scale(n) : 0.0f, bias = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
    const int32_t column_sum = exists ? epilogue.load_column(n) : 0;
    int32_t accumulators[TILES_M][4] = {};
    for (int slice = first_slice; slice < last_slice; slice += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (slice + d >= last_slice) break;
        Slice& now = loaded[d];
        A late[TILES_M];
        if constexpr (!Kernel::kLoadsAhead) load_a(late, slice + d);
#pragma unroll
        for (int part = 0; part < kSkinnyParts; ++part) {
          uint2 top[2], bottom[2];
#pragma unroll
          for (int p = 0; p < 2; ++p) top[p] = now.w[0].words(w_source, part, p), bottom[p] = now.w[1].words(w_source, part, p);
#pragma unroll
          for (int j = 0; j < TILES_M; ++j) {
            uint4 a_words;
            if constexpr (Kernel::kLoadsAhead) {
              a_words = now.a[j].part(part);
            } else {
              a_words = late[j].part(part);
            }
            const uint32_t first[4] = {top[0].x, bottom[0].x, top[0].y, bottom[0].y};
            const uint32_t second[4] = {top[1].x, bottom[1].x, top[1].y, bottom[1].y};
            Mma::mma(accumulators[j], first, a_words.x, a_words.y);
            Mma::mma(accumulators[j], second, a_words.z, a_words.w);
          }
        }
        // The slice that comes to these registers next: of this tile, or the same of the next (beyond the last: not used).
        const bool ends = slice + d + kDepth >= last_slice;
        load(now, ends ? next_rows.top : rows.top, ends ? next_rows.bottom : rows.bottom, ends ? first_slice + d : slice + d + kDepth);
      }
    }

    if (Kernel::kBuffers == 1 && tile_n != first_n) team_barrier();  // the sums of the tile before have been read
    int32_t* const own = sums + buffer * Kernel::kBufferSums + warp * kRows * kSumPitch;
#pragma unroll
    for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) own[(j * 8 + t * 2 + c % 2) * kSumPitch + group + c / 2 * 8] = accumulators[j][c];
    }
    team_barrier();
    if (exists) {
      const uint32_t column_part = epilogue.column_of(column_sum);
#pragma unroll 2
      for (int m = thread / kSkinnyN; m < min(kRows, static_cast<int>(y.m)); m += kTeamThreads / kSkinnyN) {
        int32_t sum = 0;
#pragma unroll
        for (int w = 0; w < TEAM_WARPS; ++w) sum += sums[buffer * Kernel::kBufferSums + (w * kRows + m) * kSumPitch + n_in_tile];
        const SkinnyRow row = row_factors[m];
        store_value(y, m, n, scaled(epilogue.product(sum, row.part, column_part), row.scale, column_scale, bias));
      }
    }
    buffer = Kernel::kBuffers - 1 - buffer;
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
  result.rows = static_cast<uint32_t>(rows);
  result.row_bytes = static_cast<uint32_t>(row_bytes(operand.layout, k));
  if (operand.layout == Layout::kCodes && operand.grid.bits == 8) result.flip = 0x80808080u;
  if (operand.layout == Layout::kPacked && has_values(operand.grid)) result.table = value_table(operand.grid);
  return result;
}

template <typename Mma, typename W, typename A, int TILES_M>
void launch_skinny_tiles(const char* op, const SkinnyRows& a, const SkinnyRows& w, const IntegerEpilogue& epilogue, const Device& device,
                         cudaStream_t stream) {
  constexpr int64_t kMost = INT32_MAX / 2;  // columns beyond the last are reckoned with
  const int64_t n = epilogue.output.n;
  check(n <= kMost, op, ": expected n <= ", kMost, ", got ", n, "; split the columns");
  check(uint64_t{a.rows} * a.row_bytes <= UINT32_MAX, op, ": expected few rows of a of at most 4 GB, got ", a.rows, " of ", a.row_bytes,
        " bytes; split the rows");
  const int eights = static_cast<int>((n + 7) / 8), blocks = std::min(eights, device.sm_count);
  auto run = [&](auto team_warps) {
    using Kernel = SkinnyKernel<Mma, W, A, TILES_M, team_warps()>;
    launch_with({1, device.hopper_code}, op, gemm_skinny_kernel<Mma, W, A, TILES_M, team_warps()>, dim3(static_cast<unsigned>(blocks)),
                dim3(kSkinnyThreads), static_cast<size_t>(Kernel::kSharedBytes), stream, a, w, shares_of(eights, blocks), epilogue);
  };
  plan_skinny_team(n, device.sm_count) == 8 ? run(std::integral_constant<int, 8>()) : run(std::integral_constant<int, 4>());
}

// At most 16 rows; packed codes on both sides: at most 32.
template <typename Mma, typename W, typename A>
void launch_skinny(const char* op, const SkinnyRows& a, const SkinnyRows& w, const IntegerEpilogue& epilogue, const Device& device,
                   cudaStream_t stream) {
  const int64_t m = epilogue.output.m;
  constexpr int kMostRows = std::is_same_v<A, StreamedNibbles> ? 32 : 16;
  check(m <= kMostRows, op, ": this kernel takes at most ", kMostRows, " rows, got ", m);
  auto run = [&](auto tiles_m) { launch_skinny_tiles<Mma, W, A, tiles_m()>(op, a, w, epilogue, device, stream); };
  if constexpr (std::is_same_v<A, StreamedNibbles>) {
    if (m > 16) return run(std::integral_constant<int, 4>());
  }
  m > 8 ? run(std::integral_constant<int, 2>()) : run(std::integral_constant<int, 1>());
}

}  // namespace quest::cuda
