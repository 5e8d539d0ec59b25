// gemm_weight_only: y = x (s_w level(c_w))^T + bias for real x. Codes are widened to x's type in registers, the row scale is applied to the
// sum.
//
// bfloat16 and float16: tensor cores with float32 sums; the kernel for few rows (gemm_skinny.cuh), 16 at a time, or the tiled one of all
// families. Integer levels of up to 8 bits are exact in both types; gauss levels are rounded to them. At most 4 rows by one plane: x as 16
// planes of fixed-point numbers, on the 1-bit tensor cores (FixedPlanes), where a weight takes no instruction to widen. float32: fused
// multiply-adds in float32, 32 x 64 of y per thread block.
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "common/gemm_skinny.cuh"
#include "common/gemm_tile.cuh"
#include "quest/cuda/gemm.h"

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

// ---- at most 16 rows: weights to pairs of 16-bit floats. A pair are two columns whose codes fall out of one shift: i and i + 4 of 8 for
// nibbles, i and i + 16 of 32 for bits. order: kOrdered times 8 neighbouring columns of x, as many words of such pairs. kTeamWarps: such
// that a warp has several slices of a row.

// 4-bit codes of a grid of equal steps: bits of a code below those of a power of two are a float that is exactly so much larger.
template <typename Mma>
struct FloatNibbles : PackedColumns {
  static constexpr int kOrdered = 1, kTeamWarps = 8;
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint32_t codes = word_of(loaded, part) >> 8 * p;
    auto pair = [&](uint32_t two) {
      const uint32_t exact = Mma::fma((two & 0x000F000Fu) | Mma::kShift, Mma::kOne, Mma::kMinusShift);
      return Mma::fma(exact, source.mul_pair, source.add_pair);
    };
    return make_uint2(pair(codes), pair(codes >> 4));
  }
  static __device__ __forceinline__ void order(uint4 (&x)[1]) {
    x[0] = make_uint4(__byte_perm(x[0].x, x[0].z, 0x5410), __byte_perm(x[0].x, x[0].z, 0x7632), __byte_perm(x[0].y, x[0].w, 0x5410),
                      __byte_perm(x[0].y, x[0].w, 0x7632));
  }
};

// 4-bit codes of any grid.
struct FloatTable : PackedColumns {
  static constexpr int kOrdered = 1, kTeamWarps = 8;
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint32_t codes = word_of(loaded, part) >> 16 * p;
    const uint32_t low = look_up_nibbles(source.table, codes), high = look_up_nibbles(source.high_table, codes);
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
  }
  static __device__ __forceinline__ void order(uint4 (&)[1]) {}
};

// Codes of a byte, of a grid of equal steps.
template <typename Mma>
struct FloatBytes : ByteColumns {
  static constexpr int kOrdered = 1, kTeamWarps = 8;
  __device__ __forceinline__ uint2 words(const SkinnyRows& source, int part, int p) const {
    const uint32_t codes = word_of(loaded[part / 2], part % 2 * 2 + p);
    auto level = [&](uint32_t selector) {  // 0x4700cc00 is the float 32768 + c
      return fmaf(source.mul, __uint_as_float(__byte_perm(codes, 0x47000000u, selector)), source.add - 32768.0f * source.mul);
    };
    return make_uint2(Mma::pack(level(0x7504u), level(0x7514u)), Mma::pack(level(0x7524u), level(0x7534u)));
  }
  static __device__ __forceinline__ void order(uint4 (&)[1]) {}
};

// Bit planes of an int grid: the sum of 2^j with the sign of plane j.
template <typename Mma, int BITS>
struct FloatPlanes {
  static constexpr int kOrdered = 4, kTeamWarps = 2;
  static constexpr int kDepth = 4, kLaneColumns = 128, kLaneBytes = 16;
  uint4 loaded[BITS];
  __device__ __forceinline__ void load(const SkinnyRows& source, const uint8_t* row, uint32_t byte) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) loaded[j] = load_weight(source, row + j * source.plane_bytes, byte);
  }
  __device__ __forceinline__ uint2 words(const SkinnyRows&, int part, int p) const {
    uint32_t pairs[2];
#pragma unroll
    for (int j = 0; j < BITS; ++j) {
      // 2^j in the exponent, the sign of a bit that is not set.
      const uint32_t minus = (Mma::kOne | 0x80008000u) + static_cast<uint32_t>(j) * Mma::kExponentStep;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = (word_of(loaded[j], part / 4) << (15 - (part % 4 * 4 + 2 * p + i)) & 0x80008000u) ^ minus;
        pairs[i] = j == 0 ? pair : Mma::fma(pair, Mma::kOne, pairs[i]);
      }
    }
    return make_uint2(pairs[0], pairs[1]);
  }
  static __device__ __forceinline__ void order(uint4 (&x)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns 8 half ... and those 16 further
      const uint4 low = x[half], high = x[half + 2];
      const uint4 first = make_uint4(__byte_perm(low.x, high.x, 0x5410), __byte_perm(low.x, high.x, 0x7632),
                                     __byte_perm(low.y, high.y, 0x5410), __byte_perm(low.y, high.y, 0x7632));
      const uint4 second = make_uint4(__byte_perm(low.z, high.z, 0x5410), __byte_perm(low.z, high.z, 0x7632),
                                      __byte_perm(low.w, high.w, 0x5410), __byte_perm(low.w, high.w, 0x7632));
      x[half] = first, x[half + 2] = second;
    }
    const uint4 third = x[1];  // parts 0 and 1 are of the columns 0 to 7, 2 and 3 of those from 8 on
    x[1] = x[2], x[2] = third;
  }
};

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
  check(w.layout != Layout::kValues, op, ": expected w in layout codes, packed or planes, got values; use layout codes");
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

// The bits of a number twice, in Mma's type.
template <typename Mma>
uint32_t pair_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if constexpr (std::is_same_v<Mma, MmaBFloat16>) {
    bits = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  } else {
    bits = __half_as_ushort(__float2half_rn(value));
  }
  return bits | bits << 16;
}

// Few rows of x by one plane of w on the 1-bit tensor cores, if x fits: true if it has been launched.
template <typename Mma>
bool weight_only_fixed(const char* op, const void* x, const Operand& w, const RealEpilogue& epilogue, int64_t k, const Device& device,
                       cudaStream_t stream) {
  using Planes = FixedPlanes<Mma>;
  const int64_t m = epilogue.output.m, n = epilogue.output.n;
  const int64_t rows = plan_fixed_rows(m, k, device.compute_capability);
  if (rows == 0) return false;
  SkinnyRows x_rows{};
  x_rows.data = static_cast<const uint8_t*>(x);
  x_rows.rows = static_cast<uint32_t>(m);
  x_rows.row_bytes = static_cast<uint32_t>(2 * k);
  const Affine map = affine(w.grid, Layout::kPlanes);  // FixedPlanes::row_factors has the -1 of v = 2 c - 1: minus the row's sum
  IntegerEpilogue integers{};
  integers.output = epilogue.output;
  integers.w_scale = epilogue.w_scale;
  integers.mul = static_cast<uint32_t>(map.mul);
  check(map.add == -1, op, ": expected values 2 c - 1 of a plane");
  auto run = [&](auto tiles_m) {
    launch_skinny_tiles<MmaBits, SkinnyBytes, Planes, tiles_m()>(op, x_rows, skinny_rows(w, n, k), integers, device, stream);
  };
  switch (rows) {
    case 1: run(std::integral_constant<int, 2>()); break;
    case 2: run(std::integral_constant<int, 4>()); break;
    default: run(std::integral_constant<int, 8>());
  }
  return true;
}

// At most plan_weight_only_rows rows, if their kernel takes these operands: true if it has been launched.
template <typename Mma>
bool weight_only_skinny(const char* op, const void* x, const Operand& w, const RealEpilogue& epilogue, int64_t k, const Device& device,
                        cudaStream_t stream) {
  const int64_t m = epilogue.output.m, n = epilogue.output.n;
  const bool even_steps = w.grid.kind != GridKind::kFp4 && w.grid.kind != GridKind::kGauss;
  const bool bytes = w.layout == Layout::kCodes;
  if (!is_aligned(x, 16) || !is_aligned(w.data, 16) || k % 8 != 0 || (bytes && (!even_steps || k % 16 != 0))) return false;
  if (w.layout == Layout::kPlanes && (w.grid.kind != GridKind::kInt || w.grid.bits > 3)) return false;
  if (w.layout == Layout::kPlanes && w.grid.bits == 1 && weight_only_fixed<Mma>(op, x, w, epilogue, k, device, stream)) return true;
  if (!plan_skinny(GemmFamily::kWeightOnly, m, k, device.compute_capability)) return false;
  SkinnyRows rows = skinny_rows(w, n, k);
  rows.flip = 0;
  if (even_steps) {
    const Affine map = affine(w.grid, Layout::kCodes);
    rows.mul = static_cast<float>(map.mul);
    rows.add = static_cast<float>(map.add);
    rows.mul_pair = pair_of<Mma>(rows.mul);
    rows.add_pair = pair_of<Mma>(rows.add);
  } else {
    uint8_t low[16] = {}, high[16] = {};
    for (int32_t code = 0; code < level_count(w.grid); ++code) {
      const uint32_t bits = pair_of<Mma>(code_level(w.grid, code));
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
    std::memcpy(&rows.table, low, 16);
    std::memcpy(&rows.high_table, high, 16);
  }
  // As many rows at a time as fit in shared memory: after the first time the weight comes from the L2 cache.
  const int64_t step = plan_skinny_rows(GemmFamily::kWeightOnly, k, device.compute_capability);
  for (int64_t first = 0; first < m; first += step) {
    RealEpilogue part = epilogue;
    part.output.m = std::min(step, m - first);
    part.output.y = static_cast<uint8_t*>(epilogue.output.y) + first * n * 2;
    SkinnyRows x_rows{};
    x_rows.data = static_cast<const uint8_t*>(x) + first * k * 2;
    x_rows.rows = static_cast<uint32_t>(part.output.m);
    x_rows.row_bytes = static_cast<uint32_t>(2 * k);
    switch (w.layout) {
      case Layout::kPacked:
        even_steps ? launch_skinny<Mma, FloatNibbles<Mma>, ResidentFloats<FloatNibbles<Mma>>>(op, x_rows, rows, part, device, stream)
                   : launch_skinny<Mma, FloatTable, ResidentFloats<FloatTable>>(op, x_rows, rows, part, device, stream);
        break;
      case Layout::kPlanes:
        w.grid.bits == 1
            ? launch_skinny<Mma, FloatPlanes<Mma, 1>, ResidentFloats<FloatPlanes<Mma, 1>>>(op, x_rows, rows, part, device, stream)
        : w.grid.bits == 2
            ? launch_skinny<Mma, FloatPlanes<Mma, 2>, ResidentFloats<FloatPlanes<Mma, 2>>>(op, x_rows, rows, part, device, stream)
            : launch_skinny<Mma, FloatPlanes<Mma, 3>, ResidentFloats<FloatPlanes<Mma, 3>>>(op, x_rows, rows, part, device, stream);
        break;
      default: launch_skinny<Mma, FloatBytes<Mma>, ResidentFloats<FloatBytes<Mma>>>(op, x_rows, rows, part, device, stream);
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

bool weight_only_dequantizes(DType dtype, int64_t m, int64_t k) {
  return dtype != DType::kFloat32 && k > 0 && m > plan_weight_only_rows(k, current_device("gemm_weight_only").compute_capability);
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
  const bool bfloat16 = dtype == DType::kBFloat16;
  if (bfloat16 ? weight_only_skinny<MmaBFloat16>(op, x, w, epilogue, k, device, stream)
               : weight_only_skinny<MmaFloat16>(op, x, w, epilogue, k, device, stream)) {
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
