// gemm_weight_only: y = x (s_w level(c_w))^T + bias for real x. Codes are widened to x's type in registers, the row scale is applied to the
// sum.
//
// bfloat16 and float16: on Hopper most products of few rows take x as fixed-point numbers (gemm_weight_only_wgmma.cu), and most of more
// rows are gemm_widened_wgmma.cu's. Others: tensor cores with float32 sums; the kernel for few rows (gemm_held.cuh), 16 or 8 at a time, or
// the tiled one of all families. Integer levels of up to 8 bits are exact in both types; gauss levels are rounded to them.
// float32: fused multiply-adds in float32, 32 x 64 of y per thread block.
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/gemm_held.cuh"
#include "common/gemm_tile.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"
#include "quest/plan.h"

namespace quest::cuda {
namespace {

// The weight's rows, and the level of each code: mul code + add, or for fp4 and gauss a table.
struct LevelRows {
  const uint8_t* data;
  Layout layout;
  int bits;
  int64_t rows, k, row_bytes, plane_bytes;
  bool vectorized;
  bool looks_up;
  float mul, add;
  float table[kMaxLevels];

  // What is stored of the columns 8 chunk ... 8 chunk + 7: kCodes a byte each, kPacked one word, kPlanes byte j of plane j. Zeros beyond
  // the row.
  __device__ uint2 load(int64_t row, int64_t chunk) const {
    const int64_t left = k - chunk * kChunk;
    if (row >= rows || left <= 0) return make_uint2(0, 0);
    const uint8_t* source = data + row * row_bytes;
    switch (layout) {
      case Layout::kPacked: return make_uint2(*reinterpret_cast<const uint32_t*>(source + chunk * 4), 0);
      case Layout::kPlanes: {
        uint64_t bytes = 0;
        for (int j = 0; j < bits; ++j) bytes |= static_cast<uint64_t>(source[j * plane_bytes + chunk]) << (8 * j);
        return make_uint2(static_cast<uint32_t>(bytes), static_cast<uint32_t>(bytes >> 32));
      }
      default: return load_bytes(source + chunk * kChunk, left < kChunk ? static_cast<int>(left) : kChunk, vectorized);
    }
  }

  __device__ uint2 codes(uint2 loaded) const {
    if (layout == Layout::kPacked) return nibbles_to_codes(loaded.x);
    if (layout != Layout::kPlanes) return loaded;
    uint2 codes = make_uint2(0, 0);
    for (int j = 0; j < bits; ++j) {
      const uint2 plane = plane_to_codes(byte_of(loaded, j), j);
      codes.x |= plane.x;
      codes.y |= plane.y;
    }
    return codes;
  }

  // The levels of 8 codes. shared_table: what fill_table made.
  __device__ __forceinline__ void levels(uint2 codes, const float* shared_table, float (&level)[kChunk]) const {
    if (looks_up) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) level[i] = shared_table[byte_of(codes, i)];
      return;
    }
    // The bits 0x4700cc00 are the float 32768 + c: one permutation instead of a conversion, which runs at a quarter of the rate.
    constexpr float kMagic = 32768.0f;
    constexpr uint32_t kMagicBits = 0x47000000u;
    const float shifted = add - kMagic * mul;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t bits_of_code = __byte_perm(i < 4 ? codes.x : codes.y, kMagicBits, 0x7504u | static_cast<uint32_t>(i % 4) << 4);
      level[i] = fmaf(mul, __uint_as_float(bits_of_code), shifted);
    }
  }

  __device__ void fill_table(float* shared_table) const {
    if (looks_up) {
      for (int i = threadIdx.x; i < kMaxLevels; i += blockDim.x) shared_table[i] = table[i];
    }
    __syncthreads();
  }
};

template <int ROWS, typename Mma>
class LevelLoader {
 public:
  using Source = LevelRows;
  __device__ LevelLoader(const LevelRows& source, int64_t first_row) : source_(source), first_row_(first_row), table_(shared_table()) {
    source_.fill_table(table_);
  }

  __device__ __forceinline__ void fetch(int, int k_tile, uint8_t*) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) fetched_[i] = source_.load(first_row_ + row(i), static_cast<int64_t>(k_tile) * 4 + threadIdx.x % 4);
  }
  __device__ __forceinline__ void commit(uint8_t* target) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float level[kChunk];
      source_.levels(source_.codes(fetched_[i]), table_, level);
      *reinterpret_cast<uint4*>(target + tile_offset(row(i), threadIdx.x % 4)) = make_uint4(
          Mma::pack(level[0], level[1]), Mma::pack(level[2], level[3]), Mma::pack(level[4], level[5]), Mma::pack(level[6], level[7]));
    }
  }

 private:
  static constexpr int kLoads = ROWS * 4 / kTileThreads;
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 4 + i * (kTileThreads / 4); }
  static __device__ float* shared_table() {
    __shared__ float table[kMaxLevels];
    return table;
  }

  const LevelRows& source_;
  int64_t first_row_;
  float* table_;
  uint2 fetched_[kLoads];
};
template <int ROWS>
using BFloat16Loader = LevelLoader<ROWS, MmaBFloat16>;
template <int ROWS>
using Float16Loader = LevelLoader<ROWS, MmaFloat16>;

constexpr int kRealM = 32, kRealN = 64, kRealK = 32, kRealThreads = 128;

// float32: a thread sums 4 x 4 of y.
__global__ __launch_bounds__(kRealThreads) void float32_kernel(const float* x, bool vectorized, const __grid_constant__ LevelRows w_rows,
                                                               const __grid_constant__ RealEpilogue epilogue) {
  __shared__ __align__(16) float x_tile[kRealK][kRealM + 4];  // K first: the 4 values a thread needs are one vector
  __shared__ __align__(16) float w_tile[kRealK][kRealN + 4];
  __shared__ float table[kMaxLevels];
  w_rows.fill_table(table);

  const Output& output = epilogue.output;
  const int64_t k = w_rows.k;
  const int64_t tiles_m = (output.m + kRealM - 1) / kRealM;
  const int64_t first_m = blockIdx.x % tiles_m * kRealM, first_n = blockIdx.x / tiles_m * kRealN;
  const int chunk_in_tile = threadIdx.x % 4;
  const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
  float sums[4][4] = {};
  for (int64_t first_k = 0; first_k < k; first_k += kRealK) {
    const int64_t column = first_k + chunk_in_tile * kChunk;
    const int64_t left = k - column < 0 ? 0 : k - column;
    const int count = left < kChunk ? static_cast<int>(left) : kChunk;
    {
      const int row = threadIdx.x / 4;
      float values[kChunk];
      const bool exists = first_m + row < output.m;
      load_chunk(values, x, DType::kFloat32, exists ? (first_m + row) * k + column : 0, exists ? count : 0, vectorized);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x_tile[chunk_in_tile * kChunk + i][row] = values[i];
    }
#pragma unroll
    for (int half = 0; half < kRealN / 32; ++half) {
      const int row = threadIdx.x / 4 + half * 32;
      float level[kChunk];
      w_rows.levels(w_rows.codes(w_rows.load(first_n + row, column / kChunk)), table, level);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) w_tile[chunk_in_tile * kChunk + i][row] = level[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRealK; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&x_tile[i][m]);
      const float4 b = *reinterpret_cast<const float4*>(&w_tile[i][n]);
      const float a_values[4] = {a.x, a.y, a.z, a.w}, b_values[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] = fmaf(a_values[r], b_values[c], sums[r][c]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (first_m + m + r < output.m && first_n + n + c < output.n)
        store_element(epilogue, first_m + m + r, first_n + n + c, sums[r][c], 0, 0);
    }
  }
}

LevelRows level_rows(const char* op, const Operand& w, int64_t n, int64_t k) {
  check_grid(w.grid);
  check(w.layout != Layout::kValues && w.layout != Layout::kEvenOdd, op, ": expected w in layout codes, packed or planes, got ",
        to_string(w.layout), "; use layout codes");
  check(w.layout != Layout::kPacked || w.grid.bits <= 4, op, ": expected w of at most 4 bits in layout packed, got ", to_string(w.grid),
        "; use layout codes");
  check(w.index == nullptr, op, ": expected w without a 4:8 index, got one; use gemm_sparse");
  if (w.layout != Layout::kCodes) check_aligned(op, "w", w.data);
  LevelRows rows{};
  rows.data = static_cast<const uint8_t*>(w.data);
  rows.layout = w.layout;
  rows.bits = w.grid.bits;
  rows.rows = n;
  rows.k = k;
  rows.row_bytes = row_bytes(w.layout, k);
  rows.plane_bytes = n * rows.row_bytes;
  rows.vectorized = is_aligned(w.data, 8) && k % 8 == 0;
  rows.looks_up = w.grid.kind == GridKind::kFp4 || w.grid.kind == GridKind::kGauss;
  if (rows.looks_up) {
    for (int32_t code = 0; code < level_count(w.grid); ++code) rows.table[code] = code_level(w.grid, code);
  } else {
    const Affine map = affine(w.grid, Layout::kCodes);
    rows.mul = static_cast<float>(map.mul);
    rows.add = static_cast<float>(map.add);
  }
  return rows;
}

// At most plan_weight_only_rows rows, if their kernel takes these operands: true if it has been launched.
template <typename Mma>
bool weight_only_held(const char* op, const void* x, const Operand& w, const RealEpilogue& epilogue, int64_t k, const Device& device,
                      cudaStream_t stream) {
  const int64_t m = epilogue.output.m, n = epilogue.output.n;
  const bool even_steps = w.grid.kind != GridKind::kFp4 && w.grid.kind != GridKind::kGauss;
  const bool bytes = w.layout == Layout::kCodes;
  if (m > plan_weight_only_rows(device.compute_capability) || k == 0) return false;
  if (!is_aligned(x, 16) || !is_aligned(w.data, 16) || k % 8 != 0 || (bytes && (!even_steps || k % 16 != 0))) return false;
  if (w.layout == Layout::kPlanes && (w.grid.kind != GridKind::kInt || w.grid.bits > 3)) return false;
  constexpr int64_t kMostColumns = INT32_MAX / 4;  // columns beyond the last are reckoned with
  check(k <= kMostColumns, op, ": expected k <= ", kMostColumns, ", got ", k, "; split the columns");
  HeldProblem problem{};
  problem.w = static_cast<const uint8_t*>(w.data);
  problem.k = static_cast<int32_t>(k);
  problem.w_row_bytes = static_cast<uint32_t>(row_bytes(w.layout, k));
  problem.w_plane_bytes = n * row_bytes(w.layout, k);
  problem.output = epilogue.output;
  problem.w_scale = epilogue.w_scale;
  problem.unit = even_steps ? std::ldexp(1.0f, kHeldLevelShift<Mma>) : 1.0f;
  if (even_steps) {
    const Affine map = affine(w.grid, Layout::kCodes);
    auto step = [&](int bit) { return std::ldexp(static_cast<float>(map.mul), Mma::kSmallest - kHeldLevelShift<Mma> - bit); };
    problem.mul[0] = pair_of<Mma>(step(0));
    problem.mul[1] = pair_of<Mma>(step(4));
    problem.add = pair_of<Mma>(std::ldexp(static_cast<float>(map.add), -kHeldLevelShift<Mma>));
  } else {
    uint8_t low[16] = {}, high[16] = {};
    for (int32_t code = 0; code < level_count(w.grid); ++code) {
      const uint32_t bits = pair_of<Mma>(code_level(w.grid, code));
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
    std::memcpy(&problem.low_table, low, 16);
    std::memcpy(&problem.high_table, high, 16);
  }
  const HeldPlan plan = plan_held(device.compute_capability);
  // After the first rows the weight comes from the L2 cache.
  for (int64_t first = 0; first < m; first += plan.rows) {
    problem.x = static_cast<const uint8_t*>(x) + first * k * 2;
    problem.output.m = std::min<int64_t>(plan.rows, m - first);
    problem.output.y = static_cast<uint8_t*>(epilogue.output.y) + first * n * 2;
    auto run = [&](auto weight) {
      using W = decltype(weight);
      if (plan.warps == 4) return launch_held<Mma, W, 1, 4>(op, problem, device, stream);
      problem.output.m > 8 ? launch_held<Mma, W, 2, 8>(op, problem, device, stream)
                           : launch_held<Mma, W, 1, 8>(op, problem, device, stream);
    };
    switch (w.layout) {
      case Layout::kPacked: even_steps ? run(HeldNibbles<Mma>{}) : run(HeldTable{}); break;
      case Layout::kPlanes:
        w.grid.bits == 1 ? run(HeldPlanes<Mma, 1>{}) : w.grid.bits == 2 ? run(HeldPlanes<Mma, 2>{}) : run(HeldPlanes<Mma, 3>{});
        break;
      default: run(HeldBytes<Mma>{});
    }
  }
  return true;
}

constexpr int kBiasThreads = 256;

__global__ __launch_bounds__(kBiasThreads) void add_bias_kernel(const float* bias, void* y, DType dtype, int64_t n, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBiasThreads + threadIdx.x;
  if (index >= count) return;
  float value[kChunk];
  load_chunk(value, y, dtype, index, 1, false);
  value[0] += bias[index % n];
  store_chunk(y, value, dtype, index, 1, false);
}

}  // namespace

bool weight_only_dequantizes(const Operand& w, DType dtype, int64_t m, int64_t n, int64_t k) {
  if (dtype == DType::kFloat32 || k == 0) return false;
  const Device device = current_device("gemm_weight_only");
  return m > plan_weight_only_rows(device.compute_capability) &&
         !(device.hopper_code && (plan_fixed(w.grid, w.layout, m, n, k) || plan_widened(w.grid, w.layout, m, n, k, device.sm_count)));
}

void add_bias(const float* bias, void* y, DType dtype, int64_t m, int64_t n, cudaStream_t stream) {
  const char* op = "gemm_weight_only";
  if (m * n == 0) return;
  launch(op, add_bias_kernel, grid_of(op, (m * n + kBiasThreads - 1) / kBiasThreads), dim3(kBiasThreads), 0, stream, bias, y, dtype, n,
         m * n);
}

void gemm_weight_only(const void* x, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                      cudaStream_t stream) {
  const char* op = "gemm_weight_only";
  const LevelRows w_rows = level_rows(op, w, n, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const RealEpilogue epilogue{make_output(y, dtype, bias, m, n), w.scale};
  if (dtype == DType::kFloat32) {
    const int64_t tiles = (m + kRealM - 1) / kRealM * ((n + kRealN - 1) / kRealN);
    launch(op, float32_kernel, grid_of(op, tiles), dim3(kRealThreads), 0, stream, static_cast<const float*>(x),
           is_aligned(x, 16) && k % 8 == 0, w_rows, epilogue);
    return;
  }
  if (gemm_widened_wgmma(op, x, w, epilogue.output, k, device, stream)) return;
  if (gemm_weight_only_wgmma(op, x, w, epilogue.output, k, device, stream)) return;
  const bool bfloat16 = dtype == DType::kBFloat16;
  if (bfloat16 ? weight_only_held<MmaBFloat16>(op, x, w, epilogue, k, device, stream)
               : weight_only_held<MmaFloat16>(op, x, w, epilogue, k, device, stream)) {
    return;
  }
  const GemmTile tile = plan_mma_sync(GemmFamily::kWeightOnly, m, n, device.sm_count);
  const ByteRows x_rows = plain_rows(x, m, k * element_size(dtype));
  if (bfloat16) {
    launch_tile<MmaBFloat16, ByteLoader, BFloat16Loader>(op, tile, x_rows, w_rows, steps_of(x_rows.row_bytes), epilogue, stream);
  } else {
    launch_tile<MmaFloat16, ByteLoader, Float16Loader>(op, tile, x_rows, w_rows, steps_of(x_rows.row_bytes), epilogue, stream);
  }
}

}  // namespace quest::cuda
