// The product of few rows of real a with w on a grid of integers, on Hopper's wgmma: a as fixed-point numbers.
//
// A product of floats would widen each code of w to 16 bits, and a matrix instruction for few rows takes 13 cycles whatever its elements
// are. Integers have more columns of K in one. A number is a/step, rounded, 16 bits in two's complement; step is the power of two for which
// the largest magnitude in a unit of 512 or 1024 neighbouring columns of its row needs all of them. So bfloat16 of at least 2^-6 of the
// largest are exact, and others are off by about 2^-15 of it (by weights of 8 bits one bit more). It is 256 high + low, both of them int8:
// two digits; or it is 16 bits. These are rows of the instruction's right operand:
//
//   sum_k v_k a_k = step (mul (256 sum_k c_k high_k + sum_k c_k low_k) + add sum_k number_k)                       v = mul c + add
//   sum_k v_k a_k = step (2 sum_p +-2^p popcount(bit_p(number) & c) - sum_k number_k)     (- for p = 15)           one bit: v = 2 c - 1
//
// modulo 2^32, exact. The second takes more products, and no instruction to widen a weight.
//
// Split of the work. A cluster of thread blocks has 8 or 16 rows of a (by bits also 1, 2 or 4) and some neighbouring tiles of 64 rows of w;
// its blocks share K. Each makes numbers of its columns, in shared memory and in the place of a. Of its four warpgroups, one, two or four
// share the units of a tile, so that more of them have work. They send their sums to the block and the warpgroup that add them up
// (st.async), in a fixed order: one launch, and the same bits in every run.
//
// The weight is the left operand. The copy engine brings 64 of its rows at a time (in an order of weight_map) to a ring of each warpgroup;
// one more warp starts the copies, a lane for each warpgroup. (Where a thread of the warpgroup itself does it, the compiler no longer keeps
// descriptors in uniform registers.) Bits are multiplied where they lie. Wider codes go through registers: the instruction sums over K in
// any order as long as both operands agree, so a lane's 16 bytes of w are the columns that it contributes, and the digits of a are laid
// down in the order that unpacking them is cheapest.
//
// What bounds it: making numbers, which every cluster does for itself (a bit of each of 32 numbers to a word: 174 integer instructions a
// lane), and unpacking, both integer instructions, of which a multiprocessor does 64 a cycle; by bits also that warpgroups wait, multiply
// and add up together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/chunk.cuh"
#include "common/epilogue.cuh"
#include "common/grid.cuh"
#include "common/hopper.cuh"
#include "common/matrix_map.h"
#include "common/shares.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_epilogue.cuh"
#include "quest/packing.h"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kFixedThreads = kFixedGroups * kWarpgroup + 32;
static_assert(kFixedTileN == kWarpgroupColumns, "rows of w of a tile");

struct FixedProblem {
  // What comes before the numbers, in the first lines of a kernel's parameters: each line takes its time to come.
  const uint8_t* x;  // rows of 16-bit floats, which start at multiples of 16 bytes
  int32_t k;
  uint8_t k_groups_log2, slots;  // slots: of a ring
  uint8_t spare_bits;            // of a number, where 16 would be too many for the sum
  uint8_t turns;                 // of 64, rounded up: how much of a turn, in which all blocks of a cluster own a part of a tile, a part is
  Shares tiles, units;           // of 64 rows of w, among the clusters of a group of rows of a; of K, among the blocks of a cluster
  Output output;
  const float* w_scale;
  uint32_t mul, add;  // v = mul u + add for the integers u of w
  uint32_t flip;      // of bytes: 0x80808080 makes c - 128 of 8-bit codes
  uint4 table;        // of nibbles that are looked up
};

// ---- one bit, multiplied where it lies
struct FixedBit {
  static constexpr bool kByBits = true;
  static constexpr int kUnitColumns = 1024, kStageRowBytes = 128;
  static constexpr int kPieces = 1, kPlanes = 1, kShift = 0;
  static __device__ __forceinline__ int chunk(int eighth, int t) { return 16 * eighth + 4 * t; }
  static constexpr __device__ int chunk_step(int eight) { return eight; }
};

// ---- what a lane loads of a unit of a row of w, 16 bytes of every plane kPieces times, and the two words, of 4 bytes each, that it
// contributes to step i of a piece. A quarter of the 16 steps belongs to 32 columns of a lane, in four chunks of 8: `chunk` says which is
// the first, `chunk_step` how much further another one is (in bits that the first has clear: the swizzle makes it an exclusive or),
// `source` which of the columns is byte i of word k of the quarter. The words are 2^kShift u.
struct FixedCodes {
  static constexpr bool kByBits = false;
  static constexpr int kUnitColumns = 512, kStageRowBytes = 64;
  struct Place {
    int eight, column;
  };
  static constexpr __device__ int chunk_step(int eight) { return eight; }
};

// Bit planes: every eighth column of 32 in a word. Codes end below the sign: most bits are shifted to the left, which is a multiplication
// and has units of its own.
template <int PLANES>
struct FixedBits : FixedCodes {
  static constexpr int kPieces = 1, kPlanes = PLANES, kShift = 7 - PLANES;
  uint4 loaded[PLANES];
  __device__ __forceinline__ uint2 words(const FixedProblem&, int i) const { return make_uint2(word(i, 0), word(i, 1)); }
  __device__ __forceinline__ uint32_t word(int i, int half) const {
    uint32_t result = 0;
#pragma unroll
    for (int j = 0; j < PLANES; ++j) {
      const uint32_t bits = word_of(loaded[j], i / 4);
      const int from = i % 4 * 2 + half, to = kShift + j;
      result |= (to >= from ? bits << (to - from) : bits >> (from - to)) & 0x01010101u << to;
    }
    return result;
  }
  static __device__ __forceinline__ int chunk(int quarter, int t) { return 16 * t + 4 * quarter; }
  static constexpr __device__ Place source(int k, int i) { return {i, k}; }
};

// 4-bit codes: the even ones of 8 and the odd ones.
struct FixedNibbles : FixedCodes {
  static constexpr int kPieces = 4, kPlanes = 1, kShift = 0;
  uint4 loaded[1];
  __device__ __forceinline__ uint2 words(const FixedProblem&, int i) const {
    const uint32_t codes = word_of(loaded[0], i);
    return make_uint2(codes & 0x0F0F0F0Fu, codes >> 4 & 0x0F0F0F0Fu);
  }
  static __device__ __forceinline__ int chunk(int quarter, int t) { return 16 * quarter + 4 * t; }
  static constexpr __device__ Place source(int k, int i) { return {k / 2, 2 * i + k % 2}; }
};

// 4-bit codes by table: the first four of 8 and the others.
struct FixedTable : FixedNibbles {
  __device__ __forceinline__ uint2 words(const FixedProblem& problem, int i) const {
    const uint32_t codes = word_of(loaded[0], i);
    return make_uint2(look_up_nibbles(problem.table, codes), look_up_nibbles(problem.table, codes >> 16));
  }
  static constexpr __device__ Place source(int k, int i) { return {k / 2, 4 * (k % 2) + i}; }
};

// Codes of a byte.
struct FixedBytes : FixedCodes {
  static constexpr int kPieces = 8, kPlanes = 1, kShift = 0;
  uint4 loaded[1];
  __device__ __forceinline__ uint2 words(const FixedProblem& problem, int i) const {
    return make_uint2(word_of(loaded[0], 2 * i) ^ problem.flip, word_of(loaded[0], 2 * i + 1) ^ problem.flip);
  }
  static __device__ __forceinline__ int chunk(int quarter, int t) { return 16 * quarter + 2 * t; }
  static constexpr __device__ int chunk_step(int eight) { return eight / 2 * 8 + eight % 2; }
  static constexpr __device__ Place source(int k, int i) { return {k / 2, 4 * (k % 2) + i}; }
};

// The second of a pair of numbers. Of bfloat16 ones its bits and zeros are the float: the first one is cleared by a multiplication and an
// addition, which have units of their own: times 0, plus 0, the second one times 1, minus 0. zero: 0, which the compiler must not know, or
// it makes these constants anew each time.
template <typename Mma>
__device__ __forceinline__ float second_to_float(uint32_t pair, uint32_t zero) {
  if constexpr (std::is_same_v<Mma, MmaBFloat16>) {
    return __uint_as_float(Mma::fma(pair, 0x3F800000u ^ zero, 0x80000000u ^ zero));
  } else {
    return Mma::to_float(pair >> 16);
  }
}

// The 8 x 8 bits of the same byte of all words, transposed. Blocks of 4, 2 bits and bits swap places.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[8]) {
  auto stage = [&](auto distance, uint32_t low) {
    constexpr int kDistance = decltype(distance)::value;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & kDistance) continue;
      uint32_t &a = words[i], &b = words[i + kDistance];
      const uint32_t lower = select_bits(low, a, b << kDistance), upper = select_bits(low, a >> kDistance, b);
      a = lower, b = upper;
    }
  };
  stage(std::integral_constant<int, 4>(), 0x0F0F0F0Fu);
  stage(std::integral_constant<int, 2>(), 0x33333333u);
  stage(std::integral_constant<int, 1>(), 0x55555555u);
}

// Of words for two rows of w and columns 2t and 2t + 1 of 8, which are rows of a as often as ROWS goes into 8: the sum of the words of
// each.
template <int ROWS>
__device__ __forceinline__ void add_up_bits(uint32_t (&words)[4]) {
  constexpr int kColumns = ROWS == 1 ? 2 : 1;  // of a lane, for the same row
#pragma unroll
  for (int c = 0; c < 4; c += kColumns) {
    if (kColumns == 2) words[c] += words[c + 1];
#pragma unroll
    for (int lanes = ROWS / 2 > 0 ? ROWS / 2 : 1; lanes < 4; lanes *= 2) words[c] += __shfl_xor_sync(0xFFFFFFFFu, words[c], lanes);
    if (kColumns == 2) words[c + 1] = words[c];
  }
}

// What the sums of a unit of a row of a are to be multiplied by, after `part` has been added to them.
struct FixedRow {
  float step;
  uint32_t part;
};

// Shared memory: barriers; the numbers of the block's units; the rings; what is left of rows on their way to numbers; the factors of the
// units; scales and biases of tiles, and what is received of these.
template <typename W, int ROWS>
struct FixedKernel {
  static constexpr int kTurnRows = ROWS < 8 ? ROWS : 8, kEights = ROWS / kTurnRows;  // of a, that become numbers together
  static constexpr int kUnitBytes = ROWS * W::kUnitColumns * 2;                      // digits, or bits, or a itself
  static constexpr int kQuarterBytes = 2 * ROWS * 128;                               // of digits
  static constexpr int kEightBytes = kTurnRows * W::kUnitColumns * 2;                // of bits
  static constexpr int kBlockBytes = (W::kByBits ? kTurnRows : ROWS) * 128;          // of 64 columns of a
  static constexpr int kPlaneBytes = kWarpgroupColumns * W::kStageRowBytes, kStageBytes = W::kPlanes * kPlaneBytes;
  static constexpr int kTeamWarps = W::kUnitColumns * kTurnRows / 1024;  // that make the numbers of kTurnRows rows of a unit
  static constexpr int kTeams = kFixedGroups * 4 / kTeamWarps;
  // Boxes of w of a warpgroup that are brought to the second cache before the kernel before this one has ended. By one bit, where all rows
  // share one pass through w (up to 8): where they do not, it is not w that is waited for.
  static constexpr int kPrefetched = W::kByBits ? 1 : 2;
  // Behind a ring of w, a would come up to 1 us later: it is asked for first, before barriers are made. Not where it is so little that it
  // is the weight that is waited for.
  static constexpr bool kAFirst = ROWS > 4;
  static_assert(W::kByBits || kTurnRows == 8, "digits come in tiles of 8 rows");
  static constexpr int kParts = 4 * kEights;  // of a tile: the sums of a warp with 8 rows. Blocks own them in turn.
  static constexpr int kPartBytes = 32 * 16;
  static constexpr int kScaleBytes = 2 * kWarpgroupColumns * static_cast<int>(sizeof(float));  // of a tile
  static constexpr int kFactorBytes = ROWS * static_cast<int>(sizeof(FixedRow));
  // Of a warp's columns of each row: the largest magnitude. A team's turns alternate.
  struct Left {
    alignas(8) uint16_t largest[2][kTurnRows][kTeamWarps];
  };
  static constexpr int kLeftBytes = static_cast<int>(round_up(kTeams * sizeof(Left), 16));
  // What has a place that the compiler knows.
  struct Head {
    uint64_t full[kFixedGroups][kFixedMostSlots], empty[kFixedGroups][kFixedMostSlots];
    uint64_t sent[kFixedMostTiles];  // of each tile: all senders have
  };
  static constexpr int kHeadBytes = 1024;  // a multiple of what the swizzle wants

  static constexpr FixedRoom kRoom = fixed_room(W::kByBits, W::kPlanes, ROWS);
  static_assert(kRoom.unit_columns == W::kUnitColumns && kRoom.unit == kUnitBytes + kFactorBytes && kRoom.slot == kStageBytes &&
                    kRoom.parts == kParts && kRoom.part == kPartBytes && kRoom.tile_scales == kScaleBytes &&
                    kRoom.other >= kHeadBytes + kLeftBytes + static_cast<int>(sizeof(FixedRow)) && sizeof(Head) <= kHeadBytes,
                "the plan reckons with them");
};

template <typename Mma, typename W, int ROWS>
__global__ __launch_bounds__(kFixedThreads, 1) void gemm_fixed_kernel(const __grid_constant__ CUtensorMap w_map,
                                                                      const __grid_constant__ FixedProblem problem) {
#ifdef QUEST_SM90A
  using Kernel = FixedKernel<W, ROWS>;
  constexpr int kEights = Kernel::kEights, kPieces = W::kPieces, kStageBytes = Kernel::kStageBytes;
  const Output& y = problem.output;
  const int warpgroup = warpgroup_index(), warp = warp_index(), lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;

  const int blocks = static_cast<int>(gridDim.x), k_groups = 1 << problem.k_groups_log2;  // a cluster is a row of the grid
  const int rank = static_cast<int>(blockIdx.x), first_row = static_cast<int>(blockIdx.y) * ROWS, range = static_cast<int>(blockIdx.z);
  const int rows = min(ROWS, static_cast<int>(y.m) - first_row);
  const int first_n = problem.tiles.first(range) * kWarpgroupColumns;
  const int tiles = problem.tiles.count(range);
  const int first_unit = problem.units.first(rank), units = problem.units.count(rank);
  const int k_group = warpgroup & (k_groups - 1), first_tile = warpgroup >> problem.k_groups_log2;
  const int tile_stride = kFixedGroups >> problem.k_groups_log2;
  // The blocks own the parts of a tile in turn. (For up to 8 of both this is part / blocks.)
  auto turn_of = [&](int part) { return part * problem.turns >> 6; };
  auto owner_of = [&](int part) { return part - turn_of(part) * blocks; };
  const int senders = (blocks << problem.k_groups_log2) - 1, own_parts = turn_of(Kernel::kParts - 1) + 1;

  // The same places in all blocks of a cluster, which may differ by a unit.
  const int most_units = problem.units.most();
  auto& head = *reinterpret_cast<typename Kernel::Head*>(dynamic_shared());
  uint8_t* const numbers = dynamic_shared() + Kernel::kHeadBytes;
  uint8_t* const rings = numbers + most_units * Kernel::kUnitBytes;
  auto* const left = reinterpret_cast<typename Kernel::Left*>(rings + kFixedGroups * problem.slots * kStageBytes);
  FixedRow* const factors = reinterpret_cast<FixedRow*>(reinterpret_cast<uint8_t*>(left) + Kernel::kLeftBytes);  // [unit][row]
  float* const scales = reinterpret_cast<float*>(factors + (most_units * ROWS + 1) / 2 * 2);  // of the rows of w, then their biases
  float* const biases = scales + tiles * kWarpgroupColumns;
  int4* const received = reinterpret_cast<int4*>(biases + tiles * kWarpgroupColumns);  // [tile][sender][own part][lane]

  // What a lane of the copier copies, one after another, for its warpgroup: 64 rows of w at a time.
  struct Box {
    int tile, unit, piece;
  };
  auto first_box = [&] { return Box{lane >> problem.k_groups_log2, lane & (k_groups - 1), 0}; };
  auto exists = [&](const Box& box) { return lane < kFixedGroups && box.tile < tiles && box.unit < units; };
  auto step = [&](Box& box) {
    if (++box.piece < kPieces) return;
    box.piece = 0;
    box.unit += k_groups;
    if (box.unit >= units) box.unit = lane & (k_groups - 1), box.tile += tile_stride;
  };
  const bool adjacent = y.adjacent();
  auto at = [&](const Box& box) {
    const int byte = ((first_unit + box.unit) * kPieces + box.piece) * W::kStageRowBytes;
    return weight_at(byte, first_n + box.tile * kWarpgroupColumns, 0, adjacent);
  };

  // A team of warps makes the numbers of 8 rows of a unit, or fewer.
  constexpr int kTurnRows = Kernel::kTurnRows, kTeams = Kernel::kTeams, kTeamWarps = Kernel::kTeamWarps, kTeamThreads = 32 * kTeamWarps;
  constexpr int kUnitStep = kTeams / kEights;
  const int team = threadIdx.x / kTeamThreads, eight = team % kEights, first_of_team = team / kEights;
  uint8_t* const own_numbers = numbers + eight * (W::kByBits ? Kernel::kEightBytes : 8 * 128);

  // One lane of each warp, of whose barriers all lanes know the place: for places that differ the compiler makes a loop over the lanes.
  auto make_barriers = [&] {
    if (lane != 0) return;
#pragma unroll 1
    for (int slot = warp; slot < problem.slots; slot += 4) {
      barrier_init(&head.full[warpgroup][slot], 1);  // the copier, and the bytes
      barrier_init(&head.empty[warpgroup][slot], kWarpgroup / 32);
    }
    const int owned = own_parts - (rank + (own_parts - 1) * blocks < Kernel::kParts ? 0 : 1);
#pragma unroll 1
    for (int tile = warpgroup * 4 + warp; tile < tiles; tile += kFixedGroups * 4) {
      barrier_init(&head.sent[tile], 1 + owned * (k_groups - 1) * 32);  // this thread, and lanes of this block; the bytes of others
      barrier_expect(&head.sent[tile], owned * (senders - (k_groups - 1)) * Kernel::kPartBytes);
    }
    barrier_init_fence();
  };
  auto barriers_are_made = [&] {
    __syncthreads();
    if (blocks > 1) cluster_arrive_relaxed();
  };

  // Where a is first: wait, ask for a, make barriers, ask for w. Else: make barriers, wait, ask for both.
  launch_dependents();  // at once: up to 0.3 us faster here
  const bool copies = warpgroup == kFixedGroups;
  if (copies) {
    if (lane == 0) prefetch_tensor_map(&w_map);
    // Whatever the kernel before this one still writes, goes through the second cache.
    const bool one_pass = gridDim.y == 1;  // through w, for all rows
    if (W::kByBits && one_pass) {
      // What memory, not that cache, holds of a would come behind w: it is asked for first, a part of its lines by each block.
      constexpr int kLineBytes = 128;
      const int all_blocks = blocks * static_cast<int>(gridDim.z), block = rank + blocks * range;
      const int lines = (2 * rows * problem.k + kLineBytes - 1) / kLineBytes;
      for (int line = block + lane * all_blocks; line < lines; line += 32 * all_blocks) prefetch(problem.x + line * kLineBytes);
    }
    if (!W::kByBits || one_pass) {
      Box box = first_box();
      for (int i = 0; i < Kernel::kPrefetched && exists(box); ++i, step(box)) tensor_prefetch_5d(&w_map, at(box).at);
    }
  } else if (!Kernel::kAFirst) {
    make_barriers();
  }
  if (!Kernel::kAFirst) barriers_are_made();
  if (copies) {
    wait_for_prerequisites();
  } else {
    // a: 64 columns of 8 rows are side by side, swizzled.
    constexpr int kChunks = W::kUnitColumns / 8;  // neighbouring threads: neighbouring columns
    const int thread = threadIdx.x % kTeamThreads, row = thread / kChunks, chunk = thread % kChunks;
    const int m = eight * 8 + row, first_column = (first_unit + first_of_team) * W::kUnitColumns + chunk * 8;
    const int64_t row_bytes = 2 * static_cast<int64_t>(problem.k);
    const uint8_t* source = problem.x + (first_row + m) * row_bytes + 2 * first_column;
    int columns_left = problem.k - first_column;
    int place = first_of_team * Kernel::kUnitBytes + chunk / 8 * Kernel::kBlockBytes + row * 128 + (chunk % 8 ^ row) * 16;
    settle(source), settle(place);
    wait_for_prerequisites();
#pragma unroll 1
    for (int unit = first_of_team; unit < units; unit += kUnitStep) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int down = i * kTeamThreads / kChunks, right = i * kTeamThreads % kChunks;  // from the first copy on: rows and chunks
        cp_async_16(own_numbers + (place ^ down * 16) + down * 128 + right / 8 * Kernel::kBlockBytes,
                    source + down * row_bytes + right * 16, m + down < rows && columns_left > right * 8);
      }
      if (thread < kTurnRows) factors[unit * ROWS + eight * 8 + thread].part = 0;
      source += kUnitStep * W::kUnitColumns * 2, place += kUnitStep * Kernel::kUnitBytes, columns_left -= kUnitStep * W::kUnitColumns;
    }
    cp_async_commit();
    if (Kernel::kAFirst) make_barriers();
  }
  if (Kernel::kAFirst) barriers_are_made();

  if (copies) {
    Box box = first_box();
    int slot = 0;
    uint32_t parity = 1;
    const int served = lane % kFixedGroups;
    uint8_t* const ring = rings + served * problem.slots * kStageBytes;
    while (exists(box)) {
      if (!barrier_test(&head.empty[served][slot], parity)) {
        __nanosleep(20);  // asking takes turns from warps that multiply
        continue;
      }
      barrier_expect(&head.full[served][slot], kStageBytes);
      tensor_load_5d(ring + slot * kStageBytes, &w_map, &head.full[served][slot], at(box).at);
      if (++slot == problem.slots) slot = 0, parity ^= 1;
      step(box);
    }
    __syncwarp();
    if (blocks > 1) cluster_wait();
    return;
  }

  // From a to numbers, in its place. A lane has 32 columns of a row.
  constexpr int kRowLanes = 32 / kTurnRows;
  const int team_warp = threadIdx.x % kTeamThreads / 32, turn_row = lane % kTurnRows,
            place_in_row = team_warp * kRowLanes + lane / kTurnRows;
  const uint32_t zero = static_cast<uint32_t>(problem.k) >> 31;  // which the compiler does not know
  auto team_barrier = [&] { kTeamWarps == 1 ? __syncwarp() : named_barrier(2 + team, kTeamThreads); };
  // What comes from memory does so behind all of w that has been asked for: a warp loads the scales and biases of its own columns, and
  // waits for them where it uses them.
  if (k_group == 0) {
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += tile_stride) {
      const int i = tile * kWarpgroupColumns + warp * 16 + lane % 16, n = first_n + i;
      const float* const source = lane < 16 ? problem.w_scale : y.bias;
      const bool exists = n < y.n && source != nullptr;
      cp_async_4(lane < 16 ? &scales[i] : &biases[i], exists ? source + n : problem.w_scale, exists);
    }
  }
  cp_async_commit();
  cp_async_wait<1>();
  team_barrier();
  const int first_chunk = W::chunk(place_in_row / 4, place_in_row % 4);
  const int place_in_unit = first_chunk / 8 * Kernel::kBlockBytes + turn_row * 128 + (first_chunk % 8 ^ turn_row) * 16;
  bool odd_turn = false;
#pragma unroll 1
  for (int unit = first_of_team; unit < units; unit += kUnitStep, odd_turn = !odd_turn) {
    auto& largest = left[team].largest[odd_turn][turn_row];
    uint8_t* const own_unit = own_numbers + unit * Kernel::kUnitBytes;
    uint4 x[4] = {};
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = *reinterpret_cast<const uint4*>(own_unit + (place_in_unit ^ W::chunk_step(i) % 8 * 16) +
                                             W::chunk_step(i) / 8 * Kernel::kBlockBytes);
      // Twice the magnitudes: no sign, and a lowest bit of whatever.
      most = __vmaxu2(most, __vmaxu2(__vmaxu2(2 * x[i].x, 2 * x[i].y), __vmaxu2(2 * x[i].z, 2 * x[i].w)));
    }
#pragma unroll
    for (int lanes = kTurnRows; lanes < 32; lanes *= 2) most = __vmaxu2(most, __shfl_xor_sync(0xFFFFFFFFu, most, lanes));
    if (kTeamWarps > 1 && lane < kTurnRows) largest[team_warp] = static_cast<uint16_t>(max(most & 0xFFFFu, most >> 16));
    team_barrier();  // and all of a has been read
    if constexpr (kTeamWarps > 1) {
      const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(largest);
      most = pairs[0];
#pragma unroll
      for (int i = 1; i < kTeamWarps / 2; ++i) most = __vmaxu2(most, pairs[i]);
    }
    const uint32_t most_bits = max(most & 0xFFFFu, most >> 16) / 2;
    // The exponent of step + 14, as in a float; not so small that a step has none. (Two digits make at most 32639.)
    const float magnitude = Mma::to_float(most_bits);
    constexpr float kRoom = W::kByBits ? 1.0f : 1.00395f;
    const uint32_t exponent = max((__float_as_uint(magnitude * kRoom) >> 23) + problem.spare_bits, 15u + W::kShift);
    const float one_over_step = __uint_as_float((254 + 14 - exponent) << 23);
    auto number = [&](int eight, int column, float magic) {  // in the low 16 bits
      const uint32_t pair = word_of(x[eight], column / 2);
      return __float_as_uint(
          fmaf(column % 2 == 0 ? Mma::to_float(pair & 0xFFFFu) : second_to_float<Mma>(pair, zero), one_over_step, magic));
    };
    uint32_t sum = 0;
    if constexpr (W::kByBits) {
      // Number i of 16 and number i + 8 in word i; then of their bits p and p + 8 in word p. As integers, floats with kIntegerFloat are
      // numbers with that as one. 2^15 is added, so that they are not negative. Above its 16 bits a lower one then has 0x4B40, which is
      // taken from the upper one (an even number: ties are rounded alike).
      constexpr float kLower = kIntegerFloat + 32768.0f, kUpper = kLower - static_cast<float>(kIntegerFloatBits >> 16);
      uint32_t words[2][8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t lower = number(2 * half, i, kLower), upper = number(2 * half + 1, i, kUpper);
          words[half][i] = (upper << 16) + lower;
          sum += lower + upper;
        }
        transpose_bytes(words[half]);
      }
      sum -= 32 * (kIntegerFloatBits + 32768) - 16 * (kIntegerFloatBits >> 16);
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        const int row = p * kTurnRows + turn_row;
        uint8_t* const place = own_unit + row * 128 + (place_in_row / 4 ^ row % 8) * 16 + place_in_row % 4 * 4;
        const uint32_t lower_bits = __byte_perm(words[0][p], words[1][p], 0x6420),
                       upper_bits = __byte_perm(words[0][p], words[1][p], 0x7531);
        *reinterpret_cast<uint32_t*>(place) = lower_bits;
        *reinterpret_cast<uint32_t*>(place + 8 * kTurnRows * 128) = p < 7 ? upper_bits : ~upper_bits;  // without the 2^15
      }
    } else {
      uint8_t* const place = own_unit + team_warp * Kernel::kQuarterBytes + turn_row * 128 + lane / 8 * 4;
      int32_t high_sum = 0, low_sum = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        constexpr float kDigitFloat = kIntegerFloat + 128.0f;  // so that the high digit of what is rounded is right for a signed low one
        uint32_t four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = number(W::source(k, i).eight, W::source(k, i).column, kDigitFloat);
        const uint32_t first = __byte_perm(four[0], four[1], 0x5140), second = __byte_perm(four[2], four[3], 0x5140);
        const uint32_t high = __byte_perm(first, second, 0x7632), low = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
        high_sum = __dp4a(static_cast<int32_t>(high), 0x01010101, high_sum);
        low_sum = __dp4a(static_cast<int32_t>(low), 0x01010101, low_sum);
        *reinterpret_cast<uint32_t*>(place + (k ^ turn_row) * 16) = high;
        *reinterpret_cast<uint32_t*>(place + (k ^ turn_row) * 16 + ROWS * 128) = low;
      }
      sum = static_cast<uint32_t>(256 * high_sum + low_sum);
    }
#pragma unroll
    for (int lanes = kTurnRows; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (lane < kTurnRows) {
      FixedRow& row = factors[unit * ROWS + eight * 8 + lane];
      // A row with a NaN or an infinity has no step.
      if (team_warp == 0) row.step = magnitude <= kLargestFloat ? __uint_as_float((exponent - 14 - W::kShift) << 23) : NAN;
      atomicAdd(&row.part, (problem.add << W::kShift) * sum);
    }
  }

  uint8_t* const ring = rings + warpgroup * problem.slots * kStageBytes;
  const uint64_t ring_tiles = swizzled_tile(ring), number_tiles = swizzled_tile(numbers);

  // The words of four steps.
  using Words = uint32_t[4][4];
  W loaded[2] = {};
  int slot = 0;
  uint32_t parity = 0;
  auto give_back = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(&head.empty[warpgroup][slot]);
    if (++slot == problem.slots) slot = 0, parity ^= 1;
  };
  auto unpack = [&](Words& words, int quarter) {
    if constexpr (!W::kByBits) {
      constexpr int kPieceSteps = 16 / kPieces;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = (4 * quarter + i) % kPieceSteps;
        if (step == 0) {
          barrier_wait(&head.full[warpgroup][slot], parity);
          const uint8_t* const source = ring + slot * kStageBytes + (warp * 16 + group) * W::kStageRowBytes + t * 16;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < W::kPlanes; ++j) {
              loaded[half].loaded[j] = *reinterpret_cast<const uint4*>(source + j * Kernel::kPlaneBytes + half * 8 * W::kStageRowBytes);
            }
          }
          give_back();
        }
        const uint2 top = loaded[0].words(problem, step), bottom = loaded[1].words(problem, step);
        words[i][0] = top.x, words[i][1] = bottom.x, words[i][2] = top.y, words[i][3] = bottom.y;
      }
      // Made here, not between the products' fence and the products.
#pragma unroll
      for (auto& four : words) wgmma_owned(four);
    }
  };

  // A tile whose sums are on their way: what this warpgroup has of them.
  struct {
    int index;
    float sums[kEights][4];
  } last;
  last.index = -1;
  auto finish = [&] {
    if (last.index < 0 || k_group > 0) return;
    cp_async_wait<0>();
    __syncwarp();
    if (senders > 0) barrier_wait(&head.sent[last.index], 0);
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const int part = warp * kEights + j;
      if (owner_of(part) != rank) continue;
      float sums[4] = {last.sums[j][0], last.sums[j][1], last.sums[j][2], last.sums[j][3]};
      const int4* source = received + (last.index * senders * own_parts + turn_of(part)) * 32 + lane;
      for (int i = 0; i < senders; ++i, source += own_parts * 32) {
        const int4 words = *source;
        sums[0] += __int_as_float(words.x), sums[1] += __int_as_float(words.y);
        sums[2] += __int_as_float(words.z), sums[3] += __int_as_float(words.w);
      }
      const int first = last.index * kWarpgroupColumns + warp * 16;
      store_four(y, first_row + 8 * j, first_row + rows, first_n + first, adjacent, [&](int c) {
        const int column = first + lane_column(adjacent, c / 2);
        return scaled(sums[c], 1.0f, scales[column], biases[column]);
      });
    }
  };

  Words even, odd;
  if constexpr (!W::kByBits) {
    if (first_tile < tiles && k_group < units) unpack(even, 0);
  }
  async_proxy_fence();
  named_barrier(1, kFixedGroups * kWarpgroup);  // all numbers are there
  if (blocks > 1) cluster_wait();               // for the other blocks' barriers
  for (int tile = first_tile; tile < tiles; tile += tile_stride) {
    float sums[kEights][4];
#pragma unroll
    for (auto& four : sums) four[0] = four[1] = four[2] = four[3] = 0.0f;
    for (int unit = k_group; unit < units; unit += k_groups) {
      auto add = [&](int j, int c, uint32_t product) {
        const FixedRow row = factors[unit * ROWS + 8 * j + (2 * t + c % 2) % kTurnRows];
        sums[j][c] += row.step * static_cast<float>(static_cast<int32_t>(problem.mul * product + row.part));
      };
      if constexpr (W::kByBits) {
        barrier_wait(&head.full[warpgroup][slot], parity);
        const uint64_t w_tile = ring_tiles + static_cast<uint32_t>(slot * (kStageBytes >> 4));
        // All bits of the numbers of 8 rows, or fewer, at a time. While they are added up, other warpgroups multiply.
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
          const uint64_t a_tile = number_tiles + static_cast<uint32_t>(unit * (Kernel::kUnitBytes >> 4) + j * (Kernel::kEightBytes >> 4));
          int32_t counts[8 * kTurnRows];
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) WgmmaBits::mma(counts, w_tile + 2 * i, a_tile + 2 * i, i != 0);
          wgmma_commit();
          wgmma_wait<0>();
          wgmma_owned(counts);
          if (j + 1 == kEights) give_back();
          // Columns are kTurnRows bit + row: of 8 rows a lane has all bits, of fewer those with the numbers kStep i + `first`.
          constexpr int kStep = 8 / kTurnRows, kBits = 16 / kStep;
          uint32_t products[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int first = (2 * t + c % 2) / kTurnRows;
            uint32_t product = static_cast<uint32_t>(counts[4 * (kBits - 1) + c]);
            if (first == kStep - 1) product = 0u - product;
#pragma unroll
            for (int i = kBits - 2; i >= 0; --i) product = (product << kStep) + static_cast<uint32_t>(counts[4 * i + c]);
            products[c] = product << first;
          }
          add_up_bits<kTurnRows>(products);
#pragma unroll
          for (int c = 0; c < 4; ++c) add(j, c, products[c]);
        }
      } else {
        int32_t accumulators[ROWS];
        const uint64_t a_tile = number_tiles + static_cast<uint32_t>(unit * (Kernel::kUnitBytes >> 4));
        auto multiply = [&](int quarter, const Words& words) {
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            WgmmaInt8::mma(accumulators, words[i], a_tile + quarter * (Kernel::kQuarterBytes / 16) + 2 * i, (quarter | i) != 0);
          }
          wgmma_commit();
          wgmma_wait<1>();  // the products before these
        };
        multiply(0, even);
        unpack(odd, 1);
        multiply(1, odd);
        unpack(even, 2);
        multiply(2, even);
        unpack(odd, 3);
        multiply(3, odd);
        if (unit + k_groups < units || tile + tile_stride < tiles) unpack(even, 0);
        wgmma_wait<0>();
        wgmma_owned(accumulators);
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            add(j, c, 256 * static_cast<uint32_t>(accumulators[4 * j + c]) + static_cast<uint32_t>(accumulators[4 * (j + kEights) + c]));
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const int part = warp * kEights + j, owner = owner_of(part), sender = (rank << problem.k_groups_log2) + k_group;
      if (owner == rank && k_group == 0) continue;
      const int place = sender - (sender > owner << problem.k_groups_log2);
      int4* const target = received + ((tile * senders + place) * own_parts + turn_of(part)) * 32 + lane;
      int32_t words[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) words[c] = __float_as_int(sums[j][c]);
      if (owner == rank) {
        *target = make_int4(words[0], words[1], words[2], words[3]);
        barrier_arrive(&head.sent[tile]);
      } else {
        store_async(owner, target, words, &head.sent[tile]);
      }
    }
    finish();
    last.index = tile;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) last.sums[j][c] = sums[j][c];
    }
  }
  finish();
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

template <typename Mma, typename W, int ROWS>
void launch_fixed(const char* op, const Operand& w, FixedProblem problem, const FixedPlan& plan, cudaStream_t stream) {
  const int64_t m = problem.output.m, n = problem.output.n, k = problem.k;
  auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  auto log2 = [](int32_t power) -> uint8_t { return power == 1 ? 0 : power == 2 ? 1 : 2; };
  problem.turns = static_cast<uint8_t>(up(64, plan.cluster));
  problem.k_groups_log2 = log2(plan.k_groups);
  problem.slots = static_cast<uint8_t>(plan.slots);
  problem.units = shares_of(up(k, W::kUnitColumns), plan.cluster);
  problem.tiles = shares_of(up(n, kFixedTileN), plan.ranges);
  const int64_t w_row_bytes = row_bytes(w.layout, k);
  constexpr CUtensorMapSwizzle kSwizzle = W::kByBits ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUtensorMap w_map =
      weight_map(op, w.data, n, W::kPlanes, w_row_bytes, {W::kStageRowBytes, kFixedTileN, kSwizzle, W::kPlanes}, problem.output.adjacent());
  // Neighbouring clusters have the same rows of w.
  const dim3 grid(static_cast<unsigned>(plan.cluster), static_cast<unsigned>(up(m, ROWS)), static_cast<unsigned>(plan.ranges));
  launch_with({plan.cluster, true}, op, gemm_fixed_kernel<Mma, W, ROWS>, grid, dim3(kFixedThreads), static_cast<size_t>(plan.shared_bytes),
              stream, w_map, problem);
}

}  // namespace quest::cuda
