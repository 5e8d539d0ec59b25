// The product of few rows of integers on Hopper's wgmma, bound by the bytes of w, which are read once: y[BLOCK_M, 128] per cluster.
//
// There are fewer tiles than multiprocessors, so the blocks of a cluster share one along K, and each adds up the integers of all of them
// for its share of the rows, from their shared memory: no workspace, no second launch, the same bits in any order. Warpgroup 0 starts
// copies (TMA, a ring of stages); warpgroups 1 and 2 multiply, 64 rows of w each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/wgmma_fragments.cuh"

namespace quest::cuda {

inline constexpr int kMaxSplit = 4;  // blocks that share a tile along K: 8 took longer than their shorter loops saved

template <typename Mma_, typename Fragments_, int BLOCK_M_>
struct SplitTile {
  using Mma = Mma_;
  using Fragments = Fragments_;
  static constexpr int BLOCK_M = BLOCK_M_, CLUSTER = 1;  // blocks that copy a for each other
  static constexpr int BLOCKS = 2;                       // a multiprocessor, so that one starts while the other ends
  static constexpr int W_BYTES = kWgmmaN * (Fragments::kRowBytes + Fragments::kIndexBytes), A_BYTES = BLOCK_M * kStepRowBytes;
  static constexpr int STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int FACTORS_BYTES = kMultipliers * BLOCK_M * static_cast<int>(sizeof(RowFactors));
  static constexpr int OTHER_BYTES = FACTORS_BYTES + 256;  // 256: the mbarriers
  // 1024 of each block are the system's.
  static constexpr int STAGES = std::min((228 * 1024 / BLOCKS - 1024 - OTHER_BYTES) / STAGE_BYTES, 16);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + OTHER_BYTES;
  static_assert(STAGES >= 3 && 2 * STAGES * 8 <= 256, "a ring of stages");
  // Registers a thread of the copying and the multiplying warpgroups; together at most what the three start with, a multiple of 8 each.
  static constexpr int COPIER_REGISTERS = 32, MULTIPLIER_REGISTERS = 104;
  static_assert(COPIER_REGISTERS + kMultipliers * MULTIPLIER_REGISTERS <= 3 * (65536 / (kWgmmaThreads * BLOCKS) / 8 * 8),
                "or they wait for ever");
};

template <typename Tile>
__global__ __launch_bounds__(kWgmmaThreads, Tile::BLOCKS) void gemm_split_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                                 const __grid_constant__ CUtensorMap w_map,
                                                                                 const __grid_constant__ CUtensorMap index_map,
                                                                                 const __grid_constant__ WgmmaProblem problem) {
#ifdef QUEST_SM90A
  constexpr int BLOCK_M = Tile::BLOCK_M, STAGES = Tile::STAGES;

  uint8_t* const shared = dynamic_shared();
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(shared + STAGES * Tile::STAGE_BYTES);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  StageRing<Tile> ring{shared, barriers, barriers + STAGES};

  const int warpgroup = warpgroup_index();
  const int blocks = problem.split, rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    ring.init_barriers();
    barrier_init_fence();
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&w_map);
  }
  __syncthreads();
  wait_for_prerequisites();

  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const int first_m = tile % problem.tiles_m * BLOCK_M, tile_n = tile / problem.tiles_m * kWgmmaN;
  Steps steps = problem.steps;
  const int first_k_tile = rank * steps.k_tiles / blocks;
  steps.k_tiles = (rank + 1) * steps.k_tiles / blocks - first_k_tile;

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      StepCursor step(steps);
      for (int i = 0; i < steps.count(); ++i) {
        ring.copy(a_map, w_map, index_map, first_k_tile + step.k_tile, step, first_m, tile_n, 0);
        step.advance();
      }
    }
    __syncwarp();
    cluster_sync();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = warpgroup - 1;
    const int first_n = tile_n + group * kWarpgroupColumns;
    RowFactors* const factors = row_factors + group * BLOCK_M;

    // The factors are loaded before the main loop and looked at after it: until then memory has time.
    const RowLoads<BLOCK_M> row_loads(problem.output, first_m);
    const ColumnLoads column_loads(problem.output, first_n);

    int32_t accumulators[BLOCK_M / 2];
    TileMultiplier<Tile>(ring, group).multiply(accumulators, ring, problem, steps, first_k_tile);

    // Every block of the cluster adds up its share of the tile, whole groups of 8 rows. Once both warpgroups are here all copies have
    // landed and been read: the ring now holds this block's integers, word i of every thread side by side. (A loop over what lies in
    // memory, since every instruction of a kernel this short is one that has to be fetched.)
    constexpr int kStride = kMultipliers * kWarpgroup;
    const int groups = min(BLOCK_M / 8, (static_cast<int>(problem.output.epilogue.output.m) - first_m + 7) / 8);
    const int share = (groups + blocks - 1) / blocks, first_group = rank * share;
    int32_t* const words = reinterpret_cast<int32_t*>(shared) + threadIdx.x - kWarpgroup;
    static_assert(kStride * (BLOCK_M / 2) * 4 <= STAGES * Tile::STAGE_BYTES, "the ring holds a tile");
    named_barrier(kBothBarrier, kStride);
#pragma unroll
    for (int i = 0; i < BLOCK_M / 2; ++i) words[i * kStride] = accumulators[i];
    row_loads.store(problem.output, factors);
    cluster_sync();
    const ColumnFactors columns = column_loads.factors(problem.output);
#pragma unroll 1
    for (int j = first_group; j < min(first_group + share, groups); ++j) {
      int32_t sums[4] = {};
#pragma unroll
      for (int block = 0; block < kMaxSplit; ++block) {  // all loads on their way together
        if (block >= blocks) break;
        const uint32_t theirs = cluster_address(words, block) + j * 4 * kStride * 4;
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] += load_cluster_32(theirs + c * kStride * 4);
      }
      store_group(problem.output, sums, factors + j * 8, columns, first_m + j * 8, first_n);
    }
  }
  // No block ends while another may still read its integers.
  cluster_sync();
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

}  // namespace quest::cuda
