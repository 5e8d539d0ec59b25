// The product of few rows of integers and a packed weight on Hopper's wgmma: a stays in shared memory, and w streams past it.
//
// Split of the work. A pair of thread blocks, a cluster, has all rows of a and some neighbouring tiles of 64 rows of w; its blocks share K.
// Of a block's four warpgroups two make one tile and two the next, and share the block's units of 256 columns of K. All four that have a
// part of a tile's integers bring them to the block and the warpgroup that add them up (st.async): one launch, no workspace.
//
// The weight is the left operand and goes through registers, where its codes are widened. The copy engine brings 64 of its rows at a time
// to a ring of each warpgroup; one more warp starts the copies, a lane for each warpgroup. a is in the order of kEvenOdd, so that the low
// halves of the weight's bytes meet some of its bytes and the high ones the next. It is copied by other instructions than w (cp.async):
// behind a ring of w it would come up to 1 us later, and in front of it w would.
//
// What bounds it: memory, at large N. What is beside the bytes of w: a kernel's start; a, which all blocks read at the same time; adding up
// and writing y behind the last product. The code there is short (loops stay loops, and stand once), as most of it is fetched for one use.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/epilogue.cuh"
#include "common/hopper.cuh"
#include "common/matrix_map.h"
#include "common/shares.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_epilogue.cuh"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kStreamThreads = kStreamGroups * kWarpgroup + 32;
inline constexpr int kStreamRowBytes = 128;  // of a unit of w, and of half a unit of a: what the 128-byte swizzle covers
static_assert(kStreamTileN == kWarpgroupColumns && kStreamColumns == 2 * kStreamRowBytes, "a tile and a unit");

struct StreamProblem {
  const uint8_t* a;
  int32_t a_row_bytes;
  int32_t slots;        // of a ring
  Shares tiles, units;  // of 64 rows of w, among the pairs of blocks; of K, among the blocks of a pair
  IntegerEpilogue epilogue;
};

// What a lane has of 16 rows of w and a unit: of rows g and g + 8 of the box (g = lane / 4; weight_map may order them) two words of 8 codes
// each in every 64 columns.
struct StreamCodes {
  using Words = uint32_t[4][4];  // of the four instructions of half a unit
  uint32_t codes[4][4];          // [64 columns][row g, row g + 8 of the first 32 columns, then of the others]

  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kStreamRowBytes + (lane / 16 ^ row % 8) * 16;
  }
  __device__ __forceinline__ void load(uint32_t address) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4(codes[i], address ^ i * 32);
  }
  __device__ __forceinline__ void widen(Words& words, int half) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = codes[2 * half + i / 2][j] >> i % 2 * 4 & 0x0F0F0F0Fu;
    }
    // Made here, not between the products' fence and the products.
#pragma unroll
    for (auto& four : words) wgmma_owned(four);
  }
};

// ROWS: of a, for which there is room.
template <int ROWS>
struct StreamKernel {
  static constexpr int kUnitBytes = stream_unit_bytes(ROWS), kHalfBytes = kUnitBytes / 2;
  static constexpr int kFactorBytes = ROWS * (sizeof(float) + sizeof(uint32_t));
  static constexpr int kBarriers = kStreamGroups * 2 * kStreamMostSlots + kStreamMostTiles;
  static_assert(kHalfBytes == ROWS * kStreamRowBytes && kStreamSlotBytes == kStreamTileN * kStreamRowBytes &&
                    kStreamPartBytes == 32 * sizeof(int4) && kStreamColumnBytes == kStreamTileN * (2 * sizeof(float) + sizeof(uint32_t)) &&
                    stream_other_bytes(ROWS) == kFactorBytes + kBarriers * sizeof(uint64_t),
                "the plan reckons with them");
};

template <int ROWS>
__global__ __launch_bounds__(kStreamThreads, 1) void gemm_stream_kernel(const __grid_constant__ CUtensorMap w_map,
                                                                        const __grid_constant__ StreamProblem problem) {
#ifdef QUEST_SM90A
  constexpr int kUnitBytes = StreamKernel<ROWS>::kUnitBytes, kHalfBytes = StreamKernel<ROWS>::kHalfBytes;
  constexpr int kTilesAtOnce = kStreamGroups / kStreamKGroups;
  const IntegerEpilogue& epilogue = problem.epilogue;
  const Output& y = epilogue.output;
  const bool adjacent = y.adjacent();
  const int warpgroup = warpgroup_index(), warp = warp_index(), lane = threadIdx.x % 32;

  const int rank = static_cast<int>(blockIdx.x) % kStreamBlocks, range = static_cast<int>(blockIdx.x) / kStreamBlocks;
  const int rows = static_cast<int>(y.m), eights = (rows + 7) / 8;
  const int first_n = problem.tiles.first(range) * kStreamTileN, tiles = problem.tiles.count(range);
  const int first_unit = problem.units.first(rank), units = problem.units.count(rank);
  const int first_tile = warpgroup / kStreamKGroups, k_group = warpgroup % kStreamKGroups;
  // A tile's sums are parts, of a warp and 8 rows each. The blocks own them in turn; in a block the warpgroups that share K add up a tile's
  // in turn.
  const int parts = 4 * eights, own_parts = parts / kStreamBlocks;
  auto adder_of = [&](int tile) { return tile / kTilesAtOnce % kStreamKGroups; };

  // The same places in both blocks of a pair, which may differ by a unit.
  uint8_t* const a_units = dynamic_shared();
  uint8_t* shared = a_units + problem.units.most() * kUnitBytes;
  uint8_t* const ring = shared + warpgroup * problem.slots * kStreamSlotBytes;
  shared += kStreamGroups * problem.slots * kStreamSlotBytes;
  int4* const received = reinterpret_cast<int4*>(shared);  // [tile][sender][own part][lane]
  shared += tiles * kStreamSenders * own_parts * kStreamPartBytes;
  // Of the columns and rows of y; row_parts are code sums first, then what these become of the sum.
  float* const column_scales = reinterpret_cast<float*>(shared);
  int32_t* const column_sums = reinterpret_cast<int32_t*>(column_scales + tiles * kStreamTileN);
  float* const biases = reinterpret_cast<float*>(column_sums + tiles * kStreamTileN);
  shared += tiles * kStreamColumnBytes;
  float* const row_scales = reinterpret_cast<float*>(shared);
  uint32_t* const row_parts = reinterpret_cast<uint32_t*>(row_scales + ROWS);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(row_parts + ROWS);
  uint64_t* const full = barriers + warpgroup * 2 * kStreamMostSlots;
  uint64_t* const empty = full + kStreamMostSlots;
  uint64_t* const sent = barriers + kStreamGroups * 2 * kStreamMostSlots;  // of each tile: all senders have

  if (warpgroup < kStreamGroups) {
    // One lane of each warp, of whose barriers all lanes know the place: for places that differ the compiler makes a loop over the lanes.
    if (lane == 0) {
#pragma unroll 1
      for (int slot = warp; slot < problem.slots; slot += 4) {
        barrier_init(&full[slot], 1);  // the copier, and the bytes
        barrier_init(&empty[slot], kWarpgroup / 32);
      }
#pragma unroll 1
      for (int tile = warpgroup * 4 + warp; tile < tiles; tile += kStreamGroups * 4) {
        barrier_init(&sent[tile], 1 + own_parts * (kStreamKGroups - 1) * 32);  // this thread, and lanes of this block; the other's bytes
        barrier_expect(&sent[tile], own_parts * (kStreamSenders - kStreamKGroups) * kStreamPartBytes);
      }
      barrier_init_fence();
    }
  } else if (lane == 0) {
    prefetch_tensor_map(&w_map);
    // While the kernel before this one ends. (More boxes, or none: 1 to 10 % slower.)
    for (int unit = 0; unit < min(kStreamKGroups, units); ++unit) {
      tensor_prefetch_5d(&w_map, weight_at((first_unit + unit) * kStreamRowBytes, first_n, 0, adjacent).at);
    }
  }
  __syncthreads();
  cluster_arrive_relaxed();
  wait_for_prerequisites();

  if (warpgroup == kStreamGroups) {
    if (lane < kStreamGroups) {
      int tile = lane / kStreamKGroups, unit = lane % kStreamKGroups, slot = 0;
      uint32_t parity = 1;
      uint8_t* const group_ring = ring + (lane - kStreamGroups) * problem.slots * kStreamSlotBytes;
      uint64_t* const group_full = full + (lane - kStreamGroups) * 2 * kStreamMostSlots;
      while (tile < tiles && unit < units) {
        if (barrier_test(&group_full[kStreamMostSlots + slot], parity)) {
          barrier_expect(&group_full[slot], kStreamSlotBytes);
          const int byte = (first_unit + unit) * kStreamRowBytes, row = first_n + tile * kStreamTileN;
          tensor_load_5d(group_ring + slot * kStreamSlotBytes, &w_map, &group_full[slot], weight_at(byte, row, 0, adjacent).at);
          if (++slot == problem.slots) slot = 0, parity ^= 1;
          unit += kStreamKGroups;
          if (unit >= units) unit = lane % kStreamKGroups, tile += kTilesAtOnce;
        } else {
          __nanosleep(20);  // asking takes turns from warps that multiply
        }
      }
    }
    __syncwarp();
    cluster_wait();
    return;
  }

  // A row of a is a warp's, 16 bytes a lane.
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < ROWS; row += kStreamGroups * 4) {
    uint8_t* const target = a_units + row * kStreamRowBytes + (lane % 8 ^ row % 8) * 16;
    const uint8_t* const source = problem.a + static_cast<int64_t>(min(row, rows - 1)) * problem.a_row_bytes;
#pragma unroll 1
    for (int half = lane / 8; half < 2 * units; half += 4) {
      const int byte = (2 * first_unit + half) * kStreamRowBytes + lane % 8 * 16;
      const bool exists = row < rows && byte < problem.a_row_bytes;
      cp_async_16(target + half * kHalfBytes, source + (exists ? byte : 0), exists);
    }
  }
  if (threadIdx.x < ROWS) {
    const bool exists = threadIdx.x < rows;
    const int m = exists ? static_cast<int>(threadIdx.x) : 0;
    cp_async_4(&row_scales[threadIdx.x], epilogue.a_scale + m, exists);
    const bool summed = exists && epilogue.a.weight != 0;
    cp_async_4(&row_parts[threadIdx.x], epilogue.a.code_sum + (summed ? m : 0), summed);
  }
  cp_async_commit();
  // What comes from memory does so behind all of w that has been asked for: a warp loads the factors of the columns that it is to write,
  // and waits for them where it uses them.
#pragma unroll 1
  for (int tile = first_tile; tile < tiles; tile += kTilesAtOnce) {
    if (adder_of(tile) != k_group) continue;
    const int i = tile * kStreamTileN + warp * 16 + lane % 16, n = first_n + i;
    const bool exists = n < y.n, first = lane < 16;
    const bool summed = exists && epilogue.w.weight != 0, biased = exists && y.bias != nullptr;
    if (first) cp_async_4(&column_scales[i], epilogue.w_scale + (exists ? n : 0), exists);
    if (first) cp_async_4(&biases[i], y.bias + (biased ? n : 0), biased);
    if (!first) cp_async_4(&column_sums[i], epilogue.w.code_sum + (summed ? n : 0), summed);
  }
  cp_async_commit();
  cp_async_wait<1>();
  if (threadIdx.x < ROWS) row_parts[threadIdx.x] = epilogue.row_of(static_cast<int32_t>(row_parts[threadIdx.x]));
  async_proxy_fence();
  named_barrier(1, kStreamGroups * kWarpgroup);  // all of a is there, and its factors
  cluster_wait();                                // for the other block's barriers

  int slot = 0;
  uint32_t parity = 0;
  const uint32_t fragment = shared_address(ring) + StreamCodes::offset(warp * 16);
  StreamCodes codes;
  StreamCodes::Words even, odd;
  auto load = [&] {
    barrier_wait(&full[slot], parity);
    codes.load(fragment + slot * kStreamSlotBytes);
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[slot]);
    if (++slot == problem.slots) slot = 0, parity ^= 1;
    codes.widen(even, 0);
  };

  // A pass multiplies a tile and adds up the one before, whose sums have been on their way meanwhile.
  if (first_tile < tiles && k_group < units) load();
  int before = -1;
#pragma unroll 1
  for (int tile = first_tile;; tile += kTilesAtOnce) {
    if (tile + kTilesAtOnce >= tiles) launch_dependents();
    if (tile < tiles) {
      int32_t sums[ROWS / 2] = {};
#pragma unroll 1
      for (int unit = k_group; unit < units; unit += kStreamKGroups) {
        const uint64_t a_tile = swizzled_tile(a_units + unit * kUnitBytes);
        auto multiply = [&](const StreamCodes::Words& words, uint64_t b_tile) {
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) WgmmaUnsigned::mma(sums, words[i], b_tile + 2 * i, 1);
          wgmma_commit();
          wgmma_wait<1>();  // the products before these
        };
        multiply(even, a_tile);
        codes.widen(odd, 1);
        multiply(odd, a_tile + kHalfBytes / 16);
        if (unit + kStreamKGroups < units || tile + kTilesAtOnce < tiles) load();
      }
      wgmma_wait<0>();
      wgmma_owned(sums);
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        if (j >= eights) break;
        const int part = warp * eights + j, owner = part % kStreamBlocks, sender = rank * kStreamKGroups + k_group;
        int4* const target = received + ((tile * kStreamSenders + sender) * own_parts + part / kStreamBlocks) * 32 + lane;
        const int32_t words[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
        if (owner != rank) {
          store_async(owner, target, words, &sent[tile]);
        } else {
          *target = make_int4(words[0], words[1], words[2], words[3]);
          if (k_group != adder_of(tile)) barrier_arrive(&sent[tile]);  // the adder's own threads read what they wrote
        }
      }
    }
    if (before >= 0 && adder_of(before) == k_group) {
      cp_async_wait<0>();
      __syncwarp();
      barrier_wait(&sent[before], 0);
#pragma unroll 1
      for (int j = 0; j < eights; ++j) {
        const int part = warp * eights + j;
        if (part % kStreamBlocks != rank) continue;
        uint32_t sums[4] = {};
        const int4* source = received + (before * kStreamSenders * own_parts + part / kStreamBlocks) * 32 + lane;
#pragma unroll
        for (int i = 0; i < kStreamSenders; ++i, source += own_parts * 32) {
          const int4 words = *source;
          sums[0] += words.x, sums[1] += words.y, sums[2] += words.z, sums[3] += words.w;
        }
        const int first = before * kStreamTileN + warp * 16;
        store_four(y, 8 * j, rows, first_n + first, adjacent, [&](int c) {
          const int m = 8 * j + lane % 4 * 2 + c % 2, column = first + lane_column(adjacent, c / 2);
          const float product = epilogue.product(static_cast<int32_t>(sums[c]), row_parts[m], epilogue.column_of(column_sums[column]));
          return scaled(product, row_scales[m], column_scales[column], biases[column]);
        });
      }
    }
    if (tile >= tiles) break;
    before = tile;
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

// a: of plan.rows rows at most.
template <int ROWS>
void launch_stream(const char* op, const Operand& a, const Operand& w, const IntegerEpilogue& epilogue, const StreamPlan& plan, int64_t k,
                   cudaStream_t stream) {
  const int64_t n = epilogue.output.n, w_row_bytes = row_bytes(w.layout, k);
  StreamProblem problem{};
  problem.a = static_cast<const uint8_t*>(a.data);
  problem.a_row_bytes = static_cast<int32_t>(row_bytes(a.layout, k));
  problem.slots = plan.slots;
  problem.tiles = shares_of((n + kStreamTileN - 1) / kStreamTileN, plan.ranges);
  problem.units = shares_of((k + kStreamColumns - 1) / kStreamColumns, kStreamBlocks);
  problem.epilogue = epilogue;
  const CUtensorMap w_map =
      weight_map(op, w.data, n, 1, w_row_bytes, {kStreamRowBytes, kStreamTileN, CU_TENSOR_MAP_SWIZZLE_128B}, epilogue.output.adjacent());
  launch_with({kStreamBlocks, true}, op, gemm_stream_kernel<ROWS>, dim3(static_cast<unsigned>(plan.ranges * kStreamBlocks)),
              dim3(kStreamThreads), static_cast<size_t>(plan.shared_bytes), stream, w_map, problem);
}

}  // namespace quest::cuda
