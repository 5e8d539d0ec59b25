// The product of 1-bit operands on Hopper for rows of w that fit in shared memory: they stay there while a streams past.
//
// Tiles of bits are short: at K = 4096 the tensor cores need 2048 cycles for 64 x 256 of y, the epilogue as many, and a kernel that loads
// both operands for each tile waits for the L2 cache besides. So a thread block keeps BLOCK_N whole rows of w, walks down the rows of y,
// and reads 64 rows of a for each tile. Its two multiplying warpgroups take turns: while one multiplies, alone, the other writes the y it
// has made. Both operands come straight from shared memory. Rows of y belong to one warp each, so no warp waits for another in the
// epilogue.
//
// Tiles are numbered down the rows, then along the columns; a block takes a contiguous range of them and loads the next rows of w when the
// range crosses a boundary. A chunk is 128 bytes (1024 bits) of each row of w, a stage of the ring as much of 64 rows of a.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/wgmma_epilogue.cuh"

namespace quest::cuda {

struct StationaryProblem {
  TileOutput output;
  int32_t tiles_m;
  int64_t tiles;
  int32_t chunks, stages;
};

// BUFFERS: pieces of 16 x 64 of y that a warp has on their way.
template <int BLOCK_N_, int BUFFERS_>
struct StationaryTile {
  static constexpr int BLOCK_M = 64, BLOCK_N = BLOCK_N_, BUFFERS = BUFFERS_;
  static constexpr int THREADS = (1 + kMultipliers) * kWarpgroup, WARPS = kWarpgroup / 32;
  static constexpr int ROW_BYTES = 128;  // of a chunk and a stage: what the 128-byte swizzle covers
  static constexpr int INSTRUCTIONS = ROW_BYTES / 32;
  static constexpr int CHUNK_BYTES = BLOCK_N * ROW_BYTES, STAGE_BYTES = BLOCK_M * ROW_BYTES;
  static constexpr int PIECE_ROWS = BLOCK_M / WARPS, PIECE_COLUMNS = 64, PIECES = BLOCK_N / PIECE_COLUMNS;
  static constexpr int PIECE_BYTES = PIECE_ROWS * PIECE_COLUMNS * 2;
  static constexpr int STORES_BYTES = kMultipliers * WARPS * BUFFERS * PIECE_BYTES;
  static constexpr int MOST_CHUNKS = 16, MOST_STAGES = 16;
  static constexpr int COPIER_REGISTERS = 40, MULTIPLIER_REGISTERS = 232;

  struct Columns {           // of a warpgroup, for its columns of y
    uint2 factors[BLOCK_N];  // scale, part
    float bias[BLOCK_N];
  };
  static constexpr int OTHER_BYTES = STORES_BYTES + kMultipliers * static_cast<int>(sizeof(Columns)) + 2 * (MOST_CHUNKS + MOST_STAGES) * 8;
  static constexpr int FEWEST_STAGES = 4;

  static constexpr int64_t chunks(int64_t row_bytes) { return (row_bytes + ROW_BYTES - 1) / ROW_BYTES; }
  static int64_t stages(int64_t chunks, int64_t shared_bytes) {
    return std::min<int64_t>((shared_bytes - OTHER_BYTES - chunks * CHUNK_BYTES) / STAGE_BYTES, MOST_STAGES);
  }
  static bool fits(int64_t row_bytes, int64_t shared_bytes) {
    return chunks(row_bytes) <= MOST_CHUNKS && stages(chunks(row_bytes), shared_bytes) >= FEWEST_STAGES;
  }
};

// What a thread needs of 32 columns: two in every 8.
template <typename Tile, bool BIAS>
struct ThreadColumns {
  static constexpr int COLUMNS = 32, COUNT = COLUMNS / 8;
  uint4 factors[COUNT];  // scale, part; scale, part
  float2 bias[COUNT];

  __device__ __forceinline__ void load(const typename Tile::Columns& columns, int first) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const int n = first + j * 8 + threadIdx.x % 4 * 2;
      factors[j] = *reinterpret_cast<const uint4*>(&columns.factors[n]);
      bias[j] = BIAS ? *reinterpret_cast<const float2*>(&columns.bias[n]) : make_float2(0.0f, 0.0f);
    }
  }
};

// A warp's 16 rows of a tile of y. rows: of the thread's two, lane / 4 and 8 further. buffer: which one comes next, kept from tile to tile.
template <typename Tile, bool BIAS, bool BFLOAT16>
__device__ __forceinline__ void store_stationary(const int32_t (&accumulators)[Tile::BLOCK_N / 2], uint32_t mul,
                                                 const RowFactors (&rows)[2], const typename Tile::Columns& columns, uint8_t* buffers,
                                                 int& buffer, const CUtensorMap* y_map, int first_m, int first_n) {
  using Loaded = ThreadColumns<Tile, BIAS>;
  constexpr int kParts = Tile::BLOCK_N / Loaded::COLUMNS, kPartsOfPiece = Tile::PIECE_COLUMNS / Loaded::COLUMNS;
  const int lane = threadIdx.x % 32;
  const int matrix_row = lane % 16;
  const int target = matrix_row * Tile::PIECE_COLUMNS * 2, flip = matrix_row & 7;
  Loaded loaded[2];
  loaded[0].load(columns, 0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part + 1 < kParts) loaded[(part + 1) % 2].load(columns, (part + 1) * Loaded::COLUMNS);  // used after this part's arithmetic
    const Loaded& column = loaded[part % 2];
    uint32_t words[Loaded::COUNT / 2][4];
#pragma unroll
    for (int j = 0; j < Loaded::COUNT; ++j) {
      const uint4 pair = column.factors[j];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto value = [&](int32_t accumulator, uint32_t column_part, uint32_t scale, float bias) {
          const uint32_t sum = mul * static_cast<uint32_t>(accumulator) + rows[i].part + column_part;
          return scaled(static_cast<float>(static_cast<int32_t>(sum)), rows[i].scale, __uint_as_float(scale), bias);
        };
        const int index = (part * Loaded::COUNT + j) * 4 + 2 * i;
        const float low = value(accumulators[index], pair.y, pair.x, column.bias[j].x);
        const float high = value(accumulators[index + 1], pair.w, pair.z, column.bias[j].y);
        words[j / 2][j % 2 * 2 + i] = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
      }
    }
    uint8_t* const base = buffers + buffer * Tile::PIECE_BYTES;
    const int part_of_piece = part % kPartsOfPiece;
    if (part_of_piece == 0) {
      if (lane == 0) bulk_wait_read<Tile::BUFFERS - 1>();
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < Loaded::COUNT; j += 2) {
      stmatrix_x4(base + target + ((part_of_piece * Loaded::COUNT + j + lane / 16) ^ flip) * 16, words[j / 2]);
    }
    if (part_of_piece + 1 == kPartsOfPiece) {
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) {
        tensor_store(y_map, base, first_n + part / kPartsOfPiece * Tile::PIECE_COLUMNS, first_m);
        bulk_commit();
      }
      if (++buffer == Tile::BUFFERS) buffer = 0;
    }
  }
}

template <typename Mma, typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_stationary_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                           const __grid_constant__ CUtensorMap w_map,
                                                                           const __grid_constant__ CUtensorMap y_map,
                                                                           const __grid_constant__ StationaryProblem problem) {
#ifdef QUEST_SM90A
  const int chunks = problem.chunks, stages = problem.stages;
  uint8_t* const shared = dynamic_shared();
  auto w_tile = [&](int chunk) { return shared + chunk * Tile::CHUNK_BYTES; };
  auto a_tile = [&](int stage) { return shared + chunks * Tile::CHUNK_BYTES + stage * Tile::STAGE_BYTES; };
  uint8_t* const store_buffers = a_tile(stages);
  auto* const column_factors = reinterpret_cast<typename Tile::Columns*>(store_buffers + Tile::STORES_BYTES);
  uint64_t* const w_full = reinterpret_cast<uint64_t*>(column_factors + kMultipliers);
  uint64_t* const w_empty = w_full + Tile::MOST_CHUNKS;
  uint64_t* const full = w_empty + Tile::MOST_CHUNKS;
  uint64_t* const empty = full + Tile::MOST_STAGES;

  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_init(&w_full[chunk], 1);
      barrier_init(&w_empty[chunk], kMultipliers * Tile::WARPS);
    }
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], Tile::WARPS);  // of the warpgroup whose tile it belongs to
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
  int tiles_left = static_cast<int>(last_tile - first_tile);
  int n_tile = static_cast<int>(first_tile / problem.tiles_m), m_tile = static_cast<int>(first_tile - int64_t{n_tile} * problem.tiles_m);
  int stage = 0;
  uint32_t parity = 0;
  auto skip_stages = [&](int some) {
    stage += some;
    while (stage >= stages) stage -= stages, parity ^= 1;
  };

  if (threadIdx.x < kWarpgroup) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      bool fresh = true;  // the rows of w are not there
      uint32_t w_parity = 0;
      for (; tiles_left > 0; --tiles_left) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
          if (fresh) {
            barrier_wait(&w_empty[chunk], w_parity ^ 1);
            barrier_expect(&w_full[chunk], Tile::CHUNK_BYTES);
            tensor_load<false>(w_tile(chunk), &w_map, &w_full[chunk], chunk * Tile::ROW_BYTES, n_tile * Tile::BLOCK_N, 0, 0);
          }
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], Tile::STAGE_BYTES);
          tensor_load<false>(a_tile(stage), &a_map, &full[stage], chunk * Tile::ROW_BYTES, m_tile * Tile::BLOCK_M, 0, 0);
          skip_stages(1);
        }
        fresh = ++m_tile == problem.tiles_m;
        if (fresh) m_tile = 0, ++n_tile, w_parity ^= 1;
      }
    }
    __syncwarp();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = threadIdx.x / kWarpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = threadIdx.x % 32;
    const IntegerEpilogue& epilogue = problem.output.epilogue;
    const Output& y = epilogue.output;
    typename Tile::Columns& columns = column_factors[group];
    uint8_t* const buffers = store_buffers + (group * Tile::WARPS + warp) * Tile::BUFFERS * Tile::PIECE_BYTES;
    int buffer = 0;
    uint32_t w_parity = 0;
    // Gives the rows of w back and goes on to the next, whether or not this warpgroup has used them: the copier counts on both.
    auto next_columns = [&] {
      m_tile -= problem.tiles_m, ++n_tile;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(&w_full[chunk], w_parity);
        if (lane == 0) barrier_arrive(&w_empty[chunk]);
      }
      w_parity ^= 1;
    };
    // This warpgroup's next tile is `tiles` further; beyond the last there is only what the other one still reads.
    bool fresh = true;  // the column factors are not there
    auto advance = [&](int tiles) {
      m_tile += min(tiles, tiles_left - 1);
      tiles_left -= tiles;
      while (m_tile >= problem.tiles_m) next_columns(), fresh = true;
    };

    int32_t accumulators[Tile::BLOCK_N / 2];
    bool first = true;
    if (group != 0) advance(1), skip_stages(chunks), first = false;
    for (; tiles_left > 0; first = false) {
      const int first_m = m_tile * Tile::BLOCK_M + warp * Tile::PIECE_ROWS, first_n = n_tile * Tile::BLOCK_N;
      float row_scale[2];
      int32_t row_sum[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_m + lane / 4 + 8 * i;
        row_scale[i] = row < y.m ? epilogue.row_scale(row) : 0.0f;
        row_sum[i] = row < y.m ? epilogue.a.load(row) : 0;
      }
      if (fresh) {
        named_barrier(group_barrier(group), kWarpgroup);  // all have written what the old factors were for
        for (int i = thread; i < Tile::BLOCK_N; i += kWarpgroup) {
          const int n = first_n + i;
          const bool exists = n < y.n;
          columns.factors[i] = {exists ? __float_as_uint(epilogue.column_scale(n)) : 0u,
                                exists ? epilogue.w.of_codes(epilogue.w.load(n)) : 0u};
          columns.bias[i] = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
        }
        named_barrier(group_barrier(group), kWarpgroup);
        fresh = false;
      }

      if (!first) named_barrier(turn_barrier(group), kMultipliers * kWarpgroup);  // the other has started its last products
      int previous = 0;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(&w_full[chunk], w_parity);
        barrier_wait(&full[stage], parity);
        const uint64_t a_descriptor = swizzled_tile(a_tile(stage)), w_descriptor = swizzled_tile(w_tile(chunk));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < Tile::INSTRUCTIONS; ++j) Mma::mma(accumulators, a_descriptor + 2 * j, w_descriptor + 2 * j, (chunk | j) != 0);
        wgmma_commit();
        if (chunk + 1 == chunks && tiles_left > 1) named_barrier_arrive(turn_barrier(1 - group), kMultipliers * kWarpgroup);
        if (chunk > 0) {
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(&empty[previous]);
        }
        previous = stage;
        skip_stages(1);
      }
      wgmma_wait<0>();
      wgmma_owned(accumulators);
      if (lane == 0) barrier_arrive(&empty[previous]);
      skip_stages(chunks);  // the other warpgroup's tile
      advance(kMultipliers);

      const RowFactors rows[2] = {{row_scale[0], epilogue.a.of_codes(row_sum[0]) + epilogue.constant},
                                  {row_scale[1], epilogue.a.of_codes(row_sum[1]) + epilogue.constant}};
      if (problem.output.tensor_store) {
        auto store = [&](auto bias, auto bfloat16) {
          store_stationary<Tile, bias.value, bfloat16.value>(accumulators, epilogue.mul, rows, columns, buffers, buffer, &y_map, first_m,
                                                             first_n);
        };
        using True = std::true_type;
        using False = std::false_type;
        if (y.dtype == DType::kBFloat16) {
          y.bias != nullptr ? store(True{}, True{}) : store(False{}, True{});
        } else {
          y.bias != nullptr ? store(True{}, False{}) : store(False{}, False{});
        }
      } else {
#pragma unroll
        for (int index = 0; index < Tile::BLOCK_N / 2; ++index) {
          const int i = index / 2 % 2, column = index / 4 * 8 + lane % 4 * 2 + index % 2;
          const int m = first_m + lane / 4 + 8 * i, n = first_n + column;
          if (m < y.m && n < y.n) {
            const uint2 factors = columns.factors[column];
            const float product = epilogue.product(accumulators[index], rows[i].part, factors.y);
            store_value(y, m, n, scaled(product, rows[i].scale, __uint_as_float(factors.x), columns.bias[column]));
          }
        }
      }
    }
    if (lane == 0) bulk_wait_read<0>();
    __syncwarp();
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

// One plane each.
template <typename Mma, typename Tile>
void launch_stationary(const char* op, const Operand& a, const Operand& w, const IntegerEpilogue& epilogue, int64_t k, const Device& device,
                       cudaStream_t stream) {
  const int64_t m = epilogue.output.m, n = epilogue.output.n, row_bytes = plane_row_bytes(k);
  const int64_t chunks = Tile::chunks(row_bytes), stages = Tile::stages(chunks, device.shared_bytes);
  check(Tile::fits(row_bytes, device.shared_bytes), op, ": rows of ", k, " elements do not fit in shared memory");
  constexpr int64_t kMost = INT32_MAX - 256;  // room for the rows and columns of the last tile that y does not have
  check(m <= kMost && n <= kMost, op, ": expected m, n <= ", kMost, ", got ", m, ", ", n, "; split the rows");
  StationaryProblem problem{};
  problem.output = {epilogue, false};
  problem.tiles_m = static_cast<int32_t>((m + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  problem.tiles = problem.tiles_m * ((n + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
  problem.chunks = static_cast<int32_t>(chunks);
  problem.stages = static_cast<int32_t>(stages);
  auto map = [&](const Operand& operand, int64_t rows, uint32_t box_rows) {
    return tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, operand.data, row_bytes, rows, 1, row_bytes,
                      {Tile::ROW_BYTES, box_rows, CU_TENSOR_MAP_SWIZZLE_128B});
  };
  const CUtensorMap a_map = map(a, m, Tile::BLOCK_M), w_map = map(w, n, Tile::BLOCK_N);
  const CUtensorMap y_map = output_map(op, problem.output, Tile::PIECE_ROWS);
  const int64_t shared_bytes = chunks * Tile::CHUNK_BYTES + stages * Tile::STAGE_BYTES + Tile::OTHER_BYTES;
  const int64_t blocks = std::min<int64_t>(problem.tiles, device.sm_count);
  launch_with({1, device.hopper_code}, op, gemm_stationary_kernel<Mma, Tile>, dim3(static_cast<unsigned>(blocks)), dim3(Tile::THREADS),
              static_cast<size_t>(shared_bytes), stream, a_map, w_map, y_map, problem);
}

}  // namespace quest::cuda
