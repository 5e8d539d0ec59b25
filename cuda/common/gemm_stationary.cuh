// The product of 1-bit operands on Hopper for rows of w that fit in shared memory: they stay there while a streams past.
//
// Tiles of bits are short: at K = 4096 the tensor cores need 2048 cycles for 64 x 256 of y, the epilogue as many, and a kernel that loads
// both operands for each tile waits for the L2 cache besides. So a thread block keeps BLOCK_N whole rows of w, walks down the rows of y,
// and reads 64 rows of a for each tile. Its two multiplying warpgroups take turns: while one multiplies, alone, the other writes the y it
// has made. Both operands come straight from shared memory.
//
// Shared memory is what is short. Of its 128 bytes a cycle the tensor cores read 80, and the copy engine writes 16. At their speed the
// epilogue needs 16 for y, 48 by way of shared memory, and 16 each for the scales and the parts of the columns. So y goes straight from
// registers to memory, and the parts, as 16 bits, stay in registers.
//
// The instruction gives lane (g, t) = (lane / 4, lane % 4) the columns 8j + 2t and 8j + 2t + 1 of its row, which are no 16 bytes. So the
// copy engine lays the rows of w down in another order: row 8 (4q + i) + 2t + e of the tile is row 32q + 8t + 2i + e of w, and the lane has
// the 8 columns from 32q + 8t on, for every q.
//
// Tiles are numbered down the rows, then along the columns; a block takes a contiguous range of them and loads the next rows of w when the
// range crosses a boundary. A chunk is 128 bytes (1024 bits) of each row of w, a stage of the ring as much of 64 rows of a.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/epilogue.cuh"
#include "common/matrix_map.h"
#include "common/wgmma_epilogue.cuh"
#include "quest/plan.h"

namespace quest::cuda {

struct StationaryProblem {
  IntegerEpilogue epilogue;
  int32_t tiles_m;
  int64_t tiles;
  int32_t chunks, stages;
};

inline constexpr int kMultipliers = 2;  // warpgroups, which take turns
__device__ __forceinline__ int turn_barrier(int group) { return group_barrier(kMultipliers) + group; }

template <int BLOCK_N_>
struct StationaryTile {
  static constexpr int BLOCK_M = kStationaryM, BLOCK_N = BLOCK_N_;
  static constexpr int THREADS = (1 + kMultipliers) * kWarpgroup, WARPS = kWarpgroup / 32;
  static constexpr int ROW_BYTES = kStationaryRowBytes;  // of a chunk and a stage: what the 128-byte swizzle covers
  static constexpr int INSTRUCTIONS = ROW_BYTES / 32;
  static constexpr int CHUNK_BYTES = BLOCK_N * ROW_BYTES, STAGE_BYTES = BLOCK_M * ROW_BYTES;
  static constexpr int SPAN = kStationarySpan;  // columns of y that the order of rows of w works in
  static constexpr int MOST_CHUNKS = kStationaryMostChunks, MOST_STAGES = kStationaryMostStages;
  static constexpr int PREFETCHED_CHUNKS = 2;  // (all of them: 6 to 29 % slower at 512 rows and fewer)
  static constexpr int COPIER_REGISTERS = 40, MULTIPLIER_REGISTERS = 232;

  struct Columns {  // of a warpgroup
    float scale[BLOCK_N], bias[BLOCK_N];
    int16_t part[BLOCK_N];
  };
  static constexpr int OTHER_BYTES = static_cast<int>(stationary_other_bytes(BLOCK_N));
  static_assert(COPIER_REGISTERS + kMultipliers * MULTIPLIER_REGISTERS <= (1 + kMultipliers) * registers_at_start(THREADS),
                "or they wait for ever");
  static_assert(BLOCK_N % kWarpgroup == 0, "a thread loads the factors of whole columns");
  static_assert(OTHER_BYTES == kMultipliers * static_cast<int>(sizeof(Columns)) + 2 * (MOST_CHUNKS + MOST_STAGES) * 8, "as planned");
};

// A thread's 8 columns of every span. Their parts it keeps as long as its block keeps the rows of w, two a register.
template <typename Tile>
struct ThreadColumns {
  static constexpr int SPANS = Tile::BLOCK_N / Tile::SPAN, COUNT = 8;
  int4 parts[SPANS];

  // The first of them.
  static __device__ __forceinline__ int column(int span) { return span * Tile::SPAN + static_cast<int>(threadIdx.x) % 4 * COUNT; }

  __device__ __forceinline__ void load_parts(const typename Tile::Columns& columns) {
#pragma unroll
    for (int span = 0; span < SPANS; ++span) parts[span] = *reinterpret_cast<const int4*>(columns.part + column(span));
  }
  __device__ __forceinline__ int32_t part(int span, int i) const {
    const int4& four = parts[span];
    const int32_t two = i < 2 ? four.x : i < 4 ? four.y : i < 6 ? four.z : four.w;
    return i % 2 == 0 ? static_cast<int16_t>(two) : two >> 16;
  }

  // Of the tile's columns those of a span.
  static __device__ __forceinline__ void load(float (&values)[COUNT], const float* of_columns, int span) {
    const auto* const source = reinterpret_cast<const float4*>(of_columns + column(span));
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 four = source[i / 4];
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
};

// A warp's 16 rows of a tile of y. rows: of the thread's two, first_row and 8 further.
template <typename Tile, bool BIAS, DType DTYPE>
__device__ __forceinline__ void store_rows(const int32_t (&accumulators)[Tile::BLOCK_N / 2], uint32_t mul, const RowFactors (&rows)[2],
                                           const ThreadColumns<Tile>& own, const typename Tile::Columns& columns, const Output& y,
                                           int first_row, int first_n) {
  using Own = ThreadColumns<Tile>;
  constexpr int kBytes = DTYPE == DType::kFloat32 ? 4 : 2;
  uint8_t* const out = static_cast<uint8_t*>(y.y) + (static_cast<int64_t>(first_row) * y.n + first_n + Own::column(0)) * kBytes;
  const int64_t next_row = 8 * y.n * kBytes;
#pragma unroll
  for (int span = 0; span < Own::SPANS; ++span) {
    float scale[Own::COUNT], bias[Own::COUNT] = {};
    Own::load(scale, columns.scale, span);
    if constexpr (BIAS) Own::load(bias, columns.bias, span);
    const bool exists = first_n + span * Tile::SPAN < y.n;  // whole spans do, or not
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float values[Own::COUNT];
#pragma unroll
      for (int c = 0; c < Own::COUNT; ++c) {
        const int32_t accumulator = accumulators[span * 2 * Own::COUNT + c / 2 * 4 + 2 * i + c % 2];
        const uint32_t sum = mul * static_cast<uint32_t>(accumulator) + rows[i].part + static_cast<uint32_t>(own.part(span, c));
        values[c] = scaled(static_cast<float>(static_cast<int32_t>(sum)), rows[i].scale, scale[c], bias[c]);
      }
      RawChunk<DTYPE> chunk;
      chunk.from_floats(values);
      if (exists && first_row + 8 * i < y.m) chunk.store(out + i * next_row + span * Tile::SPAN * kBytes);
    }
  }
}

template <typename Mma, typename Tile>
__global__ __launch_bounds__(Tile::THREADS, 1) void gemm_stationary_kernel(const __grid_constant__ CUtensorMap a_map,
                                                                           const __grid_constant__ CUtensorMap w_map,
                                                                           const __grid_constant__ StationaryProblem problem) {
#ifdef QUEST_SM90A
  const int chunks = problem.chunks, stages = problem.stages;
  uint8_t* const shared = dynamic_shared();
  auto w_tile = [&](int chunk) { return shared + chunk * Tile::CHUNK_BYTES; };
  auto a_tile = [&](int stage) { return shared + chunks * Tile::CHUNK_BYTES + stage * Tile::STAGE_BYTES; };
  auto* const column_factors = reinterpret_cast<typename Tile::Columns*>(a_tile(stages));
  uint64_t* const w_full = reinterpret_cast<uint64_t*>(column_factors + kMultipliers);
  uint64_t* const w_empty = w_full + Tile::MOST_CHUNKS;
  uint64_t* const full = w_empty + Tile::MOST_CHUNKS;
  uint64_t* const empty = full + Tile::MOST_STAGES;

  const int64_t first_tile = problem.tiles * blockIdx.x / gridDim.x, last_tile = problem.tiles * (blockIdx.x + 1) / gridDim.x;
  int tiles_left = static_cast<int>(last_tile - first_tile);
  int n_tile = static_cast<int>(first_tile / problem.tiles_m), m_tile = static_cast<int>(first_tile - int64_t{n_tile} * problem.tiles_m);
  auto w_at = [&](int chunk) { return BoxAt{{chunk * Tile::ROW_BYTES, 0, 0, 0, n_tile * (Tile::BLOCK_N / Tile::SPAN)}}; };

  // One lane of each warp, of whose barriers all lanes know the place (gemm_fixed.cuh).
  const int warpgroup = warpgroup_index(), warp = 4 * warpgroup + warp_index();
  if (threadIdx.x % 32 == 0) {
    constexpr int kWarps = Tile::THREADS / 32;
    if (warp == 1) {
      prefetch_tensor_map(&w_map);
      prefetch_tensor_map(&a_map);
      // The first rows of w to the second cache, while barriers are made and the kernel before this one ends.
#pragma unroll 1
      for (int chunk = 0; chunk < min(Tile::PREFETCHED_CHUNKS, chunks); ++chunk) tensor_prefetch_5d(&w_map, w_at(chunk).at);
    }
#pragma unroll 1
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      barrier_init(&w_full[chunk], 1);
      barrier_init(&w_empty[chunk], kMultipliers * Tile::WARPS);
    }
#pragma unroll 1
    for (int stage = warp; stage < stages; stage += kWarps) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], Tile::WARPS);  // of the warpgroup whose tile it belongs to
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_prerequisites();

  int stage = 0;
  uint32_t parity = 0;
  auto next_stage = [&] {
    if (++stage == stages) stage = 0, parity ^= 1;
  };

  if (warpgroup == 0) {
    registers_shrink<Tile::COPIER_REGISTERS>();
    if (threadIdx.x == 0) {
      bool fresh = true;  // the rows of w are not there
      uint32_t w_parity = 0;
      for (; tiles_left > 0; --tiles_left) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
          if (fresh) {
            barrier_wait(&w_empty[chunk], w_parity ^ 1);
            barrier_expect(&w_full[chunk], Tile::CHUNK_BYTES);
            tensor_load_5d(w_tile(chunk), &w_map, &w_full[chunk], w_at(chunk).at);
          }
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], Tile::STAGE_BYTES);
          tensor_load<false>(a_tile(stage), &a_map, &full[stage], chunk * Tile::ROW_BYTES, m_tile * Tile::BLOCK_M, 0, 0);
          next_stage();
        }
        fresh = ++m_tile == problem.tiles_m;
        if (fresh) m_tile = 0, ++n_tile, w_parity ^= 1;
      }
    }
    __syncwarp();
  } else {
    registers_grow<Tile::MULTIPLIER_REGISTERS>();
    const int group = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
    const IntegerEpilogue& epilogue = problem.epilogue;
    const Output& y = epilogue.output;
    typename Tile::Columns& columns = column_factors[group];
    uint32_t w_parity = 0;
    auto skip_tile = [&] {  // of the other warpgroup
      stage += chunks;
      while (stage >= stages) stage -= stages, parity ^= 1;
    };
    // Gives the rows of w back and goes on to the next, whether or not this warpgroup has used them: the copier counts on both.
    auto next_columns = [&] {
      m_tile -= problem.tiles_m, ++n_tile;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(&w_full[chunk], w_parity);
        __syncwarp();  // the other lanes have seen this phase too, before it may end
        if (lane == 0) barrier_arrive(&w_empty[chunk]);
      }
      w_parity ^= 1;
    };
    // This warpgroup's next tile is `tiles` further; beyond the last there is only what the other one still reads.
    bool fresh = true;  // the column factors are not there, nor all rows of w
    auto advance = [&](int tiles) {
      m_tile += min(tiles, tiles_left - 1);
      tiles_left -= tiles;
      while (m_tile >= problem.tiles_m) next_columns(), fresh = true;
    };

    int32_t accumulators[Tile::BLOCK_N / 2];
    ThreadColumns<Tile> own;
    bool first = true;
    if (group != 0) advance(1), skip_tile(), first = false;
    const uint64_t a_descriptors = swizzled_tile(a_tile(0)), w_descriptors = swizzled_tile(w_tile(0));
    for (; tiles_left > 0; first = false) {
      const int first_row = m_tile * Tile::BLOCK_M + thread / 32 * 16 + lane / 4, first_n = n_tile * Tile::BLOCK_N;
      float row_scale[2];
      int32_t row_sum[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i;
        row_scale[i] = row < y.m ? epilogue.row_scale(row) : 0.0f;
        row_sum[i] = row < y.m ? epilogue.a.load(row) : 0;
      }
      if (fresh) {
        // (All loads before the first use or store, behind which they would wait for each other.)
        constexpr int kColumns = Tile::BLOCK_N / kWarpgroup;
        float scale[kColumns], bias[kColumns];
        int32_t sum[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int n = first_n + i * kWarpgroup + thread;
          const bool exists = n < y.n;
          scale[i] = exists ? epilogue.column_scale(n) : 0.0f;
          sum[i] = exists ? epilogue.w.load(n) : 0;
          bias[i] = exists && y.bias != nullptr ? y.bias[n] : 0.0f;
        }
        named_barrier(group_barrier(group), kWarpgroup);  // all have written what the old factors were for
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int c = i * kWarpgroup + thread;
          columns.scale[c] = scale[i], columns.bias[c] = bias[i];
          columns.part[c] = static_cast<int16_t>(epilogue.w.of_codes(sum[i]));
        }
        named_barrier(group_barrier(group), kWarpgroup);
        own.load_parts(columns);
      }

      if (!first) named_barrier(turn_barrier(group), kMultipliers * kWarpgroup);  // the other has started its last products
      int previous = 0;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        // Not all before the first: a ring of fewer stages than chunks goes on only when this loop does.
        if (fresh) barrier_wait(&w_full[chunk], w_parity);
        barrier_wait(&full[stage], parity);
        const uint64_t a_descriptor = a_descriptors + static_cast<uint32_t>(stage * (Tile::STAGE_BYTES >> 4));
        const uint64_t w_descriptor = w_descriptors + static_cast<uint32_t>(chunk * (Tile::CHUNK_BYTES >> 4));
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
        next_stage();
      }
      const RowFactors rows[2] = {{row_scale[0], epilogue.a.of_codes(row_sum[0]) + epilogue.constant},
                                  {row_scale[1], epilogue.a.of_codes(row_sum[1]) + epilogue.constant}};
      skip_tile();
      wgmma_wait<0>();
      wgmma_owned(accumulators);
      if (lane == 0) barrier_arrive(&empty[previous]);
      fresh = false;
      advance(kMultipliers);
      if (tiles_left <= 0) launch_dependents();

      auto store = [&](auto bias, auto dtype) {
        store_rows<Tile, bias.value, dtype.value>(accumulators, epilogue.mul, rows, own, columns, y, first_row, first_n);
      };
      auto store_as = [&](auto dtype) { y.bias != nullptr ? store(std::true_type{}, dtype) : store(std::false_type{}, dtype); };
      switch (y.dtype) {
        case DType::kFloat32: store_as(std::integral_constant<DType, DType::kFloat32>{}); break;
        case DType::kBFloat16: store_as(std::integral_constant<DType, DType::kBFloat16>{}); break;
        case DType::kFloat16: store_as(std::integral_constant<DType, DType::kFloat16>{}); break;
      }
    }
  }
#else
  __trap();  // the host launches this where Device::hopper_code alone
#endif
}

// ---- host

// Whether 16 bits hold what a column adds: the identity is linear in its code sum, 0 to k.
inline bool has_short_parts(const Correction& w, int64_t k) {
  auto fits = [&](int64_t sum) {
    const int64_t part =
        int64_t{static_cast<int32_t>(w.weight)} * (int64_t{static_cast<int32_t>(w.mul)} * sum + static_cast<int32_t>(w.add));
    return part == static_cast<int16_t>(part);
  };
  return fits(0) && fits(k);
}

// One plane each.
template <typename Mma, typename Tile>
void launch_stationary(const char* op, const Operand& a, const Operand& w, const IntegerEpilogue& epilogue, int64_t k, const Device& device,
                       cudaStream_t stream) {
  const int64_t m = epilogue.output.m, n = epilogue.output.n, row_bytes = plane_row_bytes(k);
  const int64_t chunks = stationary_chunks(k), stages = stationary_stages(Tile::BLOCK_N, k);
  check(stages > 0 && n % Tile::SPAN == 0 && has_short_parts(epilogue.w, k), op, ": a kernel that does not take n = ", n, ", k = ", k);
  constexpr int64_t kMost = INT32_MAX - 256;  // room for the rows and columns of the last tile that y does not have
  check(m <= kMost && n <= kMost, op, ": expected m, n <= ", kMost, ", got ", m, ", ", n, "; split the rows");
  StationaryProblem problem{};
  problem.epilogue = epilogue;
  problem.tiles_m = static_cast<int32_t>((m + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  problem.tiles = problem.tiles_m * ((n + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
  problem.chunks = static_cast<int32_t>(chunks);
  problem.stages = static_cast<int32_t>(stages);
  const CUtensorMap a_map = matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.data, row_bytes, m, 1, row_bytes,
                                       {Tile::ROW_BYTES, Tile::BLOCK_M, CU_TENSOR_MAP_SWIZZLE_128B});
  // Row 32q + 8t + 2i + e of w as (e, t, i, q).
  const CUtensorMap w_map = tensor_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, w.data,
                                       {{row_bytes, 1, Tile::ROW_BYTES},
                                        {2, row_bytes, 2},
                                        {4, 8 * row_bytes, 4},
                                        {4, 2 * row_bytes, 4},
                                        {n / Tile::SPAN, Tile::SPAN * row_bytes, Tile::BLOCK_N / Tile::SPAN}},
                                       CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t shared_bytes = chunks * Tile::CHUNK_BYTES + stages * Tile::STAGE_BYTES + Tile::OTHER_BYTES;
  const int64_t blocks = std::min<int64_t>(problem.tiles, device.sm_count);
  launch_with({1, device.hopper_code}, op, gemm_stationary_kernel<Mma, Tile>, dim3(static_cast<unsigned>(blocks)), dim3(Tile::THREADS),
              static_cast<size_t>(shared_bytes), stream, a_map, w_map, problem);
}

}  // namespace quest::cuda
