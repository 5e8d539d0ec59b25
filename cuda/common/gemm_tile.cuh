// The tiled product of all families: y[BLOCK_M, BLOCK_N] per thread block on mma.sync, for Ampere and everything later.
//
// A step of the main loop takes 64 bytes of every row of both tiles (64 int8, 128 nibbles, 512 bits or 32 16-bit floats): all element types
// have the same fragments (ptx.cuh), so one loop serves them and only the instruction differs. Tiles lie in shared memory in 64-byte rows
// whose four 16-byte pieces are permuted by the row number, so that ldmatrix and the writers touch every bank once. A pipeline of 4 stages
// hides memory: loaders either copy asynchronously into the stage 3 steps ahead, or fetch into registers, and widen or narrow and store
// after this step's products.
//
// Bit planes: the steps run over all plane pairs (i, j) by falling i + j, and the accumulators double whenever i + j falls (Horner's rule
// for sum 2^(i+j) P_ij), so one set of accumulators is enough.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/epilogue.cuh"
#include "common/ptx.cuh"
#include "common/steps.cuh"
#include "quest/plan.h"

namespace quest::cuda {

inline constexpr int kTileThreads = 128;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kStages = 4;
// Tiles of neighbouring thread blocks: 16 down y, then the next column, so that both operands of a wave stay in the L2 cache.
inline constexpr int kGroupM = 16;

// 2 x 2 warps of (BLOCK_M/2) x (BLOCK_N/2).
template <int BLOCK_M_, int BLOCK_N_>
struct Tile {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr int WARP_M = BLOCK_M / 2, WARP_N = BLOCK_N / 2;
  static constexpr int A_BYTES = BLOCK_M * kTileRowBytes, W_BYTES = BLOCK_N * kTileRowBytes;
  static constexpr int STAGES_BYTES = kStages * (A_BYTES + W_BYTES);
  static constexpr int SHARED_BYTES =
      STAGES_BYTES + (BLOCK_M + BLOCK_N) * static_cast<int>(sizeof(int32_t));  // and the value sums of the rows
};
using LargeTile = Tile<128, 128>;  // each byte of shared memory feeds most products: 64 x 64 a warp
using SmallTile = Tile<64, 64>;    // four times the thread blocks, where the large tile would leave multiprocessors idle

// Address of 16-byte piece `piece` (0 ... 3) of a tile row.
__device__ __forceinline__ int tile_offset(int row, int piece) { return row * kTileRowBytes + ((piece ^ (row >> 1 & 3)) * 16); }

// A loader fills a tile of ROWS rows: fetch(plane, k_tile, target) starts, commit(target) finishes.

template <int ROWS>
class ByteLoader {
 public:
  using Source = ByteRows;
  __device__ __forceinline__ ByteLoader(const ByteRows& source, int64_t first_row) : source_(source), first_row_(first_row) {}

  __device__ __forceinline__ void fetch(int plane, int k_tile, uint8_t* target) {
    const int piece = threadIdx.x % 4;
    const int64_t byte = static_cast<int64_t>(k_tile) * kTileRowBytes + piece * 16;
    auto row = [](int i) { return static_cast<int>(threadIdx.x) / 4 + i * (kTileThreads / 4); };
    if (source_.copies()) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool valid = source_.contains(first_row_ + row(i), byte);
        cp_async_16(target + tile_offset(row(i), piece), valid ? source_.address(plane, first_row_ + row(i), byte) : source_.data, valid);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kLoads; ++i) {
        *reinterpret_cast<uint4*>(target + tile_offset(row(i), piece)) = source_.load(plane, first_row_ + row(i), byte);
      }
    }
  }
  __device__ __forceinline__ void commit(uint8_t*) {}

 private:
  static constexpr int kLoads = ROWS * 4 / kTileThreads;
  const ByteRows& source_;
  int64_t first_row_;
};

template <int ROWS>
class NibbleLoader {
 public:
  using Source = NibbleRows;
  __device__ __forceinline__ NibbleLoader(const NibbleRows& source, int64_t first_row) : source_(source), first_row_(first_row) {}

  __device__ __forceinline__ void fetch(int, int k_tile, uint8_t*) {
    const int64_t byte = static_cast<int64_t>(k_tile) * (kTileRowBytes / 2) + threadIdx.x % 2 * 16;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) fetched_[i] = source_.load(first_row_ + row(i), byte);
  }
  __device__ __forceinline__ void commit(uint8_t* target) {
    const int piece = threadIdx.x % 2 * 2;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint2 x = source_.widen(fetched_[i].x), y = source_.widen(fetched_[i].y);
      const uint2 z = source_.widen(fetched_[i].z), w = source_.widen(fetched_[i].w);
      auto store = [&](int place, uint4 words) { *reinterpret_cast<uint4*>(target + tile_offset(row(i), place)) = words; };
      if (source_.even_odd) {
        auto every_second = [&](uint32_t bytes) {
          return make_uint4(__byte_perm(x.x, x.y, bytes), __byte_perm(y.x, y.y, bytes), __byte_perm(z.x, z.y, bytes),
                            __byte_perm(w.x, w.y, bytes));
        };
        store(piece / 2, every_second(0x6420));
        store(piece / 2 + 2, every_second(0x7531));
      } else {
        store(piece, make_uint4(x.x, x.y, y.x, y.y));
        store(piece + 1, make_uint4(z.x, z.y, w.x, w.y));
      }
    }
  }

 private:
  static constexpr int kLoads = ROWS * 2 / kTileThreads;
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 2 + i * (kTileThreads / 2); }

  const NibbleRows& source_;
  int64_t first_row_;
  uint4 fetched_[kLoads];
};

// Codes of at most 4 bits, stored one a byte, to rows of nibbles.
template <int ROWS>
class NarrowingLoader {
 public:
  using Source = ByteRows;
  __device__ __forceinline__ NarrowingLoader(const ByteRows& source, int64_t first_row) : source_(source), first_row_(first_row) {}

  __device__ __forceinline__ void fetch(int, int k_tile, uint8_t* target) {
    const int64_t byte = static_cast<int64_t>(k_tile) * (2 * kTileRowBytes) + column() * 16;
    if (source_.vectorized) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t r = first_row_ + row(i);
        fetched_[i] = source_.even_odd ? load_even_odd_16(r, byte / 16) : source_.load(0, r, byte);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kLoads; ++i) store(target, i, source_.load(0, first_row_ + row(i), byte));
    }
  }
  __device__ __forceinline__ void commit(uint8_t* target) {
    if (!source_.vectorized) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store(target, i, fetched_[i]);
  }

 private:
  // 8 threads a row: 16 bytes each, which become 8.
  static constexpr int kLoads = ROWS * 8 / kTileThreads;
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 8; }
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 8 + i * (kTileThreads / 8); }
  // Chunks 2 piece and 2 piece + 1 of a row in kEvenOdd's order, whose rows are padded.
  __device__ __forceinline__ uint4 load_even_odd_16(int64_t r, int64_t piece) const {
    if (!source_.contains(r, piece * 16)) return make_uint4(0, 0, 0, 0);
    const uint8_t* const codes = source_.address(0, r, 0);
    const uint2 first = load_even_odd(codes, 2 * piece), second = load_even_odd(codes, 2 * piece + 1);
    return make_uint4(first.x, first.y, second.x, second.y);
  }
  static __device__ __forceinline__ void store(uint8_t* target, int i, uint4 codes) {
    *reinterpret_cast<uint2*>(target + tile_offset(row(i), column() / 2) + column() % 2 * 8) =
        make_uint2(codes_to_nibbles(make_uint2(codes.x, codes.y)), codes_to_nibbles(make_uint2(codes.z, codes.w)));
  }

  const ByteRows& source_;
  int64_t first_row_;
  uint4 fetched_[kLoads] = {};
};

// Sum of the 64 int8 of a tile row.
__device__ __forceinline__ int32_t sum_of_tile_row(const uint8_t* tile) {
  int32_t sum = 0;
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    const uint4 words = *reinterpret_cast<const uint4*>(tile + threadIdx.x * kTileRowBytes + piece * 16);
    sum = __dp4a(static_cast<int>(words.x), 0x01010101, sum);
    sum = __dp4a(static_cast<int>(words.y), 0x01010101, sum);
    sum = __dp4a(static_cast<int>(words.z), 0x01010101, sum);
    sum = __dp4a(static_cast<int>(words.w), 0x01010101, sum);
  }
  return sum;
}

// Writes a warp's accumulators. Fragments pass through shared memory, 16 rows at a time, so that each lane stores 8 neighbouring columns.
template <typename Tile, typename Epilogue, typename Accumulator>
__device__ void store_tile(const Epilogue& epilogue, const Accumulator (&accumulators)[Tile::WARP_M / 16][Tile::WARP_N / 8][4],
                           uint8_t* shared, int64_t first_m, int64_t first_n, int warp_m, int warp_n) {
  constexpr int kStride = Tile::WARP_N + 4;  // 16 bytes of padding move each row to other banks
  constexpr int kLanesPerRow = Tile::WARP_N / kChunk;
  constexpr int kRowsPerPass = 32 / kLanesPerRow;
  static_assert(4 * 16 * kStride * sizeof(Accumulator) <= Tile::STAGES_BYTES, "staging reuses the stages");
  const int lane = threadIdx.x % 32;
  Accumulator* const staging = reinterpret_cast<Accumulator*>(shared) + threadIdx.x / 32 * 16 * kStride;
  const int32_t* const a_sums = reinterpret_cast<const int32_t*>(shared + Tile::STAGES_BYTES);
  const int32_t* const w_sums = a_sums + Tile::BLOCK_M;

  const Output& output = epilogue.output;
  const int column_in_tile = warp_n + lane % kLanesPerRow * kChunk;
  const int64_t column = first_n + column_in_tile;
  const int columns = static_cast<int>(output.n - column < 0 ? 0 : output.n - column < kChunk ? output.n - column : kChunk);
  float column_scale[kChunk], bias[kChunk];
  uint32_t column_part[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    const bool exists = c < columns;
    column_scale[c] = exists ? epilogue.column_scale(column + c) : 0.0f;
    bias[c] = exists && output.bias != nullptr ? output.bias[column + c] : 0.0f;
    column_part[c] = exists ? epilogue.column_part(column + c, w_sums[column_in_tile + c]) : 0u;
  }
#pragma unroll
  for (int i = 0; i < Tile::WARP_M / 16; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::WARP_N / 8; ++j) {
      Accumulator* const target = staging + lane / 4 * kStride + j * 8 + lane % 4 * 2;
      target[0] = accumulators[i][j][0];
      target[1] = accumulators[i][j][1];
      target[8 * kStride] = accumulators[i][j][2];
      target[8 * kStride + 1] = accumulators[i][j][3];
    }
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
      const int staged = pass * kRowsPerPass + lane / kLanesPerRow;
      const int row_in_tile = warp_m + i * 16 + staged;
      const int64_t row = first_m + row_in_tile;
      if (row >= output.m || columns == 0) continue;
      const Accumulator* const source = staging + staged * kStride + lane % kLanesPerRow * kChunk;
      const uint32_t row_part = epilogue.row_part(row, a_sums[row_in_tile]);
      const float row_scale = epilogue.row_scale(row);
      float y[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c)
        y[c] = scaled(epilogue.product(source[c], row_part, column_part[c]), row_scale, column_scale[c], bias[c]);
      store_chunk(output.y, y, output.dtype, row * output.n + column, columns, output.vectorized);
    }
  }
}

// BLOCK_M x BLOCK_N of y.
template <typename Mma, typename Tile, typename LoadA, typename LoadW, typename Epilogue>
__global__ __launch_bounds__(kTileThreads) void gemm_tile_kernel(const __grid_constant__ typename LoadA::Source a_source,
                                                                 const __grid_constant__ typename LoadW::Source w_source, const Steps steps,
                                                                 const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<Mma, MmaNibbles>) {  // never launched on these GPUs: no code for the emulated instruction
    __trap();
    return;
  }
#endif
  using Accumulator = typename Mma::Accumulator;
  constexpr int kMmasM = Tile::WARP_M / 16, kMmasN = Tile::WARP_N / 8;

  uint8_t* const shared = dynamic_shared();
  auto a_tile = [&](int step) { return shared + step % kStages * (Tile::A_BYTES + Tile::W_BYTES); };
  auto w_tile = [&](int step) { return a_tile(step) + Tile::A_BYTES; };

  const Output& output = epilogue.output;
  const int64_t tiles_m = (output.m + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  const int64_t tiles_n = (output.n + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
  const int64_t group = blockIdx.x / (kGroupM * tiles_n);
  const int64_t in_group = blockIdx.x - group * kGroupM * tiles_n;
  const int64_t group_rows = tiles_m - group * kGroupM < kGroupM ? tiles_m - group * kGroupM : kGroupM;
  const int64_t first_m = (group * kGroupM + in_group % group_rows) * Tile::BLOCK_M;
  const int64_t first_n = in_group / group_rows * Tile::BLOCK_N;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / 2 * Tile::WARP_M, warp_n = warp % 2 * Tile::WARP_N;

  LoadA load_a(a_source, first_m);
  LoadW load_w(w_source, first_n);
  StepCursor next(steps);  // the step to be fetched
  const int count = steps.count();
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < count) {
      load_a.fetch(next.a_plane, next.k_tile, a_tile(step));
      load_w.fetch(next.w_plane, next.k_tile, w_tile(step));
      load_a.commit(a_tile(step));
      load_w.commit(w_tile(step));
      next.advance();
    }
    cp_async_commit();
  }

  Accumulator accumulators[kMmasM][kMmasN][4] = {};
  int32_t a_sum = 0, w_sum = 0;  // of row threadIdx.x of each tile
  StepCursor now(steps);
  for (int step = 0; step < count; ++step) {
    cp_async_wait<kStages - 2>();  // this thread's copies of this step have landed ...
    __syncthreads();               // ... and everyone's; and everyone is done with the stage that is filled next
    const int ahead = step + kStages - 1;
    const bool fetches = ahead < count;
    if (fetches) {
      load_a.fetch(next.a_plane, next.k_tile, a_tile(ahead));
      load_w.fetch(next.w_plane, next.k_tile, w_tile(ahead));
      next.advance();
    }
    cp_async_commit();

    const uint8_t* const a_now = a_tile(step);
    const uint8_t* const w_now = w_tile(step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 bytes of K
      uint32_t a[kMmasM][4], w[kMmasN / 2][4];
#pragma unroll
      for (int i = 0; i < kMmasM; ++i) {
        ldmatrix_x4(a[i], a_now + tile_offset(warp_m + i * 16 + lane % 16, half * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kMmasN / 2; ++j) {
        ldmatrix_x4(w[j], w_now + tile_offset(warp_n + j * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kMmasM; ++i) {
#pragma unroll
        for (int j = 0; j < kMmasN; ++j) Mma::mma(accumulators[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
      }
    }
    if constexpr (Epilogue::kSumsValues) {
      if (epilogue.a.sums_values && threadIdx.x < Tile::BLOCK_M) a_sum += sum_of_tile_row(a_now);
      if (epilogue.w.sums_values && threadIdx.x < Tile::BLOCK_N) w_sum += sum_of_tile_row(w_now);
      if (now.advance()) {
#pragma unroll
        for (int i = 0; i < kMmasM; ++i) {
#pragma unroll
          for (int j = 0; j < kMmasN; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) accumulators[i][j][c] *= 2;
          }
        }
      }
    }
    if (fetches) {
      load_a.commit(a_tile(ahead));
      load_w.commit(w_tile(ahead));
    }
  }

  if constexpr (Epilogue::kSumsValues) {
    int32_t* const sums = reinterpret_cast<int32_t*>(shared + Tile::STAGES_BYTES);
    if (threadIdx.x < Tile::BLOCK_M) sums[threadIdx.x] = a_sum;
    if (threadIdx.x < Tile::BLOCK_N) sums[Tile::BLOCK_M + threadIdx.x] = w_sum;
  }
  __syncthreads();  // the sums are there, and all warps are done with the stages, which serve as staging now
  store_tile<Tile>(epilogue, accumulators, shared, first_m, first_n, warp_m, warp_n);
}

// ---- host

// LoadA, LoadW: class templates over the rows of a tile.
template <typename Mma, template <int> class LoadA, template <int> class LoadW, typename SourceA, typename SourceW, typename Epilogue>
void launch_tile(const char* op, const GemmTile& tile, const SourceA& a, const SourceW& w, const Steps& steps, const Epilogue& epilogue,
                 cudaStream_t stream) {
  auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t tiles_m = (epilogue.output.m + Shape::BLOCK_M - 1) / Shape::BLOCK_M;
    const int64_t tiles_n = (epilogue.output.n + Shape::BLOCK_N - 1) / Shape::BLOCK_N;
    launch(op, gemm_tile_kernel<Mma, Shape, LoadA<Shape::BLOCK_M>, LoadW<Shape::BLOCK_N>, Epilogue>, grid_of(op, tiles_m * tiles_n),
           dim3(kTileThreads), Shape::SHARED_BYTES, stream, a, w, steps, epilogue);
  };
  if (tile.block_m == LargeTile::BLOCK_M) {
    run(LargeTile{});
  } else {
    run(SmallTile{});
  }
}

inline Steps steps_of(int64_t row_bytes, int32_t a_planes = 1, int32_t w_planes = 1) {
  return {static_cast<int>((row_bytes + kTileRowBytes - 1) / kTileRowBytes), a_planes, w_planes};
}

}  // namespace quest::cuda
