// The product of few rows of integers on Hopper's wgmma, bound by the bytes of w, which are read once: y[BLOCK_M, 64 N_GROUPS] per thread
// block.
//
// Up to four warpgroups of a block multiply. Those that do not take columns of their own share K: of the stages that the copying warpgroup
// fills (TMA), each has every K_GROUPS-th, and at the end the block adds up their integers, each warpgroup its share of the rows, in a
// fixed order: no workspace, no second launch. Where even so half of the multiprocessors would have no block, and K is long, two blocks of
// a cluster share a tile: each sends the other what it has of half of the rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/wgmma_fragments.cuh"
#include "quest/plan.h"

namespace quest::cuda {

template <typename Mma_, typename Fragments_, int BLOCK_M_, int N_GROUPS_>
struct FewTile : Warpgroups<N_GROUPS_, kWgmmaFewSplit[N_GROUPS_ - 1]> {
  using Groups = Warpgroups<N_GROUPS_, kWgmmaFewSplit[N_GROUPS_ - 1]>;
  using Groups::MULTIPLIERS, Groups::BLOCK_N, Groups::N_GROUPS, Groups::K_GROUPS;
  using Mma = Mma_;
  using Fragments = Fragments_;
  static constexpr int BLOCK_M = BLOCK_M_, CLUSTER = 1;  // blocks that copy a for each other
  static constexpr int W_BYTES = BLOCK_N * (Fragments::kRowBytes + Fragments::kIndexBytes), A_BYTES = BLOCK_M * kStepRowBytes;
  static constexpr int STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int FACTORS_BYTES = N_GROUPS * BLOCK_M * static_cast<int>(sizeof(RowFactors));
  static constexpr int SENT_BYTES = N_GROUPS == 1 ? K_GROUPS * kWarpgroup * 16 : 0;  // by the other block, at most
  static constexpr int OTHER_BYTES = FACTORS_BYTES + SENT_BYTES + 512;               // 512: the mbarriers
  static constexpr int STAGES = std::min((227 * 1024 - OTHER_BYTES) / STAGE_BYTES / K_GROUPS * K_GROUPS, 24);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + OTHER_BYTES;
  static_assert(STAGES >= 2 * K_GROUPS && (2 * STAGES + 1) * 8 <= 512, "a ring of stages");
  static constexpr int COPIER_REGISTERS = 32, MULTIPLIER_REGISTERS = MULTIPLIERS == 4 ? 112 : 152;
  static_assert(N_GROUPS > 1 || BLOCK_M / 8 <= 2 * K_GROUPS, "a warpgroup is sent one group of 8 rows at most");
  static_assert(COPIER_REGISTERS + MULTIPLIERS * MULTIPLIER_REGISTERS <= (1 + MULTIPLIERS) * (65536 / Groups::THREADS / 8 * 8),
                "what the warps start with, or they wait for ever");
};

template <typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_few_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                    const __grid_constant__ CUtensorMap w_map,
                                                                    const __grid_constant__ CUtensorMap index_map,
                                                                    const __grid_constant__ WgmmaProblem problem) {
#ifdef QUEST_SM90A
  constexpr int BLOCK_M = Tile::BLOCK_M, STAGES = Tile::STAGES, K_GROUPS = Tile::K_GROUPS;

  uint8_t* const shared = dynamic_shared();
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(shared + STAGES * Tile::STAGE_BYTES);
  int4* const sent = reinterpret_cast<int4*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(sent) + Tile::SENT_BYTES);
  StageRing<Tile> ring{shared, barriers, barriers + STAGES, problem.copied_bytes};
  uint64_t* const all_sent = barriers + 2 * STAGES;

  // Of the pair of blocks that shares a tile; each makes y of some groups of 8 rows, of one group the first alone.
  const int paired = problem.paired, rank = static_cast<int>(blockIdx.x) & paired;
  const int tile = static_cast<int>(blockIdx.x) >> paired;
  const int first_m = tile % problem.tiles_m * BLOCK_M, tile_n = tile / problem.tiles_m * Tile::BLOCK_N;
  const int groups = min(BLOCK_M / 8, (static_cast<int>(problem.output.epilogue.output.m) - first_m + 7) / 8);
  const int share = (groups + paired) >> paired;
  auto first_of = [&](int block) { return block * share; };
  auto last_of = [&](int block) { return min(first_of(block) + share, groups); };

  const int warpgroup = warpgroup_index();
  // One lane of each warp, of whose barriers all lanes know the place (gemm_fixed.cuh).
  const int warp = 4 * warpgroup + warp_index();
  if (threadIdx.x % 32 == 0) {
    ring.init_barriers(warp, Tile::THREADS / 32);
    if (warp == 0) {
      barrier_init(all_sent, 1);
      prefetch_tensor_map(&a_map);
      prefetch_tensor_map(&w_map);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (paired) {
    cluster_arrive_relaxed();
    if (threadIdx.x == 0) barrier_expect(all_sent, (last_of(rank) - first_of(rank)) * kWarpgroup * 16);
  }
  wait_for_prerequisites();

  // All groups have as many steps: what lies beyond K is zeros.
  Steps steps = problem.steps;
  steps.k_tiles = (((steps.k_tiles + paired) >> paired) + K_GROUPS - 1) / K_GROUPS;
  const int first_k_tile = rank * K_GROUPS * steps.k_tiles;

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {  // and no more code follows, or the compiler would not let one thread use uniform registers
      StepCursor step(steps);
      for (int i = 0; i < steps.count(); ++i) {
        for (int k_group = 0; k_group < K_GROUPS; ++k_group) {
          ring.copy(a_map, w_map, index_map, first_k_tile + k_group * steps.k_tiles + step.k_tile, step, first_m, tile_n, 0);
        }
        step.advance();
      }
    }
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int n_group = (warpgroup - 1) / K_GROUPS, k_group = (warpgroup - 1) % K_GROUPS;
    const int first_n = tile_n + n_group * kWarpgroupColumns;
    RowFactors* const factors = row_factors + n_group * BLOCK_M;

    // The factors are loaded before the main loop and looked at after it: until then memory has time.
    const RowLoads<BLOCK_M> row_loads(problem.output, first_m);
    const ColumnLoads column_loads(problem.output, first_n);

    int32_t accumulators[BLOCK_M / 2];
    ring.stage = k_group;
    TileMultiplier<Tile>(ring, n_group).multiply(accumulators, ring, problem, steps, first_k_tile + k_group * steps.k_tiles);

    if constexpr (K_GROUPS == 1) {
      row_loads.store(problem.output, factors);
      named_barrier(group_barrier(n_group), kWarpgroup);
      const ColumnFactors columns = column_loads.factors(problem.output);
#pragma unroll
      for (int j = 0; j < BLOCK_M / 8; ++j) {
        const int32_t four[4] = {accumulators[4 * j], accumulators[4 * j + 1], accumulators[4 * j + 2], accumulators[4 * j + 3]};
        if (j < groups) store_group(problem.output, four, factors + j * 8, columns, first_m + j * 8, first_n);
      }
    } else {
      // Once all are here, all copies have landed and been read: the ring now holds the integers, word i of every thread side by side. (A
      // loop over what lies in memory, since every instruction of a kernel this short is one that has to be fetched.)
      constexpr int kMultiplyingBarrier = 1, kThreads = Tile::MULTIPLIERS * kWarpgroup;
      static_assert(kThreads * (BLOCK_M / 2) * 4 <= STAGES * Tile::STAGE_BYTES, "the ring holds a tile");
      int32_t* const words = reinterpret_cast<int32_t*>(shared) + n_group * K_GROUPS * kWarpgroup + threadIdx.x % kWarpgroup;
      named_barrier(kMultiplyingBarrier, kThreads);
#pragma unroll
      for (int i = 0; i < BLOCK_M / 2; ++i) words[i * kThreads + k_group * kWarpgroup] = accumulators[i];
      if (k_group == 0) row_loads.store(problem.output, factors);
      named_barrier(kMultiplyingBarrier, kThreads);
      auto sum_groups = [&](int32_t(&sums)[4], int j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] = 0;
#pragma unroll
        for (int group = 0; group < K_GROUPS; ++group) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[c] += words[(j * 4 + c) * kThreads + group * kWarpgroup];
        }
      };
      int4* const place = sent + k_group * kWarpgroup + threadIdx.x % kWarpgroup;
      if (paired) {
        cluster_wait();  // for the other block's barrier
        const int j = first_of(rank ^ 1) + k_group;
        if (j < last_of(rank ^ 1)) {
          int32_t sums[4];
          sum_groups(sums, j);
          store_async(rank ^ 1, place, sums, all_sent);
        }
      }
      const ColumnFactors columns = column_loads.factors(problem.output);
#pragma unroll 1
      for (int j = first_of(rank) + k_group; j < last_of(rank); j += K_GROUPS) {
        int32_t sums[4];
        sum_groups(sums, j);
        if (paired) {
          barrier_wait(all_sent, 0);
          sums[0] += place->x, sums[1] += place->y, sums[2] += place->z, sums[3] += place->w;
        }
        store_group(problem.output, sums, factors + j * 8, columns, first_m + j * 8, first_n);
      }
      if (paired) barrier_wait(all_sent, 0);  // no block ends before what it is sent is there
    }
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

}  // namespace quest::cuda
