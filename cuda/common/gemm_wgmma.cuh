// The product of many rows of integers, or of 16-bit floats by integers, on Hopper's wgmma: y[BLOCK_M, BLOCK_N] per tile of a persistent
// thread block.
//
// Split of the work. Warpgroup 0 starts copies (TMA); two or three others multiply, 64 rows of w each, and make y. The weight is the left
// operand of the instruction, from registers (wgmma_fragments.cuh); the activation is the right one, straight from shared memory: its rows
// are the instruction's N. The accumulators hold y transposed; stmatrix turns it on its way to the copy engine.
//
// A stage of the ring holds 128 bytes of every row of a (128 int8, 1024 bits or 64 floats) and as many columns of the rows of w. More warps
// of warpgroup 0 start the copies of y, one for each multiplying warpgroup, whose warps do not wait for each other while they write.
//
// Clusters: the two blocks of a pair take neighbouring columns of y and the same rows, and each copies its share of a to both. (With tiles
// of 128 rows a pair started and ended 0.8 us later, with a barrier of the cluster at its end, and its fewer bytes did not make that good.)
//
// Bit planes: one pass over K for each pair of planes (steps.cuh).
//
// 4:8 sparse weights: a product of 64 columns takes the time of one of 32, and reads 128 bytes of a a cycle, all that shared memory gives.
// What copies write comes on top of that, so the tensor cores work in 60 to 67 % of the cycles, at 1.55 GHz: out of power too.
//
// While it writes y a warpgroup multiplies nothing: with its left operand in registers it runs ahead of the tensor cores by two
// instructions. (CHANGELOG has the forms of overlap that were tried.)
//
// What bounds it: power, before anything else. Where the operands are codes, which are never negative, the clock is a tenth higher than
// with signed values of the same grid.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/wgmma_fragments.cuh"

namespace quest::cuda {

// Neighbouring tiles: 8 down y, then the next columns, so that both operands of a wave stay in the L2 cache.
inline constexpr int kWgmmaGroupM = 8;

template <typename Mma_, typename Fragments_, int BLOCK_M_, int MULTIPLIERS_ = 2>
struct WgmmaTile : Warpgroups<MULTIPLIERS_> {
  using Warpgroups<MULTIPLIERS_>::MULTIPLIERS, Warpgroups<MULTIPLIERS_>::BLOCK_N;
  using Mma = Mma_;
  using Fragments = Fragments_;
  static constexpr bool ORDERS_ROWS = false;
  static constexpr int BLOCK_M = BLOCK_M_, CLUSTER = BLOCK_M == 256 ? 2 : 1;
  static constexpr int THREADS = (1 + MULTIPLIERS) * kWarpgroup;  // the first warpgroup copies
  using Piece = OutputPiece<64>;                                  // of y, that a warpgroup hands over at once, through buffers of its own
  static constexpr int BUFFERS = 2;
  static constexpr int PREFETCHED_STEPS = 4;  // (2 or 8: as fast)
  static constexpr int W_BYTES = BLOCK_N * (Fragments::kPlanes * Fragments::kRowBytes + Fragments::kIndexBytes),
                       A_BYTES = BLOCK_M * kStepRowBytes;
  static constexpr int STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int STORES_BYTES = MULTIPLIERS * BUFFERS * Piece::BYTES;
  static constexpr bool HAS_ROW_FACTORS = !kRealSums<typename Mma::Accumulator>;
  static constexpr int FACTORS_BYTES = HAS_ROW_FACTORS ? MULTIPLIERS * BLOCK_M * static_cast<int>(sizeof(RowFactors)) : 0;
  static constexpr int OTHER_BYTES = STORES_BYTES + FACTORS_BYTES + 256;  // 256: the mbarriers
  static constexpr int STAGES = std::min((227 * 1024 - OTHER_BYTES) / STAGE_BYTES, 12);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + OTHER_BYTES;
  static_assert(BLOCK_M % (BUFFERS * Piece::ROWS) == 0, "the buffers take turns");
  static_assert(STAGES >= 3 && 2 * (STAGES + MULTIPLIERS * BUFFERS) * 8 <= 256, "a ring of stages");
  // Registers a thread of the copying and the multiplying warpgroups; together at most what they start with, a multiple of 8 each.
  static constexpr int COPIER_REGISTERS = MULTIPLIERS == 2 ? 40 : 56, MULTIPLIER_REGISTERS = MULTIPLIERS == 2 ? 232 : 152;
  static_assert(COPIER_REGISTERS + MULTIPLIERS * MULTIPLIER_REGISTERS <= (1 + MULTIPLIERS) * registers_at_start(THREADS),
                "or they wait for ever");
};

struct TileCursor {
  int m, n_cluster;
  __device__ __forceinline__ TileCursor(const WgmmaProblem& problem, int index) {
    const int group_tiles = kWgmmaGroupM * problem.clusters_n;
    const int group = index / group_tiles, in_group = index - group * group_tiles;
    const int rows = min(kWgmmaGroupM, problem.tiles_m - group * kWgmmaGroupM);
    n_cluster = in_group / rows;
    m = group * kWgmmaGroupM + in_group - n_cluster * rows;
  }
};

template <typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_wgmma_kernel(const __grid_constant__ WgmmaProblem problem,
                                                                      const __grid_constant__ CUtensorMap a_map,
                                                                      const __grid_constant__ CUtensorMap w_map,
                                                                      const __grid_constant__ CUtensorMap index_map,
                                                                      const __grid_constant__ CUtensorMap y_map) {
#ifdef QUEST_SM90A
  constexpr int BLOCK_M = Tile::BLOCK_M, CLUSTER = Tile::CLUSTER, STAGES = Tile::STAGES, BUFFERS = Tile::BUFFERS;
  using Piece = typename Tile::Piece;

  uint8_t* const shared = dynamic_shared();
  auto buffers = [&](int group) { return shared + STAGES * Tile::STAGE_BYTES + group * BUFFERS * Piece::BYTES; };
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(buffers(Tile::MULTIPLIERS));
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  StageRing<Tile> ring{shared, barriers, barriers + STAGES, problem.copied_bytes};
  auto written = [&](int group) { return barriers + 2 * STAGES + group * 2 * BUFFERS; };  // of each buffer: there is a piece
  auto free = [&](int group) { return written(group) + BUFFERS; };                        // it has been read

  const int warpgroup = warpgroup_index();
  const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int warp = warp_index(), lane = threadIdx.x % 32;
  // One lane of each warp, of whose barriers all lanes know the place (gemm_fixed.cuh).
  if (lane == 0) {
    constexpr int kWarps = Tile::THREADS / 32;
    const int first = 4 * warpgroup + warp;
    ring.init_barriers(first, kWarps);
#pragma unroll 1
    for (int i = first; i < Tile::MULTIPLIERS * 2 * BUFFERS; i += kWarps) {  // of each group those of `written`, then those of `free`
      barrier_init(&written(0)[i], i % (2 * BUFFERS) < BUFFERS ? kWarpgroup / 32 : 1);
    }
    if (first == 0) {
      prefetch_tensor_map(&a_map);
      prefetch_tensor_map(&w_map);
      if (problem.output.tensor_store) prefetch_tensor_map(&y_map);
    } else if (first == 1) {
      // The first boxes of w to the second cache, while barriers are made and the kernel before this one ends.
      const TileCursor at(problem, static_cast<int>(blockIdx.x) / CLUSTER);
      if (at.m == 0) {
#pragma unroll 1
        for (int i = 0; i < min(Tile::PREFETCHED_STEPS, problem.steps.k_tiles); ++i) {
          ring.prefetch(w_map, i, StepCursor(problem.steps), (at.n_cluster * CLUSTER + rank) * Tile::BLOCK_N);
        }
      }
    }
    barrier_init_fence();
  }
  __syncwarp();
  if constexpr (CLUSTER > 1) {
    cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
  wait_for_prerequisites();

  const int tiles = problem.tiles_m * problem.clusters_n;
  const int first_tile = static_cast<int>(blockIdx.x) / CLUSTER, tile_stride = static_cast<int>(gridDim.x) / CLUSTER;
  const Steps steps = problem.steps;

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (warp == 0 && lane == 0) {
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const TileCursor at(problem, tile);
        const int first_n = (at.n_cluster * CLUSTER + rank) * Tile::BLOCK_N;
        StepCursor step(steps);
        for (int i = 0; i < steps.count(); ++i) {
          ring.copy(a_map, w_map, index_map, step.k_tile, step, at.m * BLOCK_M, first_n, rank);
          step.advance();
        }
      }
    } else if (warp >= 1 && warp <= Tile::MULTIPLIERS && lane == 0 && problem.output.tensor_store) {
      const int group = warp - 1;
      uint32_t piece_parity = 0;
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const TileCursor at(problem, tile);
        const int first_n = (at.n_cluster * CLUSTER + rank) * Tile::BLOCK_N + group * kWarpgroupColumns;
        for (int row = 0; row < BLOCK_M; row += BUFFERS * Piece::ROWS, piece_parity ^= 1) {
#pragma unroll
          for (int buffer = 0; buffer < BUFFERS; ++buffer) {
            barrier_wait(&written(group)[buffer], piece_parity);
            tensor_store(&y_map, buffers(group) + buffer * Piece::BYTES, first_n, at.m * BLOCK_M + row + buffer * Piece::ROWS);
            bulk_commit();
            bulk_wait_read<0>();
            barrier_arrive(&free(group)[buffer]);
          }
        }
      }
    }
    __syncwarp();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = warpgroup - 1;
    RowFactors* const factors = row_factors + group * BLOCK_M;
    TileMultiplier<Tile> multiplier(ring, group);
    using Accumulator = typename Tile::Mma::Accumulator;
    Accumulator accumulators[BLOCK_M / 2];
    uint32_t piece_parity = 1;  // of the buffers: at first they are free
    for (int tile = first_tile; tile < tiles; tile += tile_stride) {
      const TileCursor at(problem, tile);
      const int first_m = at.m * BLOCK_M;
      const int first_n = (at.n_cluster * CLUSTER + rank) * Tile::BLOCK_N + group * kWarpgroupColumns;

      // The factors are loaded before the main loop and looked at after it: until then memory has time.
      const std::conditional_t<Tile::HAS_ROW_FACTORS, RowLoads<BLOCK_M>, NoRowLoads> row_loads(problem.output, first_m);
      const ColumnLoads column_loads(problem.output, first_n, /*adjacent=*/false);

      multiplier.multiply(accumulators, ring, problem, steps, 0);
      if (tile + tile_stride >= tiles) launch_dependents();

      if constexpr (Tile::HAS_ROW_FACTORS) {
        named_barrier(group_barrier(group), kWarpgroup);  // all have written what the old factors were for
        row_loads.store(problem.output, factors);
        named_barrier(group_barrier(group), kWarpgroup);
      }
      const ColumnFactors columns = column_loads.factors(problem.output);
      if (problem.output.tensor_store) {
#pragma unroll
        for (int row = 0; row < BLOCK_M; row += Piece::ROWS) {
          const int buffer = row / Piece::ROWS % BUFFERS;
          barrier_wait(&free(group)[buffer], piece_parity);
          write_piece<Piece>(problem.output, accumulators, row, factors, columns, buffers(group) + buffer * Piece::BYTES);
          async_proxy_fence();
          __syncwarp();
          if (lane == 0) barrier_arrive(&written(group)[buffer]);
          if (buffer + 1 == BUFFERS) piece_parity ^= 1;
        }
      } else {
#pragma unroll
        for (int j = 0; j < BLOCK_M / 8; ++j) {
          const Accumulator four[4] = {accumulators[4 * j], accumulators[4 * j + 1], accumulators[4 * j + 2], accumulators[4 * j + 3]};
          store_group(problem.output, four, factors + 8 * j, columns, first_m + 8 * j, first_n, /*adjacent=*/false);
        }
      }
    }
    if (CLUSTER > 1 && group == 0 && warp == 0 && lane == 0) {
      // This block does not end before the other one's last arrivals at its barriers, as if it copied once more to every stage. All copies
      // have been multiplied here, so no stage is more than one arrival behind. (Code behind the copier's loop costs it its uniform
      // registers, and a barrier of the cluster is a fence of the whole GPU.)
      for (int i = 0; i < STAGES; ++i) {
        barrier_wait(&ring.empty[ring.stage], ring.parity ^ 1);
        ring.advance();
      }
    }
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

}  // namespace quest::cuda
