// The product of few rows of real a, which stay in registers while the rows of w stream past: on mma.sync, with float sums.
//
// Shared memory has no time to give a to every 16 rows of w anew. So each warp of a thread block owns 512 columns of K, which is as much of
// 16 rows of a as its registers hold, and multiplies them by those columns of all rows of w that the block has. For every 32 of these rows
// the warps' sums meet in shared memory, in a fixed order: one launch, no atomics. They meet late, so that no warp waits before its tensor
// core has more to do.
//
// Up to 8 warps share K. Where K has fewer columns, or where it saves a pass, they form teams, which take turns at the rows of w. Where it
// has more, a block takes several passes over its rows of w, each through other columns, and keeps the sums in between.
//
// The weight is the left operand of the instruction, 16 rows at a time. Lane (g, t) = (lane / 4, lane % 4) holds 128 columns of the weight
// rows g and g + 8 and of the rows g and g + 8 of a: in pieces of 16 bytes of w, of which it has every fourth. The instruction sums over K
// in any order as long as both operands agree, so a is brought to whatever order widening the weight is cheapest.
//
// Widening is what takes the time. The low 8 bits of a 16-bit float are an integer in units of its smallest number, subnormal or not; so a
// masked field of codes is a float already, and one multiplication and addition makes a level of it. A level is kept 2^-kHeldLevelShift
// times as large, or the factor would not fit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/chunk.cuh"
#include "common/epilogue.cuh"
#include "common/grid.cuh"
#include "common/ptx.cuh"
#include "common/shares.cuh"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kHeldLaneColumns = kHeldColumns / 4;  // of K
inline constexpr int kHeldTileN = 16;                      // rows of w of the instruction; of kHeldUnitN the warps' sums meet

// The factor of a field is the largest for the lowest bit of the last plane: 2^kHeldMostPlanes, in units of the smallest number. With this
// shift it is the largest power of two that the type has.
inline constexpr int kHeldMostPlanes = 3;
template <typename Mma>
inline constexpr int kHeldLevelShift = Mma::kSmallest + kHeldMostPlanes - Mma::kLargest;

struct HeldProblem {
  const uint8_t *x, *w;  // rows of 16-bit floats, and of w; both start at multiples of 16 bytes
  int32_t k;
  uint32_t w_row_bytes;
  int64_t w_plane_bytes;
  Output output;
  const float* w_scale;
  float unit;                   // of the sums: levels are kept so many times smaller
  int32_t team_warps, passes;   // that share K, a power of two; over the rows of w
  Shares eights, slices;        // of 8 rows of w, among the blocks; of kHeldColumns of K, among the passes
  uint32_t mul[2], add;         // twice each: level = mul field + add for a code from bit 0, and from bit 4 on
  uint4 low_table, high_table;  // or by table: the low and the high bytes of 16-bit floats
};

// ---- what a lane loads of a row of w, 16 bytes of every plane kPieces times for its 128 columns, and the words 2i and 2i + 1 of pairs of
// floats that it becomes. `order` brings a, neighbouring columns of it in a word, to the same.

// Brings words of neighbouring columns to pairs of those that are DISTANCE apart.
template <int DISTANCE>
__device__ __forceinline__ void pair_columns(uint32_t (&words)[DISTANCE]) {
  uint32_t result[DISTANCE];
#pragma unroll
  for (int i = 0; i < DISTANCE; ++i) {
    result[i] = __byte_perm(words[i / 2], words[(i + DISTANCE) / 2], i % 2 == 0 ? 0x5410u : 0x7632u);
  }
#pragma unroll
  for (int i = 0; i < DISTANCE; ++i) words[i] = result[i];
}

// 4-bit codes of a grid of equal steps. Pairs are i and i + 4 of 8 columns.
template <typename Mma>
struct HeldNibbles {
  static constexpr int kPieces = 4, kPlanes = 1, kOrdered = 4;
  uint4 loaded[1];
  __device__ __forceinline__ uint2 words(const HeldProblem& problem, int i) const {
    const uint32_t codes = i % 2 == 0 ? word_of(loaded[0], i / 2) : word_of(loaded[0], i / 2) >> 8;
    return make_uint2(Mma::fma(codes & 0x000F000Fu, problem.mul[0], problem.add),
                      Mma::fma(codes & 0x00F000F0u, problem.mul[1], problem.add));
  }
  static __device__ __forceinline__ void order(uint32_t (&x)[kOrdered]) { pair_columns(x); }
};

// 4-bit codes of any grid.
struct HeldTable {
  static constexpr int kPieces = 4, kPlanes = 1, kOrdered = 4;
  uint4 loaded[1];
  __device__ __forceinline__ uint2 words(const HeldProblem& problem, int i) const {
    const uint32_t codes = word_of(loaded[0], i / 2) >> 16 * (i % 2);
    const uint32_t low = look_up_nibbles(problem.low_table, codes), high = look_up_nibbles(problem.high_table, codes);
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
  }
  static __device__ __forceinline__ void order(uint32_t (&)[kOrdered]) {}
};

// Codes of a byte, of a grid of equal steps. Pairs are i and i + 2 of 4 columns.
template <typename Mma>
struct HeldBytes {
  static constexpr int kPieces = 8, kPlanes = 1, kOrdered = 2;
  uint4 loaded[1];
  __device__ __forceinline__ uint2 words(const HeldProblem& problem, int i) const {
    const uint32_t codes = word_of(loaded[0], i);
    return make_uint2(Mma::fma(codes & 0x00FF00FFu, problem.mul[0], problem.add),
                      Mma::fma(__byte_perm(codes, 0, 0x4341), problem.mul[0], problem.add));
  }
  static __device__ __forceinline__ void order(uint32_t (&x)[kOrdered]) { pair_columns(x); }
};

// Bit planes of an int grid: sum 2^(j + 1) bit_j - (2^BITS - 1). Pairs are i and i + 16 of 32 columns.
template <typename Mma, int BITS>
struct HeldPlanes {
  static_assert(BITS <= kHeldMostPlanes, "or the factor does not fit");
  static constexpr int kPieces = 1, kPlanes = BITS, kOrdered = 16;
  uint4 loaded[BITS];
  __device__ __forceinline__ uint2 words(const HeldProblem& problem, int i) const {
    uint32_t pairs[2] = {problem.add, problem.add};
#pragma unroll
    for (int j = 0; j < BITS; ++j) {
      const uint32_t word = word_of(loaded[j], i / 8), codes = i % 8 < 4 ? word : word >> 8;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int bit = i % 4 * 2 + p;
        pairs[p] = Mma::fma(codes & 0x00010001u << bit, Mma::pair_of_power(Mma::kSmallest - kHeldLevelShift<Mma> + j + 1 - bit), pairs[p]);
      }
    }
    return make_uint2(pairs[0], pairs[1]);
  }
  static __device__ __forceinline__ void order(uint32_t (&x)[kOrdered]) { pair_columns(x); }
};

// TILES_M: of 8 rows of a. Shared memory: a of every warp, a ring of pieces of w of every warp, two buffers of sums, and the sums of
// passes.
template <typename W, int TILES_M, int WARPS>
struct HeldKernel {
  static constexpr int kRows = 8 * TILES_M;
  static constexpr int kPieceColumns = kHeldLaneColumns / W::kPieces;
  static constexpr int kXBytes = kRows * kHeldColumns * 2;                 // of a warp
  static constexpr int kPieceBytes = 2 * W::kPlanes * 32 * 16;             // of a warp, 16 rows of w
  static constexpr int kBlocks = TILES_M == 1 && W::kPlanes == 1 ? 2 : 1;  // of a multiprocessor, at the most
  static constexpr int kSlots = 6 * 1024 / kBlocks / kPieceBytes;          // all but one are on their way
  static constexpr int kPitch = kHeldTileN + 4;                            // words: lanes that write sums meet no bank twice
  static constexpr int kTileSums = kRows * kPitch + 16;                    // nor those that read the two tiles
  static constexpr int kBufferSums = WARPS * 2 * kTileSums;
  static constexpr int kSharedBytes = WARPS * (kXBytes + kSlots * kPieceBytes) + 2 * kBufferSums * 4;
  static constexpr int kUnitSums = kRows * kHeldUnitN;  // between passes
  static_assert(kSlots >= 2, "one slot to copy to, one to read");
};

template <typename Mma, typename W, int TILES_M, int WARPS>
__global__ __launch_bounds__(32 * WARPS,
                             (HeldKernel<W, TILES_M, WARPS>::kBlocks)) void gemm_held_kernel(const __grid_constant__ HeldProblem problem) {
  using Kernel = HeldKernel<W, TILES_M, WARPS>;
  constexpr int kRows = Kernel::kRows, kSlots = Kernel::kSlots, kPieceColumns = Kernel::kPieceColumns, kPieceBytes = Kernel::kPieceBytes;
  constexpr int kOrdered = W::kOrdered, kChains = 2;  // of products that wait for each other
  const Output& y = problem.output;
  const int rows = static_cast<int>(y.m), passes = problem.passes, team_warps = problem.team_warps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const int team = warp / team_warps, member = warp % team_warps;

  uint8_t* const x_shared = dynamic_shared() + warp * Kernel::kXBytes;
  uint8_t* const ring = dynamic_shared() + WARPS * Kernel::kXBytes + warp * kSlots * kPieceBytes + lane * 16;
  float* const sums = reinterpret_cast<float*>(dynamic_shared() + WARPS * (Kernel::kXBytes + kSlots * kPieceBytes));
  float* const pass_sums = sums + 2 * Kernel::kBufferSums;

  const int block = static_cast<int>(blockIdx.x);
  const int block_n = 8 * problem.eights.first(block), last_n = min(8 * problem.eights.first(block + 1), static_cast<int>(y.n));
  const int first_n = block_n + team * kHeldUnitN, stride = WARPS / team_warps * kHeldUnitN;

  launch_dependents();  // at once: up to 0.3 us faster here
  wait_for_prerequisites();
  if (first_n >= last_n) return;  // a team without rows of w meets nobody

  // a of a pass: 64 chunks of 16 bytes a row, in places such that neither what copies them nor what reads them meets a bank twice.
  auto x_offset = [](int row, int chunk) {
    const int eight = chunk / 8;
    return row * (kHeldColumns * 2) + (chunk ^ ((row ^ (eight / 2 ^ eight) % 4 * 2) & 7)) * 16;
  };
  auto copy_x = [&](int slice) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = lane + 32 * half, column = slice * kHeldColumns + chunk * 8;
      const uint8_t* source = problem.x + 2 * static_cast<int64_t>(column);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;  // what comes of other rows is not stored
        cp_async_16(x_shared + x_offset(row, chunk), source, column < problem.k);
        source += 2 * static_cast<int64_t>(problem.k);
      }
    }
  };

  // The piece of w that is copied next: of which of `active` slices of a pass.
  struct {
    const uint8_t* source;
    int n, piece, tile, slot, pass, active;
    uint32_t byte;
  } next = {nullptr, first_n, 0, 0, 0, 0, 0, 0};
  const uint64_t eight_rows = uint64_t{8} * problem.w_row_bytes;
  auto enter_tile = [&] { next.source = problem.w + static_cast<uint64_t>(next.n + group) * problem.w_row_bytes + t * 16; };
  auto enter_pass = [&] {
    const int first = problem.slices.first(next.pass);
    next.active = next.pass < passes ? problem.slices.count(next.pass) : 0;
    next.byte = (first + member) * (W::kPieces * 64);
  };
  enter_tile();
  enter_pass();
  auto copy_piece = [&] {
    if (member < next.active) {
      const uint32_t byte = next.byte + next.piece * 64;
      uint8_t* target = ring + next.slot * kPieceBytes;
      const bool in_row = byte + t * 16 < problem.w_row_bytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = in_row && next.n + group + 8 * half < last_n;
#pragma unroll
        for (int j = 0; j < W::kPlanes; ++j, target += 32 * 16) {
          cp_async_16(target, next.source + byte + half * eight_rows + j * problem.w_plane_bytes, exists);
        }
      }
    }
    cp_async_commit();
    next.slot = next.slot + 1 == kSlots ? 0 : next.slot + 1;
    if (++next.piece < W::kPieces) return;
    next.piece = 0;
    next.tile ^= 1;
    next.n += next.tile == 1 ? kHeldTileN : stride - kHeldTileN;
    if (next.n >= last_n) {
      next.n = first_n;
      next.tile = 0;
      ++next.pass;
      enter_pass();
    }
    enter_tile();
  };

  if (member < next.active) copy_x(member);
#pragma unroll 1
  for (int i = 0; i + 1 < kSlots; ++i) copy_piece();

  uint32_t x[TILES_M][kHeldLaneColumns / 2];
  // The rows of w whose sums have not met yet.
  struct {
    int n, pass, active;
    float scale, bias;
  } last = {0, 0, 0, 0.0f, 0.0f};
  int slot = 0, buffer = 0, active = 0;
  for (int pass = 0, n = first_n, tile = 0;;) {
    const bool ends = pass == passes;
    if (n == first_n && !ends) {
      active = problem.slices.count(pass);
      // a came with the first piece of all, or with the first of the pass before.
      const int pieces = (last_n - first_n) / stride * 2 * W::kPieces;  // at least
      if (pass == 0) {
        cp_async_wait<kSlots - 2>();
      } else if (pieces < kSlots) {
        cp_async_wait<0>();
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
        for (int i = 0; i < kHeldLaneColumns / 8; ++i) {
          const int chunk = i / (kPieceColumns / 8) * (kPieceColumns / 2) + t * (kPieceColumns / 8) + i % (kPieceColumns / 8);
          const uint4 loaded = *reinterpret_cast<const uint4*>(x_shared + x_offset(8 * j + group, chunk));
#pragma unroll
          for (int c = 0; c < 4; ++c) x[j][4 * i + c] = word_of(loaded, c);
        }
#pragma unroll
        for (int i = 0; i < kHeldLaneColumns / 2; i += kOrdered) W::order(reinterpret_cast<uint32_t(&)[kOrdered]>(x[j][i]));
      }
      __syncwarp();
      if (pass + 1 < passes && member < problem.slices.count(pass + 1)) copy_x(problem.slices.first(pass + 1) + member);
    }

    float accumulators[kChains][TILES_M][4] = {};
    if (!ends) {
#pragma unroll
      for (int piece = 0; piece < W::kPieces; ++piece) {
        cp_async_wait<kSlots - 2>();
        W w[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < W::kPlanes; ++j) {
            w[half].loaded[j] = *reinterpret_cast<const uint4*>(ring + slot * kPieceBytes + (half * W::kPlanes + j) * 32 * 16);
          }
        }
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        copy_piece();  // to where the piece before this one was
        if (member < active) {
#pragma unroll
          for (int i = 0; i < kPieceColumns / 4; ++i) {
            const uint2 top = w[0].words(problem, i), bottom = w[1].words(problem, i);
            const uint32_t words[4] = {top.x, bottom.x, top.y, bottom.y};
            const int word = piece * (kPieceColumns / 2) + 2 * i;
#pragma unroll
            for (int j = 0; j < TILES_M; ++j) Mma::mma(accumulators[i % kChains][j], words, x[j][word], x[j][word + 1]);
          }
        }
      }
    }

    if (tile == 0) {
      named_barrier(1 + team, 32 * team_warps);  // all sums of the rows before are there, and those before them have been read
      if (last.active > 0) {
        const int column = last.n + lane;
#pragma unroll 2
        for (int m = member; m < rows; m += team_warps) {
          const float* const parts = sums + (buffer ^ 1) * Kernel::kBufferSums +
                                     (team * team_warps * 2 + lane / kHeldTileN) * Kernel::kTileSums + m * Kernel::kPitch +
                                     lane % kHeldTileN;
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < WARPS; ++i) {
            if (i < last.active) sum += parts[2 * i * Kernel::kTileSums];
          }
          if (passes > 1) {
            float& before = pass_sums[(last.n - block_n) * kRows + m * kHeldUnitN + lane];
            if (last.pass > 0) sum += before;
            before = sum;
          }
          if (last.pass + 1 == passes && column < last_n) store_value(y, m, column, scaled(sum, problem.unit, last.scale, last.bias));
        }
      }
      if (ends) return;
      const int column = min(n + lane, last_n - 1);
      last = {n, pass, active, problem.w_scale[column], y.bias != nullptr ? y.bias[column] : 0.0f};
    }

    float* const own = sums + buffer * Kernel::kBufferSums + (warp * 2 + tile) * Kernel::kTileSums;
#pragma unroll
    for (int j = 0; j < TILES_M; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float sum = accumulators[0][j][c];
#pragma unroll
        for (int chain = 1; chain < kChains; ++chain) sum += accumulators[chain][j][c];
        own[(j * 8 + t * 2 + c % 2) * Kernel::kPitch + group + c / 2 * 8] = sum;
      }
    }
    tile ^= 1;
    n += tile == 1 ? kHeldTileN : stride - kHeldTileN;
    if (n >= last_n) n = first_n, tile = 0, ++pass;
    if (tile == 0) buffer ^= 1;
  }
}

// ---- host

// Of 8 or 16 rows of x, at least output.m.
template <typename Mma, typename W, int TILES_M, int WARPS>
void launch_held(const char* op, HeldProblem problem, const Device& device, cudaStream_t stream) {
  using Kernel = HeldKernel<W, TILES_M, WARPS>;
  constexpr int64_t kMost = INT32_MAX / 2;  // columns beyond the last are reckoned with
  const int64_t n = problem.output.n;
  check(n <= kMost, op, ": expected n <= ", kMost, ", got ", n, "; split the columns");
  auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t eights = up(n, 8), slices = up(problem.k, kHeldColumns);

  // Two blocks a multiprocessor if they find room, and 32 rows of w each. (In a pass of several they would read a twice as often.)
  const bool pairs = Kernel::kBlocks == 2 && 2 * (Kernel::kSharedBytes + 1024) <= device.shared_bytes + 1024 && slices <= WARPS &&
                     n >= int64_t{2} * kHeldUnitN * device.sm_count;
  const int64_t places = (pairs ? 2 : 1) * device.sm_count;

  // As many teams as take the fewest turns, the fewest of those: each has an a of its own.
  const int64_t units = up(up(eights, places), kHeldUnitN / 8);
  int64_t fewest = 0;
  for (int teams = 1; teams < WARPS; teams *= 2) {
    const int64_t passes = up(slices, WARPS / teams), turns = up(units, teams) * passes;
    if (fewest > 0 && turns >= fewest) continue;
    fewest = turns;
    problem.team_warps = WARPS / teams;
    problem.passes = static_cast<int32_t>(passes);
    problem.slices = shares_of(slices, passes);
  }
  // A block for each multiprocessor, or so many that their sums between passes fit.
  constexpr int64_t kUnitBytes = Kernel::kUnitSums * 4;
  const bool keeps_sums = problem.passes > 1;
  const int64_t most_eights = keeps_sums ? (device.shared_bytes - Kernel::kSharedBytes) / kUnitBytes * (kHeldUnitN / 8) : eights;
  const int64_t blocks = std::max(std::min(eights, places), up(eights, most_eights));
  problem.eights = shares_of(eights, blocks);
  const int64_t block_units = up(problem.eights.most(), kHeldUnitN / 8);
  const int64_t shared = Kernel::kSharedBytes + (keeps_sums ? block_units * kUnitBytes : 0);
  launch_with({1, device.hopper_code}, op, gemm_held_kernel<Mma, W, TILES_M, WARPS>, dim3(static_cast<unsigned>(blocks)), dim3(32 * WARPS),
              static_cast<size_t>(shared), stream, problem);
}

}  // namespace quest::cuda
