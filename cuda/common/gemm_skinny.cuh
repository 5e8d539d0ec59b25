// The product for at most 16 rows of a, where reading the weight once is all that counts: y^T[32, 16] per thread block on mma.sync.
//
// The weight is the left operand of the instruction, so its 16 rows are full. A warp takes slices of 128 columns of K, the 8 warps of a
// block every eighth, and loads them straight from memory: in a slice, lane (g, t) = (lane / 4, lane % 4) holds the columns 32 t ... 32 t +
// 31 of the weight rows g, g + 8, g + 16, g + 24 and of the rows g and g + 8 of a. The instruction sums over K in any order as long as both
// operands agree, so word i of a lane may be what it calls column 4t or 16 + 4t. The warps' sums meet in shared memory in a fixed order:
// one launch, no atomics.
#pragma once

#include <cstdint>

#include "common/epilogue.cuh"
#include "common/gemm_tile.cuh"
#include "common/ptx.cuh"

namespace quest::cuda {

inline constexpr int kSkinnyThreads = 256;
inline constexpr int kSkinnyBlocks = 2;  // a multiprocessor: leaves a thread 128 registers, most of them loads in flight
inline constexpr int kSkinnyWarps = kSkinnyThreads / 32;
inline constexpr int kSkinnyM = 16, kSkinnyN = 32;
inline constexpr int kSliceColumns = 128;
inline constexpr int kLaneColumns = 32;

// What a lane loads of one row, 32 columns, and the 2 words of int8 that quarter `i` of it becomes.
struct SkinnyBytes {
  using Source = ByteRows;
  static constexpr int kDepth = 1;  // slices of a weight that a warp has on their way, as far as registers go
  uint4 loaded[2];
  __device__ __forceinline__ void load(const ByteRows& source, int64_t row, int64_t column) {
    loaded[0] = source.load(0, row, column);
    loaded[1] = source.load(0, row, column + 16);
  }
  __device__ __forceinline__ uint2 widen(const ByteRows&, int i) const {
    const uint4& half = loaded[i / 2];
    return i % 2 == 0 ? make_uint2(half.x, half.y) : make_uint2(half.z, half.w);
  }
};

struct SkinnyNibbles {
  using Source = NibbleRows;
  static constexpr int kDepth = 2;
  uint4 loaded;
  __device__ __forceinline__ void load(const NibbleRows& source, int64_t row, int64_t column) { loaded = source.load(row, column / 2); }
  __device__ __forceinline__ uint2 widen(const NibbleRows& source, int i) const {
    return source.widen(i == 0 ? loaded.x : i == 1 ? loaded.y : i == 2 ? loaded.z : loaded.w);
  }
};

// Adds the warps' [32, 16] accumulators (mma fragments of 2 x 2) and writes y. scratch: kSkinnyWarps * 512 words.
template <typename Epilogue, typename Accumulator>
__device__ void store_skinny(const Epilogue& epilogue, const Accumulator (&accumulators)[2][2][4], Accumulator* scratch, int64_t first_n,
                             const int32_t* a_sums, const int32_t* w_sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Word [m][n] of a warp's scratch: the reading threads differ in n.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int n = i * 16 + lane / 4 + c / 2 * 8;
        const int m = j * 8 + lane % 4 * 2 + c % 2;
        scratch[warp * kSkinnyM * kSkinnyN + m * kSkinnyN + n] = accumulators[i][j][c];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSkinnyM * kSkinnyN / kSkinnyThreads; ++i) {
    const int word = i * kSkinnyThreads + threadIdx.x;
    const int m = word / kSkinnyN, n = word % kSkinnyN;
    Accumulator sum = 0;
#pragma unroll
    for (int w = 0; w < kSkinnyWarps; ++w) sum += scratch[w * kSkinnyM * kSkinnyN + word];
    if (m < epilogue.output.m && first_n + n < epilogue.output.n) store_element(epilogue, m, first_n + n, sum, a_sums[m], w_sums[n]);
  }
}

// Adds a lane's partial sum to the sum of a row. Integers: the order of the atomics does not matter.
__device__ __forceinline__ void add_row_sum(int32_t* sum, uint2 words) {
  atomicAdd(sum, __dp4a(static_cast<int>(words.x), 0x01010101, __dp4a(static_cast<int>(words.y), 0x01010101, 0)));
}

// Integer operands. W, A: SkinnyBytes or SkinnyNibbles.
template <typename A, typename W>
__global__ __launch_bounds__(kSkinnyThreads, kSkinnyBlocks) void gemm_skinny_kernel(const __grid_constant__ typename A::Source a_source,
                                                                                    const __grid_constant__ typename W::Source w_source,
                                                                                    int64_t k,
                                                                                    const __grid_constant__ IntegerEpilogue epilogue) {
  __shared__ int32_t scratch[kSkinnyWarps * kSkinnyM * kSkinnyN];
  __shared__ int32_t a_sums[kSkinnyM], w_sums[kSkinnyN];
  if (threadIdx.x < kSkinnyM) a_sums[threadIdx.x] = 0;
  if (threadIdx.x < kSkinnyN) w_sums[threadIdx.x] = 0;
  __syncthreads();

  dependents_may_launch();
  wait_for_prerequisites();

  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kSkinnyN;
  const int lane = threadIdx.x % 32, group = lane / 4;
  const int64_t step = static_cast<int64_t>(kSkinnyWarps) * kSliceColumns;
  const bool wide = epilogue.output.m > 8;
  int32_t accumulators[2][2][4] = {};
  int64_t column = threadIdx.x / 32 * kSliceColumns + lane % 4 * kLaneColumns;
  const int64_t slices = (k + kSliceColumns - 1) / kSliceColumns;
  // The slices on their way; zeros beyond the row.
  W weight[W::kDepth][4];
  A activation[W::kDepth][2];
  auto load = [&](int d, int64_t at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[d][i].load(w_source, first_n + i * 8 + group, at);
    activation[d][0].load(a_source, group, at);
    if (wide) activation[d][1].load(a_source, 8 + group, at);
  };
#pragma unroll
  for (int d = 0; d < W::kDepth; ++d) load(d, column + d * step);
  for (int64_t slice = threadIdx.x / 32; slice < slices;) {
#pragma unroll
    for (int d = 0; d < W::kDepth; ++d, slice += kSkinnyWarps, column += step) {
      if (slice >= slices) break;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        uint2 w_words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w_words[i] = weight[d][i].widen(w_source, p);
          if (epilogue.w.sums_values) add_row_sum(&w_sums[i * 8 + group], w_words[i]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (j == 1 && !wide) continue;
          const uint2 a_words = activation[d][j].widen(a_source, p);
          if (epilogue.a.sums_values) add_row_sum(&a_sums[j * 8 + group], a_words);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t w_fragment[4] = {w_words[2 * i].x, w_words[2 * i + 1].x, w_words[2 * i].y, w_words[2 * i + 1].y};
            MmaInt8::mma(accumulators[i][j], w_fragment, a_words.x, a_words.y);
          }
        }
      }
      load(d, column + W::kDepth * step);
    }
  }
  store_skinny(epilogue, accumulators, scratch, first_n, a_sums, w_sums);
}

// ---- host

// The kernel that `tile` names: skinny, or tiled with LoadA and LoadW.
template <typename A, typename W, template <int> class LoadA, template <int> class LoadW>
void launch_int8(const char* op, const GemmTile& tile, const typename A::Source& a, const typename W::Source& w, int64_t k,
                 const IntegerEpilogue& epilogue, const Device& device, cudaStream_t stream) {
  if (tile.block_m == kSkinnyM) {
    launch_with({1, device.hopper_code}, op, gemm_skinny_kernel<A, W>, grid_of(op, (epilogue.output.n + kSkinnyN - 1) / kSkinnyN),
                dim3(kSkinnyThreads), 0, stream, a, w, k, epilogue);
  } else {
    launch_tile<MmaInt8, LoadA, LoadW>(op, tile, a, w, steps_of(k), epilogue, stream);
  }
}

}  // namespace quest::cuda
