// The product of few rows of integers on Hopper's wgmma, bound by the bytes of w, which are read once: y[BLOCK_M, 64 N_GROUPS] per thread
// block.
//
// Two or three warpgroups of a block multiply, and a warp copies (TMA). Warpgroups that have the same columns share K: each has every
// second of the stages, and at the end each adds up the integers of every second group of 8 rows, in a fixed order: no workspace, no second
// launch. Where even so half of the multiprocessors would have no block, and K is long, two blocks of a cluster share a tile, and each adds
// up every second pair of these groups. Of 16 rows of w the even ones may lie first (weight_map).
//
// What follows the last product counts: at 64 x 4096 x 4096 it took 1.7 us of 5.9 with four warpgroups that shared K, whose sums are four
// times the bytes in shared memory.
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
  static constexpr bool ORDERS_ROWS = true;              // of w (weight_map)
  static_assert(Fragments::kPlanes == 1, "a plane at a time");
  static constexpr int W_BYTES = BLOCK_N * (Fragments::kRowBytes + Fragments::kIndexBytes), A_BYTES = BLOCK_M * kStepRowBytes;
  static constexpr int STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int THREADS = MULTIPLIERS * kWarpgroup + 32;  // the last warp copies
  static constexpr int PREFETCHED_STEPS = 2;                     // of each K group
  static constexpr int FACTORS_BYTES = N_GROUPS * BLOCK_M * static_cast<int>(sizeof(RowFactors));
  // Pairs of groups of 8 rows: of two warpgroups that share K each adds up one group. It is given the other warpgroup's sums of it, and is
  // sent those of the other block.
  static constexpr int PAIRS = BLOCK_M / 16, PART_BYTES = kWarpgroup * 16;
  static constexpr int GIVEN_BYTES = K_GROUPS == 1 ? 0 : MULTIPLIERS * PAIRS * PART_BYTES;
  static constexpr int SENT_BYTES = N_GROUPS == 1 ? MULTIPLIERS * ((PAIRS + 1) / 2) * PART_BYTES : 0;
  static constexpr int OTHER_BYTES = FACTORS_BYTES + GIVEN_BYTES + SENT_BYTES + 512;  // 512: the mbarriers
  static constexpr int STAGES = std::min((227 * 1024 - OTHER_BYTES) / STAGE_BYTES / K_GROUPS * K_GROUPS, 24);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + OTHER_BYTES;
  static_assert(K_GROUPS <= 2 && BLOCK_M % 16 == 0, "a pair of groups of rows has an adder each");
  static_assert(STAGES >= 2 * K_GROUPS && (2 * STAGES + 1) * 8 <= 512, "a ring of stages");
};

template <typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_few_kernel(const __grid_constant__ WgmmaProblem problem,
                                                                    const __grid_constant__ CUtensorMap a_map,
                                                                    const __grid_constant__ CUtensorMap w_map,
                                                                    const __grid_constant__ CUtensorMap index_map) {
#ifdef QUEST_SM90A
  constexpr int BLOCK_M = Tile::BLOCK_M, STAGES = Tile::STAGES, K_GROUPS = Tile::K_GROUPS;

  uint8_t* const shared = dynamic_shared();
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(shared + STAGES * Tile::STAGE_BYTES);
  int4* const given = reinterpret_cast<int4*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  int4* const sent = reinterpret_cast<int4*>(reinterpret_cast<uint8_t*>(given) + Tile::GIVEN_BYTES);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(sent) + Tile::SENT_BYTES);
  const bool adjacent = problem.output.epilogue.output.adjacent();
  StageRing<Tile> ring{shared, barriers, barriers + STAGES, problem.copied_bytes, adjacent};
  uint64_t* const all_sent = barriers + 2 * STAGES;

  // Of two blocks that share a tile each makes y of every second pair of groups of 8 rows.
  const int paired = Tile::SENT_BYTES > 0 ? problem.paired : 0, rank = static_cast<int>(blockIdx.x) & paired;
  const int tile = static_cast<int>(blockIdx.x) >> paired;
  const int n_tile = problem.tiles_m == 1 ? tile : tile / problem.tiles_m;  // (a division takes a while, and the first copy waits for it)
  const int first_m = (tile - n_tile * problem.tiles_m) * BLOCK_M, tile_n = n_tile * Tile::BLOCK_N;
  const int pairs = min(Tile::PAIRS, (static_cast<int>(problem.output.epilogue.output.m) - first_m + 15) / 16);

  // All groups have as many steps: what lies beyond K is zeros.
  Steps steps = problem.steps;
  steps.k_tiles = (((steps.k_tiles + paired) >> paired) + K_GROUPS - 1) / K_GROUPS;
  const int first_k_tile = rank * K_GROUPS * steps.k_tiles;

  const int warpgroup = warpgroup_index(), warp = 4 * warpgroup + warp_index();
  if (threadIdx.x % 32 == 0) {
    if (warpgroup < Tile::MULTIPLIERS) {
      // One lane of each warp, of whose barriers all lanes know the place (gemm_fixed.cuh).
      ring.init_barriers(warp, 4 * Tile::MULTIPLIERS);
      if (warp == 0) barrier_init(all_sent, 1);
      barrier_init_fence();
    } else {
      prefetch_tensor_map(&w_map);
      prefetch_tensor_map(&a_map);
      // To the second cache, while barriers are made and the kernel before this one ends: of a, which all blocks read, a step of the
      // columns by each tile, and the first boxes of w. (One step of w: as fast; four: up to 5 % slower. Not before the barriers but
      // behind: 1 to 5 % slower where blocks fill the GPU.)
      const StepCursor first_step(steps);
      if (BLOCK_M >= 64 && n_tile < K_GROUPS * steps.k_tiles) {
        tensor_prefetch(&a_map, (first_k_tile + n_tile) * kStepRowBytes, first_m, first_step.a_plane);
      }
      if (first_m == 0) {
#pragma unroll 1
        for (int i = 0; i < min(Tile::PREFETCHED_STEPS, steps.k_tiles); ++i) {
          for (int k_group = 0; k_group < K_GROUPS; ++k_group) {
            ring.prefetch(w_map, first_k_tile + k_group * steps.k_tiles + i, first_step, tile_n);
          }
        }
      }
    }
  }
  __syncthreads();
  if (paired) {
    cluster_arrive_relaxed();
    if (threadIdx.x == 0) barrier_expect(all_sent, (pairs + 1 - rank) / 2 * Tile::MULTIPLIERS * Tile::PART_BYTES);
  }

  if (warpgroup == Tile::MULTIPLIERS) {
    if (threadIdx.x % 32 == 0) {  // and no more code follows, or the compiler would not let one thread use uniform registers
      wait_for_prerequisites();
      StepCursor step(steps);
      for (int i = 0; i < steps.count(); ++i) {
        for (int k_group = 0; k_group < K_GROUPS; ++k_group) {
          ring.copy(a_map, w_map, index_map, first_k_tile + k_group * steps.k_tiles + step.k_tile, step, first_m, tile_n, 0);
        }
        step.advance();
      }
    }
  } else {
    wait_for_prerequisites();
    if (paired) cluster_wait();  // for the other block's barrier
    const int n_group = warpgroup / K_GROUPS, k_group = warpgroup % K_GROUPS;
    const int first_n = tile_n + n_group * kWarpgroupColumns;
    RowFactors* const factors = row_factors + n_group * BLOCK_M;

    // The factors are loaded before the main loop and looked at after it: until then memory has time.
    const RowLoads<BLOCK_M> row_loads(problem.output, k_group == 0 ? first_m : static_cast<int>(problem.output.epilogue.output.m));
    const ColumnLoads column_loads(problem.output, first_n, adjacent);

    int32_t accumulators[BLOCK_M / 2];
    ring.stage = k_group;
    TileMultiplier<Tile>(ring, n_group).multiply(accumulators, ring, problem, steps, first_k_tile + k_group * steps.k_tiles);
    launch_dependents();

    if constexpr (K_GROUPS == 1) {
      row_loads.store(problem.output, factors);
      named_barrier(group_barrier(n_group), kWarpgroup);
      const ColumnFactors columns = column_loads.factors(problem.output);
#pragma unroll
      for (int j = 0; j < BLOCK_M / 8; ++j) {
        const int32_t four[4] = {accumulators[4 * j], accumulators[4 * j + 1], accumulators[4 * j + 2], accumulators[4 * j + 3]};
        if (j < 2 * pairs) store_group(problem.output, four, factors + j * 8, columns, first_m + j * 8, first_n, adjacent);
      }
    } else {
      // Of each pair the warpgroup gives the other's group away and adds up its own: first in the block, then with the other block's.
      const int thread = threadIdx.x % kWarpgroup;
      auto place_of = [&](int pair, int of_group) {
        return given + ((n_group * K_GROUPS + of_group) * Tile::PAIRS + pair) * kWarpgroup + thread;
      };
      auto sent_place_of = [&](int pair) { return sent + (k_group * ((Tile::PAIRS + 1) / 2) + pair / 2) * kWarpgroup + thread; };
#pragma unroll
      for (int i = 0; i < Tile::PAIRS; ++i) {
        int32_t* const two = accumulators + 8 * i;
        if (k_group != 0) {  // its own first
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int32_t other = two[c];
            two[c] = two[4 + c], two[4 + c] = other;
          }
        }
        *place_of(i, k_group ^ 1) = make_int4(two[4], two[5], two[6], two[7]);
      }
      if (k_group == 0) row_loads.store(problem.output, factors);
      named_barrier(group_barrier(n_group), K_GROUPS * kWarpgroup);
#pragma unroll
      for (int i = 0; i < Tile::PAIRS; ++i) {
        if (i >= pairs) break;
        int4* const place = place_of(i, k_group);
        const int4 other = *place;
        const int32_t sums[4] = {accumulators[8 * i] + other.x, accumulators[8 * i + 1] + other.y, accumulators[8 * i + 2] + other.z,
                                 accumulators[8 * i + 3] + other.w};
        if ((i & paired) == rank) {
          *place = make_int4(sums[0], sums[1], sums[2], sums[3]);
        } else {
          store_async(rank ^ 1, sent_place_of(i), sums, all_sent);
        }
      }
      const ColumnFactors columns = column_loads.factors(problem.output);
      if (paired) barrier_wait(all_sent, 0);  // and no block ends before what it is sent is there
      // (A loop over what lies in memory, for which even a lone block's sums go there and back: every instruction of a kernel this short is
      // one that has to be fetched.)
#pragma unroll 1
      for (int i = rank; i < pairs; i += 1 + paired) {
        const int4 own = *place_of(i, k_group), other = paired ? *sent_place_of(i) : make_int4(0, 0, 0, 0);
        const int32_t sums[4] = {own.x + other.x, own.y + other.y, own.z + other.z, own.w + other.w};
        const int j = 2 * i + k_group;
        store_group(problem.output, sums, factors + j * 8, columns, first_m + j * 8, first_n, adjacent);
      }
    }
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

}  // namespace quest::cuda
