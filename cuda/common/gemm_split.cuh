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
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int BLOCKS = 2;  // a multiprocessor, so that one starts while the other ends
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
  using Fragments = typename Tile::Fragments;

  uint8_t* const shared = dynamic_shared();
  auto w_tile = [&](int stage) { return shared + stage * Tile::STAGE_BYTES; };
  auto a_tile = [&](int stage) { return w_tile(stage) + Tile::W_BYTES; };
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(shared + STAGES * Tile::STAGE_BYTES);
  uint64_t* const full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  uint64_t* const empty = full + STAGES;

  const int warpgroup = warpgroup_index();
  const int blocks = problem.split, rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&full[stage], 1);  // the copier, and the bytes
      barrier_init(&empty[stage], kMultipliers * kWarpgroup / 32);
    }
    barrier_init_fence();
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&w_map);
  }
  __syncthreads();
  // From here on memory is touched: what was launched before must have ended. What comes after may start to start.
  dependents_may_launch();
  wait_for_prerequisites();

  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const int first_m = tile % problem.tiles_m * BLOCK_M, tile_n = tile / problem.tiles_m * kWgmmaN;
  Steps steps = problem.steps;
  const int first_k_tile = rank * steps.k_tiles / blocks;
  steps.k_tiles = (rank + 1) * steps.k_tiles / blocks - first_k_tile;
  const int count = steps.count();
  int stage = 0;
  uint32_t parity = 0;
  auto next_stage = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      StepCursor step(steps);
      for (int i = 0; i < count; ++i) {
        barrier_wait(&empty[stage], parity ^ 1);
        barrier_expect(&full[stage], Tile::STAGE_BYTES);
        const int k_tile = first_k_tile + step.k_tile;
        tensor_load<false>(w_tile(stage), &w_map, &full[stage], k_tile * Fragments::kRowBytes, tile_n, step.w_plane, 0);
        if constexpr (Fragments::kIndexBytes > 0) {
          tensor_load<false>(w_tile(stage) + kWgmmaN * Fragments::kRowBytes, &index_map, &full[stage], k_tile / 2 * Fragments::kIndexBytes,
                             tile_n, 0, 0);
        }
        tensor_load<false>(a_tile(stage), &a_map, &full[stage], k_tile * kStepRowBytes, first_m, step.a_plane, 0);
        step.advance();
        next_stage();
      }
    }
    __syncwarp();
    cluster_sync();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = warpgroup - 1;
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int first_n = tile_n + group * kWarpgroupColumns;
    const uint32_t fragment_address = shared_address(shared) + Fragments::offset(group * 64 + warp * 16);
    constexpr bool kSparse = Fragments::kIndexBytes > 0;
    uint32_t index_address = 0;
    if constexpr (kSparse) index_address = shared_address(shared) + Fragments::index_offset(group * 64 + warp * 16);
    RowFactors* const factors = row_factors + group * BLOCK_M;

    // The factors are loaded before the main loop and looked at after it: until then memory has time.
    const RowLoads<BLOCK_M> row_loads(problem.output, first_m);
    const ColumnLoads column_loads(problem.output, first_n);

    constexpr int kInstructions = Fragments::kInstructions;
    using Words = typename Fragments::Words;
    Words even, odd;
    if constexpr (kSparse) even[0][4] = even[1][4] = odd[0][4] = odd[1][4] = 0;
    // Of step i, whose stage the ring is at.
    auto load_words = [&](Words& words, int i) {
      typename Fragments::Fetched fetched;
      const uint32_t stage_offset = stage * Tile::STAGE_BYTES;
      if constexpr (kSparse) {
        const int half = (first_k_tile + i) % 2 * (Fragments::kIndexBytes / 2);
        Fragments::fetch(fetched, fragment_address + stage_offset, index_address + stage_offset + half);
      } else {
        Fragments::fetch(fetched, fragment_address + stage_offset);
      }
      Fragments::widen(words, fetched, problem);
    };
    int32_t accumulators[BLOCK_M / 2];
    StepCursor cursor(steps);
    // The products of the stage whose words are in `now`; meanwhile the words of the next stage are loaded.
    auto multiply_stage = [&](int i, const Words& now, Words& next) {
      const uint64_t b_tile = swizzled_tile(a_tile(stage));
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kInstructions; ++j) {
        Tile::Mma::mma(accumulators, now[j], b_tile + j * (Tile::Mma::kBytes / 16), (i | j) != 0);
      }
      wgmma_commit();
      const int previous = (stage == 0 ? STAGES : stage) - 1;
      wgmma_wait<1>();  // the products before these, which used `next`
      if (i > 0 && lane == 0) barrier_arrive(&empty[previous]);
      if (i + 1 < count) {
        next_stage();
        barrier_wait(&full[stage], parity);
        load_words(next, i + 1);
        if (Tile::Mma::kPlanes && cursor.advance()) {
          wgmma_wait<0>();
          wgmma_owned(accumulators);
#pragma unroll
          for (int32_t& accumulator : accumulators) accumulator *= 2;
        }
      }
    };
    barrier_wait(&full[stage], parity);
    load_words(even, 0);
    for (int i = 0; i < count; i += 2) {
      multiply_stage(i, even, odd);
      if (i + 1 < count) multiply_stage(i + 1, odd, even);
    }
    wgmma_wait<0>();
    wgmma_owned(accumulators);

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
