// The product of bits on Hopper for rows of a that fit in shared memory: they stay there while w streams past.
//
// Tiles of bits are short: at K = 4096 the tensor cores need 2048 cycles for 64 x 256 of y, the epilogue as many, and a kernel that loads
// both operands for each tile waits for the L2 cache besides. So a thread block keeps BLOCK_M whole rows of a (all planes), walks along the
// columns of y, and reads 64 rows of w for each tile. Its two multiplying warpgroups take turns: while one multiplies, alone, the other
// writes the y it has made. Both operands come straight from shared memory.
//
// Tiles are numbered along the columns, then down the rows; a block takes a contiguous range of them and loads the next rows when the range
// crosses a boundary. A chunk is 128 bytes (1024 bits) of each row of a, a stage of the ring as much of 64 rows of w.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/steps.cuh"
#include "common/wgmma_epilogue.cuh"

namespace quest::cuda {

struct StationaryProblem {
  TileOutput output;
  Steps steps;
  int32_t tiles_n;
  int64_t tiles;
  int32_t stages;
};

template <int BLOCK_M_>
struct StationaryTile {
  static constexpr int BLOCK_M = BLOCK_M_;
  static constexpr int THREADS = (1 + kMultipliers) * kWarpgroup;
  static constexpr int ROW_BYTES = 128;  // of a chunk and a stage: what the 128-byte swizzle covers
  static constexpr int INSTRUCTIONS = ROW_BYTES / 32;
  static constexpr int CHUNK_BYTES = BLOCK_M * ROW_BYTES, STAGE_BYTES = kWarpgroupColumns * ROW_BYTES;
  using Piece = Pieces<BLOCK_M, 2>;
  static constexpr int STORES_BYTES = kMultipliers * Piece::BUFFERS * Piece::BYTES;
  static constexpr int FACTORS_BYTES = kMultipliers * BLOCK_M * static_cast<int>(sizeof(RowFactors));
  static constexpr int MOST_CHUNKS = 16, MOST_STAGES = 16;
  static constexpr int OTHER_BYTES = STORES_BYTES + FACTORS_BYTES + 2 * (MOST_CHUNKS + MOST_STAGES) * 8;
  static constexpr int FEWEST_STAGES = 3;
  static constexpr int COPIER_REGISTERS = 40, MULTIPLIER_REGISTERS = 232;

  static constexpr int64_t chunks(int64_t row_bytes, int planes) { return planes * ((row_bytes + ROW_BYTES - 1) / ROW_BYTES); }
  static int64_t stages(int64_t chunks, int64_t shared_bytes) {
    return std::min<int64_t>((shared_bytes - OTHER_BYTES - chunks * CHUNK_BYTES) / STAGE_BYTES, MOST_STAGES);
  }
};

template <typename Mma, typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_stationary_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                           const __grid_constant__ CUtensorMap w_map,
                                                                           const __grid_constant__ CUtensorMap y_map,
                                                                           const __grid_constant__ StationaryProblem problem) {
#ifdef QUEST_SM90A
  const Steps steps = problem.steps;
  const int chunks = steps.k_tiles * steps.a_planes, stages = problem.stages, count = steps.count();
  uint8_t* const shared = dynamic_shared();
  auto a_chunk = [&](const StepCursor& step) { return step.a_plane * steps.k_tiles + step.k_tile; };
  auto a_tile = [&](int chunk) { return shared + chunk * Tile::CHUNK_BYTES; };
  auto w_tile = [&](int stage) { return shared + chunks * Tile::CHUNK_BYTES + stage * Tile::STAGE_BYTES; };
  uint8_t* const store_buffers = w_tile(stages);
  RowFactors* const row_factors = reinterpret_cast<RowFactors*>(store_buffers + Tile::STORES_BYTES);
  uint64_t* const rows_full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(row_factors) + Tile::FACTORS_BYTES);
  uint64_t* const rows_empty = rows_full + Tile::MOST_CHUNKS;
  uint64_t* const full = rows_empty + Tile::MOST_CHUNKS;
  uint64_t* const empty = full + Tile::MOST_STAGES;

  constexpr int kWarps = kWarpgroup / 32;
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_init(&rows_full[chunk], 1);
      barrier_init(&rows_empty[chunk], kMultipliers * kWarps);
    }
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kWarps);  // of the warpgroup whose tile it belongs to
    }
    barrier_init_fence();
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&w_map);
    if (problem.output.tensor_store) prefetch_tensor_map(&y_map);
  }
  __syncthreads();
  // From here on memory is touched: what was launched before must have ended. What comes after may start to start.
  dependents_may_launch();
  wait_for_prerequisites();

  const int64_t first_tile = problem.tiles * blockIdx.x / gridDim.x, last_tile = problem.tiles * (blockIdx.x + 1) / gridDim.x;
  const int first_row_tile = static_cast<int>(first_tile / problem.tiles_n);
  int stage = 0;
  uint32_t parity = 0;
  auto skip_stages = [&](int some) {
    stage += some;
    while (stage >= stages) stage -= stages, parity ^= 1;
  };

  if (threadIdx.x < kWarpgroup) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      int row_tile = first_row_tile, n_tile = static_cast<int>(first_tile - int64_t{row_tile} * problem.tiles_n);
      bool fresh = true;  // the rows are not there
      uint32_t rows_parity = 0;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        StepCursor step(steps);
        for (int i = 0; i < count; ++i) {
          // The first pair of each plane of a is that with the highest plane of w.
          if (fresh && step.w_plane == steps.w_planes - 1) {
            const int chunk = a_chunk(step);
            barrier_wait(&rows_empty[chunk], rows_parity ^ 1);
            barrier_expect(&rows_full[chunk], Tile::CHUNK_BYTES);
            tensor_load<false>(a_tile(chunk), &a_map, &rows_full[chunk], step.k_tile * Tile::ROW_BYTES, row_tile * Tile::BLOCK_M,
                               step.a_plane, 0);
          }
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], Tile::STAGE_BYTES);
          tensor_load<false>(w_tile(stage), &w_map, &full[stage], step.k_tile * Tile::ROW_BYTES, n_tile * kWarpgroupColumns, step.w_plane,
                             0);
          step.advance();
          skip_stages(1);
        }
        fresh = false;
        if (++n_tile == problem.tiles_n) n_tile = 0, ++row_tile, fresh = true, rows_parity ^= 1;
      }
    }
    __syncwarp();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = threadIdx.x / kWarpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
    RowFactors* const factors = row_factors + group * Tile::BLOCK_M;
    uint8_t* const buffers = store_buffers + group * Tile::Piece::BUFFERS * Tile::Piece::BYTES;
    const int last_row_tile = static_cast<int>((last_tile - 1) / problem.tiles_n);
    int row_tile = first_row_tile;  // whose rows this warpgroup has not given back
    auto rows_parity = [&] { return static_cast<uint32_t>(row_tile - first_row_tile) & 1; };
    auto give_back_rows_before = [&](int next) {
      for (; row_tile < next; ++row_tile) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
          barrier_wait(&rows_full[chunk], rows_parity());
          if (lane == 0) barrier_arrive(&rows_empty[chunk]);
        }
      }
    };

    int32_t accumulators[Tile::BLOCK_M / 2];
    if (group != 0) skip_stages(count);
    int64_t tile = first_tile + group;
    if (tile < last_tile) give_back_rows_before(static_cast<int>(tile / problem.tiles_n));
    for (; tile < last_tile; tile += kMultipliers) {
      const int first_m = row_tile * Tile::BLOCK_M;
      const int first_n = static_cast<int>(tile - int64_t{row_tile} * problem.tiles_n) * kWarpgroupColumns;
      const RowLoads<Tile::BLOCK_M> row_loads(problem.output, first_m);
      const ColumnLoads column_loads(problem.output, first_n);

      // The other warpgroup has started the last products of the tile before, and all warps of this one have left their last epilogue.
      if (tile != first_tile) named_barrier(turn_barrier(group), kMultipliers * kWarpgroup);
      StepCursor step(steps);
      int previous = 0;
      for (int i = 0; i < count; ++i) {
        const int chunk = a_chunk(step);
        barrier_wait(&rows_full[chunk], rows_parity());
        barrier_wait(&full[stage], parity);
        const uint64_t w_descriptor = swizzled_tile(w_tile(stage)), a_descriptor = swizzled_tile(a_tile(chunk));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < Tile::INSTRUCTIONS; ++j) Mma::mma(accumulators, w_descriptor + 2 * j, a_descriptor + 2 * j, (i | j) != 0);
        wgmma_commit();
        if (i > 0) {
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(&empty[previous]);
        }
        previous = stage;
        skip_stages(1);
        if (step.advance()) {
          wgmma_wait<0>();
          wgmma_owned(accumulators);
#pragma unroll
          for (int32_t& accumulator : accumulators) accumulator *= 2;
        }
      }
      if (tile + 1 < last_tile) named_barrier_arrive(turn_barrier(1 - group), kMultipliers * kWarpgroup);
      wgmma_wait<0>();
      wgmma_owned(accumulators);
      if (lane == 0) barrier_arrive(&empty[previous]);
      skip_stages(count);  // the other warpgroup's tile
      const int64_t next = tile + kMultipliers;
      give_back_rows_before(next < last_tile ? static_cast<int>(next / problem.tiles_n) : last_row_tile);

      row_loads.store(problem.output, factors);
      store_tile<typename Tile::Piece, true>(problem.output, accumulators, factors, column_loads.factors(problem.output), buffers, &y_map,
                                             first_m, first_n, group);
    }
    if (thread == 0) bulk_wait_read<0>();
    __syncwarp();
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

// Planes of a and w.
template <typename Mma, typename Tile>
void launch_stationary(const char* op, const Operand& a, const Operand& w, const IntegerEpilogue& epilogue, int64_t k, const Device& device,
                       cudaStream_t stream) {
  const int64_t m = epilogue.output.m, n = epilogue.output.n, row_bytes = plane_row_bytes(k);
  const int64_t chunks = Tile::chunks(row_bytes, a.grid.bits), stages = Tile::stages(chunks, device.shared_bytes);
  check(chunks <= Tile::MOST_CHUNKS && stages >= Tile::FEWEST_STAGES, op, ": rows of ", k, " elements do not fit in shared memory");
  constexpr int64_t kMost = INT32_MAX - 256;  // room for the rows and columns of the last tile that y does not have
  check(m <= kMost && n <= kMost, op, ": expected m, n <= ", kMost, ", got ", m, ", ", n, "; split the rows");
  StationaryProblem problem{};
  problem.output = {epilogue, 1.0f, true, false};
  problem.steps = {static_cast<int>((row_bytes + Tile::ROW_BYTES - 1) / Tile::ROW_BYTES), a.grid.bits, w.grid.bits};
  problem.tiles_n = static_cast<int32_t>((n + kWarpgroupColumns - 1) / kWarpgroupColumns);
  problem.tiles = problem.tiles_n * ((m + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  problem.stages = static_cast<int32_t>(stages);
  auto map = [&](const Operand& operand, int64_t rows, uint32_t box_rows) {
    return tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, operand.data, row_bytes, rows, operand.grid.bits, row_bytes,
                      {Tile::ROW_BYTES, box_rows, CU_TENSOR_MAP_SWIZZLE_128B});
  };
  const CUtensorMap a_map = map(a, m, Tile::BLOCK_M), w_map = map(w, n, kWarpgroupColumns);
  const CUtensorMap y_map = output_map(op, problem.output, Tile::Piece::ROWS);
  const int64_t shared_bytes = chunks * Tile::CHUNK_BYTES + stages * Tile::STAGE_BYTES + Tile::OTHER_BYTES;
  const int64_t blocks = std::min<int64_t>(problem.tiles, device.sm_count);
  launch_with({1, device.hopper_code}, op, gemm_stationary_kernel<Mma, Tile>, dim3(static_cast<unsigned>(blocks)), dim3(Tile::THREADS),
              static_cast<size_t>(shared_bytes), stream, a_map, w_map, y_map, problem);
}

}  // namespace quest::cuda
