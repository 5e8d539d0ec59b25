// The product of integers on Hopper's wgmma: y[BLOCK_M, 128] per step of a persistent thread block.
//
// Split of the work. Warpgroup 0 starts copies (TMA, a ring of stages); warpgroups 1 and 2 multiply, 64 rows of w each, and write y. The
// weight is the left operand of the instruction and goes through registers, so that it can lie in memory in any width: 4-bit codes are
// widened there, at 64 bytes of shared memory for 128 columns. The activation is the right operand, straight from shared memory: its
// BLOCK_M rows are the instruction's N, which may be small. The accumulators hold y transposed; stmatrix turns it on its way to the copy
// engine. A stage holds 128 bytes of every row of a: 128 int8 or 1024 bits.
//
// Clusters, two kinds. Large products: the blocks of a cluster take neighbouring columns of y and the same rows, and each copies its share
// of a to all of them. Small products (SPLIT), whose tiles are fewer than the multiprocessors: the blocks share one tile along K, and each
// adds up the integers of all of them for its share of the rows, from their shared memory: no workspace, no second launch, the same bits in
// any order.
//
// Bit planes: one pass over K for each pair of planes (steps.cuh).
//
// 4:8 sparse weights: a product of 64 columns takes the time of one of 32, and reads 128 bytes of a a cycle, all that shared memory gives.
// What copies write comes on top of that, so the tensor cores work in 60 to 67 % of the cycles, at 1.55 GHz: out of power too.
//
// What bounds it (H200): power, before anything else. Where the operands are codes, which are never negative, the tensor cores work in 85
// to 90 % of the cycles at 1.78 GHz; with signed values of the same grid the clock falls to 1.60 GHz. What is left: the epilogue, of 4 to 6
// instructions a value, about 3000 cycles a tile, and waiting for copies. CHANGELOG has what was tried.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/matrix_map.h"
#include "common/steps.cuh"
#include "common/wgmma_epilogue.cuh"
#include "common/wgmma_products.h"

namespace quest::cuda {

inline constexpr int kWgmmaThreads = (1 + kMultipliers) * kWarpgroup;
inline constexpr int kWgmmaN = kWarpgroupColumns * kMultipliers;  // rows of w a block
inline constexpr int kStageRowBytes = 128;                        // of a: what the 128-byte swizzle covers
// Neighbouring tiles: 8 down y, then the next columns, so that both operands of a wave stay in the L2 cache.
inline constexpr int kWgmmaGroupM = 8;
inline constexpr int kMaxSplit = 4;  // blocks that share a tile along K: 8 took longer than their shorter loops saved

struct WgmmaProblem {
  TileOutput output;
  Steps steps;
  int32_t tiles_m, clusters_n;    // of BLOCK_M rows of y, of CLUSTER * 128 columns
  int32_t split;                  // blocks that share a tile along K
  uint32_t flip;                  // ByteFragments
  uint4 table;                    // WidenByTable
  uint32_t value_mul, value_add;  // SparseFragments: v + 128, four bytes, of four codes
};

// ---- the weight, from a tile of 64 rows a warpgroup in shared memory to the words of the instruction. `offset`: of this lane's bytes in
// the tile; the copy engine's swizzle turns the step to the next 32 columns into an exclusive or. A stage's words are loaded for all its
// instructions.

// One byte an integer (flip: 0x80808080 makes c - 128 of 8-bit codes), or 8 bits of a plane.
struct ByteFragments {
  static constexpr int kRowBytes = kStageRowBytes, kIndexBytes = 0, kInstructions = 4;
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row & 7)) * 16;
  }
  static __device__ __forceinline__ void load(uint32_t (&words)[kInstructions][4], uint32_t address, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
      ldmatrix_x4(words[i], address ^ i * 32);
#pragma unroll
      for (uint32_t& word : words[i]) word ^= problem.flip;
    }
  }
};

// Two 4-bit codes a byte. WIDEN: the 4 codes in the low half of a word to 4 bytes.
template <typename Widen>
struct NibbleFragments {
  static constexpr int kRowBytes = kStageRowBytes / 2, kIndexBytes = 0, kInstructions = 4;
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    return row * kRowBytes + (row >> 1 & 3) * 16 + lane % 4 * 2;  // the same swizzle for row + 8
  }
  static __device__ __forceinline__ void load(uint32_t (&words)[kInstructions][4], uint32_t address, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
      const uint32_t piece = address ^ i * 16;
      words[i][0] = Widen::widen(load_shared_16(piece), problem);
      words[i][1] = Widen::widen(load_shared_16(piece + 8 * kRowBytes), problem);
      words[i][2] = Widen::widen(load_shared_16(piece + 8), problem);
      words[i][3] = Widen::widen(load_shared_16(piece + 8 * kRowBytes + 8), problem);
    }
  }
};

// The codes themselves: each byte doubled, then the low nibble of one copy and the high nibble of the other.
struct WidenCodes {
  static __device__ __forceinline__ uint32_t widen(uint32_t codes, const WgmmaProblem&) {
    const uint32_t doubled = __byte_perm(codes, 0, 0x1100);
    return ((doubled & 0x00FF00FFu) | (doubled >> 4 & 0xFF00FF00u)) & 0x0F0F0F0Fu;
  }
};

// Values by table, for grids whose values are no affine function of the code.
struct WidenByTable {
  static __device__ __forceinline__ uint32_t widen(uint32_t codes, const WgmmaProblem& problem) {
    return look_up_nibbles(problem.table, codes);
  }
};

// The kept codes of a 4:8 sparse weight, and behind their tile the pair indices: 16 bytes of every row, the copy engine's least, of which a
// stage needs the first or the last 8.
//
// With a in the order of kEvenOdd each half of 64 columns has one value of every pair, so that two kept pairs of four are two kept values
// of four, and the index of 64 columns is the instruction's metadata as it is, for both halves. A word of a row holds 8 codes, of the pairs
// of two groups: its even nibbles are in the first half, its odd ones in the second.
struct SparseFragments {
  static constexpr int kRowBytes = kStageRowBytes / 4, kIndexBytes = 16, kInstructions = 2;
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row >> 2 & 1)) * 16;
  }
  static __device__ __forceinline__ uint32_t index_offset(int first_row) {
    const int lane = threadIdx.x % 32;
    return kWgmmaN * kRowBytes + (first_row + lane / 4 + lane % 2 * 8) * kIndexBytes;
  }
  // The words' products have been waited for.
  static __device__ __forceinline__ void load(uint32_t (&words)[kInstructions][5], uint32_t address, uint32_t index_address,
                                              const WgmmaProblem& problem) {
    uint32_t codes[2 * kInstructions];  // of row g and row g + 8 for each instruction
    ldmatrix_x4(codes, address);
    const uint2 index = load_shared_64(index_address);
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        words[i][row] = value(codes[2 * i + row] & 0x0F0F0F0Fu, problem);
        words[i][2 + row] = value(codes[2 * i + row] >> 4 & 0x0F0F0F0Fu, problem);
      }
    }
    replace_metadata(words[0][4], index.x, problem.value_mul);
    replace_metadata(words[1][4], index.y, problem.value_mul);
  }

 private:
  // 4 codes to mul c + add; v + 128 carries nothing from byte to byte.
  static __device__ __forceinline__ uint32_t value(uint32_t four, const WgmmaProblem& problem) {
    return (four * problem.value_mul + problem.value_add) ^ 0x80808080u;
  }
};

// ---- the tile

template <typename Mma_, typename Fragments_, int BLOCK_M_, int CLUSTER_, bool SPLIT_ = false>
struct WgmmaTile {
  using Mma = Mma_;
  using Fragments = Fragments_;
  static constexpr int BLOCK_M = BLOCK_M_, CLUSTER = CLUSTER_;
  static constexpr bool SPLIT = SPLIT_;
  static_assert(!SPLIT || CLUSTER == 1, "a cluster shares rows of y, or K");
  // Blocks a multiprocessor: two where tiles are small, so that one starts while the other ends.
  static constexpr int BLOCKS = SPLIT ? 2 : 1;
  static constexpr int W_BYTES = kWgmmaN * (Fragments::kRowBytes + Fragments::kIndexBytes), A_BYTES = BLOCK_M * kStageRowBytes;
  static constexpr int STAGE_BYTES = W_BYTES + A_BYTES;
  // Buffers of pieces of y: with bits, whose tiles take 4 stages, one for each, so that none waits; else fewer, to keep 4 stages of
  // nibbles, and 5 of sparse ones.
  using Piece = Pieces<BLOCK_M, Mma::kPlanes ? 4 : Fragments::kRowBytes == kStageRowBytes / 2 ? 3 : 2>;
  static constexpr int STORES_BYTES = kMultipliers * Piece::BUFFERS * Piece::BYTES;
  static constexpr int FACTORS_BYTES = kMultipliers * BLOCK_M * static_cast<int>(sizeof(RowFactors));
  static constexpr int OTHER_BYTES = STORES_BYTES + FACTORS_BYTES + 256;  // 256: the mbarriers
  // 1024 of each block are the system's.
  static constexpr int STAGES = std::min((228 * 1024 / BLOCKS - 1024 - OTHER_BYTES) / STAGE_BYTES, 16);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + OTHER_BYTES;
  static_assert(STAGES >= 3 && 2 * STAGES * 8 <= 256, "a ring of stages");
  // Registers a thread of the copying and the multiplying warpgroups; together at most what the three start with, a multiple of 8 each.
  static constexpr int COPIER_REGISTERS = BLOCKS == 1 ? 40 : 32, MULTIPLIER_REGISTERS = BLOCKS == 1 ? 232 : 104;
  static_assert(COPIER_REGISTERS + kMultipliers * MULTIPLIER_REGISTERS <= 3 * (65536 / (kWgmmaThreads * BLOCKS) / 8 * 8),
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

// ---- the kernel

template <typename Tile>
__global__ __launch_bounds__(kWgmmaThreads, Tile::BLOCKS) void gemm_wgmma_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                                 const __grid_constant__ CUtensorMap w_map,
                                                                                 const __grid_constant__ CUtensorMap index_map,
                                                                                 const __grid_constant__ CUtensorMap y_map,
                                                                                 const __grid_constant__ WgmmaProblem problem) {
#ifdef QUEST_SM90A
  constexpr int BLOCK_M = Tile::BLOCK_M, CLUSTER = Tile::CLUSTER, STAGES = Tile::STAGES;
  using Fragments = typename Tile::Fragments;

  uint8_t* const shared = dynamic_shared();
  auto w_tile = [&](int stage) { return shared + stage * Tile::STAGE_BYTES; };
  auto a_tile = [&](int stage) { return w_tile(stage) + Tile::W_BYTES; };
  uint8_t* const store_buffers = shared + STAGES * Tile::STAGE_BYTES;
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(store_buffers + Tile::STORES_BYTES);
  uint64_t* const full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  uint64_t* const empty = full + STAGES;

  const int warpgroup = warpgroup_index();
  constexpr bool kCluster = CLUSTER > 1 || Tile::SPLIT;
  const int cluster_blocks = Tile::SPLIT ? problem.split : CLUSTER;
  const int rank = kCluster ? static_cast<int>(cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&full[stage], 1);                                          // the copier, and the bytes
      barrier_init(&empty[stage], CLUSTER * kMultipliers * kWarpgroup / 32);  // every multiplying warp that reads what this block copies
    }
    barrier_init_fence();
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&w_map);
    if (problem.output.tensor_store) prefetch_tensor_map(&y_map);
  }
  if constexpr (kCluster) {
    cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
  // From here on memory is touched: what was launched before must have ended. What comes after may start to start.
  dependents_may_launch();
  wait_for_prerequisites();

  const int tiles = problem.tiles_m * problem.clusters_n;
  const int first_tile = static_cast<int>(blockIdx.x) / cluster_blocks, tile_stride = static_cast<int>(gridDim.x) / cluster_blocks;
  Steps steps = problem.steps;
  int first_k_tile = 0;
  if constexpr (Tile::SPLIT) {
    first_k_tile = rank * steps.k_tiles / cluster_blocks;
    steps.k_tiles = (rank + 1) * steps.k_tiles / cluster_blocks - first_k_tile;
  }
  const int column_rank = Tile::SPLIT ? 0 : rank;  // which of the cluster's columns of y are this block's
  const int count = steps.count();
  int stage = 0;
  uint32_t parity = 0;
  auto next_stage = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      constexpr int kShare = BLOCK_M / CLUSTER;
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const TileCursor at(problem, tile);
        const int first_m = at.m * BLOCK_M + column_rank * kShare;
        const int first_n = (at.n_cluster * CLUSTER + column_rank) * kWgmmaN;
        StepCursor step(steps);
        for (int i = 0; i < count; ++i) {
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], Tile::STAGE_BYTES);
          const int k_tile = first_k_tile + step.k_tile;
          tensor_load<false>(w_tile(stage), &w_map, &full[stage], k_tile * Fragments::kRowBytes, first_n, step.w_plane, 0);
          if constexpr (Fragments::kIndexBytes > 0) {
            tensor_load<false>(w_tile(stage) + kWgmmaN * Fragments::kRowBytes, &index_map, &full[stage],
                               k_tile / 2 * Fragments::kIndexBytes, first_n, 0, 0);
          }
          tensor_load<(CLUSTER > 1)>(a_tile(stage) + column_rank * kShare * kStageRowBytes, &a_map, &full[stage], k_tile * kStageRowBytes,
                                     first_m, step.a_plane, (1 << CLUSTER) - 1);
          step.advance();
          next_stage();
        }
      }
    }
    __syncwarp();
    if constexpr (Tile::SPLIT) cluster_sync();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = threadIdx.x % 32;
    const uint32_t fragment_offset = shared_address(shared) + Fragments::offset(group * 64 + warp * 16);
    uint32_t index_offset = 0;
    if constexpr (Fragments::kIndexBytes > 0) index_offset = shared_address(shared) + Fragments::index_offset(group * 64 + warp * 16);
    RowFactors* const factors = row_factors + group * BLOCK_M;
    uint8_t* const buffers = store_buffers + group * Tile::Piece::BUFFERS * Tile::Piece::BYTES;
    // A stage goes back to every block that copies to it.
    auto release = [&](int s) {
      if (lane < CLUSTER) barrier_arrive(&empty[s], Tile::SPLIT ? rank : lane);
    };

    // Of step i, whose stage the ring is at.
    constexpr bool kSparse = Fragments::kIndexBytes > 0;
    auto load_words = [&](auto& words, int i) {
      const uint32_t address = fragment_offset + stage * Tile::STAGE_BYTES;
      if constexpr (kSparse) {
        const int half = (first_k_tile + i) % 2 * (Fragments::kIndexBytes / 2);
        Fragments::load(words, address, index_offset + stage * Tile::STAGE_BYTES + half, problem);
      } else {
        Fragments::load(words, address, problem);
      }
    };

    int32_t accumulators[BLOCK_M / 2];
    constexpr int kInstructions = Fragments::kInstructions, kWords = Tile::Mma::kWords;
    uint32_t even[kInstructions][kWords], odd[kInstructions][kWords];
    if constexpr (kSparse) even[0][4] = even[1][4] = odd[0][4] = odd[1][4] = 0;
    for (int tile = first_tile; tile < tiles; tile += tile_stride) {
      const TileCursor at(problem, tile);
      const int first_m = at.m * BLOCK_M;
      const int first_n = (at.n_cluster * CLUSTER + column_rank) * kWgmmaN + group * 64;

      const RowLoads<BLOCK_M> row_loads(problem.output, first_m);
      const ColumnLoads column_loads(problem.output, first_n);

      barrier_wait(&full[stage], parity);
      load_words(even, 0);
      StepCursor cursor(steps);
      // The products of the stage whose words are in `now`; meanwhile the words of the next stage are loaded.
      auto multiply_stage = [&](int i, const uint32_t(&now)[kInstructions][kWords], uint32_t(&next)[kInstructions][kWords]) {
        const uint64_t b_tile = swizzled_tile(a_tile(stage));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kInstructions; ++j) {
          Tile::Mma::mma(accumulators, now[j], b_tile + j * (Tile::Mma::kBytes / 16), (i | j) != 0);
        }
        wgmma_commit();
        const int previous = (stage == 0 ? STAGES : stage) - 1;
        wgmma_wait<1>();  // the products before these, which used `next`
        if (i > 0) release(previous);
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
      for (int i = 0; i < count; i += 2) {
        multiply_stage(i, even, odd);
        if (i + 1 < count) multiply_stage(i + 1, odd, even);
      }
      wgmma_wait<0>();
      wgmma_owned(accumulators);
      release(stage);
      next_stage();

      if constexpr (Tile::SPLIT) {
        // Every block of the cluster adds up its share of the tile, whole groups of 8 rows. Once both warpgroups are here all copies have
        // landed and been read: the ring now holds this block's integers, word i of every thread side by side. (A loop over what lies in
        // memory, since every instruction of a kernel this short is one that has to be fetched.)
        constexpr int kStride = kMultipliers * kWarpgroup;
        const int groups = min(BLOCK_M / 8, (static_cast<int>(problem.output.epilogue.output.m) - first_m + 7) / 8);
        const int share = (groups + cluster_blocks - 1) / cluster_blocks, first_group = rank * share;
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
            if (block >= cluster_blocks) break;
            const uint32_t theirs = cluster_address(words, block) + j * 4 * kStride * 4;
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[c] += load_cluster_32(theirs + c * kStride * 4);
          }
          store_group(problem.output, sums, factors, columns, first_m, first_n, j);
        }
      } else {
        // The warps of this group are done with the factors of the tile before: known already where the loop is longer than the ring, but
        // not to racecheck.
        named_barrier(group_barrier(group), kWarpgroup);
        row_loads.store(problem.output, factors);
        store_tile<typename Tile::Piece>(problem.output, accumulators, factors, column_loads.factors(problem.output), buffers, &y_map,
                                         first_m, first_n, group);
      }
    }
    if (thread == 0) bulk_wait_read<0>();
    __syncwarp();
  }
  // No block ends while another may still copy to it, arrive at its barriers or read its integers.
  if constexpr (kCluster) cluster_sync();
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

template <typename Tile>
void launch_wgmma_tile(const char* op, const Operand& a, const Operand& w, WgmmaProblem problem, int64_t k, int split, const Device& device,
                       cudaStream_t stream) {
  const Output& output = problem.output.epilogue.output;
  const int64_t m = output.m, n = output.n;
  const bool planes = w.layout == Layout::kPlanes;
  const int64_t a_row_bytes = row_bytes(a.layout, k), w_row_bytes = row_bytes(w.layout, w.index != nullptr ? k / 2 : k);
  problem.steps = {static_cast<int>((a_row_bytes + kStageRowBytes - 1) / kStageRowBytes), planes ? a.grid.bits : 1,
                   planes ? w.grid.bits : 1};
  const int64_t tiles_m = (m + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  const int64_t clusters_n = (n + Tile::CLUSTER * kWgmmaN - 1) / (Tile::CLUSTER * kWgmmaN);
  // Room for the rows of the last tile that y does not have.
  constexpr int64_t kMostRows = INT32_MAX - 256;
  check(m <= kMostRows && n <= kMostRows && tiles_m * clusters_n <= INT32_MAX, op, ": expected m, n <= ", kMostRows, ", got ", m, ", ", n,
        "; split the rows");
  check(!problem.output.epilogue.a.sums_values && !problem.output.epilogue.w.sums_values, op, ": this kernel sums no values");
  problem.tiles_m = static_cast<int32_t>(tiles_m);
  problem.clusters_n = static_cast<int32_t>(clusters_n);

  constexpr int kRowBytes = Tile::Fragments::kRowBytes;
  constexpr CUtensorMapSwizzle w_swizzle = kRowBytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                           : kRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                             : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUtensorMap a_map = matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.data, a_row_bytes, m, problem.steps.a_planes, a_row_bytes,
                                       {kStageRowBytes, static_cast<uint32_t>(Tile::BLOCK_M / Tile::CLUSTER), CU_TENSOR_MAP_SWIZZLE_128B});
  const CUtensorMap w_map = matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.data, w_row_bytes, n, problem.steps.w_planes, w_row_bytes,
                                       {static_cast<uint32_t>(kRowBytes), kWgmmaN, w_swizzle});
  CUtensorMap index_map = w_map;  // of no use to a dense weight
  if constexpr (Tile::Fragments::kIndexBytes > 0) {
    index_map = matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.index, index_row_bytes(k), n, 1, index_row_bytes(k),
                           {Tile::Fragments::kIndexBytes, kWgmmaN, CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  const CUtensorMap y_map = output_map(op, problem.output, Tile::Piece::ROWS);

  // A split tile belongs to one cluster; other blocks stay and take tile after tile.
  problem.split = Tile::SPLIT ? std::min(split, problem.steps.k_tiles) : 1;
  const int cluster = Tile::SPLIT ? problem.split : Tile::CLUSTER;
  const int64_t tiles = tiles_m * clusters_n;
  const int64_t clusters = Tile::SPLIT ? tiles : std::min<int64_t>(tiles, std::max(1, device.sm_count / Tile::CLUSTER));
  check(clusters * cluster <= INT32_MAX, op, ": expected at most ", INT32_MAX, " thread blocks; split the rows");
  launch_with({cluster, device.hopper_code}, op, gemm_wgmma_kernel<Tile>, dim3(static_cast<unsigned>(clusters * cluster)),
              dim3(kWgmmaThreads), Tile::SHARED_BYTES, stream, a_map, w_map, index_map, y_map, problem);
}

// Whether this GPU has the code, and the copy engine can read both operands: rows that start at multiples of 16 bytes.
inline bool takes_wgmma(const Operand& a, const Operand& w, int64_t k, const Device& device) {
  return device.hopper_code && k > 0 && is_aligned(a.data, 16) && is_aligned(w.data, 16) && row_bytes(a.layout, k) % 16 == 0 &&
         row_bytes(w.layout, k) % 16 == 0;
}

// The tile of the plan.
template <typename Mma, typename Fragments>
void launch_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const WgmmaProblem& problem, int64_t k,
                  const Device& device, cudaStream_t stream) {
  constexpr int kLargeCluster = 2;
  const bool large = tile.block_m == 256;
  check(tile.wgmma && tile.cluster == (large ? kLargeCluster : 1) && tile.split_k <= kMaxSplit, op, ": no kernel for the planned tile ",
        tile.kernel, " with clusters of ", tile.cluster, " and split ", tile.split_k);
  auto run = [&](auto shape) { launch_wgmma_tile<decltype(shape)>(op, a, w, problem, k, tile.split_k, device, stream); };
  switch (tile.block_m) {
    case 256: run(WgmmaTile<Mma, Fragments, 256, kLargeCluster>{}); break;
    case 128: run(WgmmaTile<Mma, Fragments, 128, 1>{}); break;
    case 64: run(WgmmaTile<Mma, Fragments, 64, 1, true>{}); break;
    case 16:
      // Others have the kernel for few rows.
      if constexpr (Mma::kPlanes || Fragments::kIndexBytes > 0) return run(WgmmaTile<Mma, Fragments, 16, 1, true>{});
      [[fallthrough]];
    default: check(false, op, ": no kernel for the planned tile ", tile.kernel);
  }
}

}  // namespace quest::cuda
