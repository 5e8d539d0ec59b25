// quantize: x_h = x H, sigma, codes, code sum, mask bits and 4:8 index in one pass: one read of x, one write of each output.
//
// Two kernels. Both keep a row of up to 32768 values (quantize_kernel with a prologue: 8192) in registers between sigma and the codes, and
// join the warps of a row through shared memory for its two sums (squares, codes).
//
// quantize_blocks_kernel takes what is common: equal steps between levels, rows that are whole blocks of 128 values, no sparsity, no
// prologue without a rotation. On Hopper memory gives an instruction budget of about 20 a value, so here everything is made of few: see
// there. Which kernel runs depends on the quantizer, on K and on addresses (multiples of 16 bytes), not on the layout or the number of
// rows: the codes are the same in all of them.
//
// quantize_kernel takes everything. A row belongs to one thread block (short rows: several rows a block, a warp each). Thread t holds the
// chunks t, t + T, ... of 8 values, so loads are coalesced and a rotation block of at most 128 values lies in at most 16 neighbouring lanes
// (hadamard.cuh). Rows that are too long for the registers are walked twice (with rms_norm three times), and later reads of x come from the
// cache or from memory. Its arithmetic is the CPU backend's, operation by operation, but for the order of the sum of squares: a code
// differs only where that moves x_h/s across a rounding boundary.
//
// A prologue works on what was loaded, before anything else, and leaves numbers of the same type: what follows does not know of it.
// rms_norm needs one more sum over the row first; its weight comes from the cache. Kernels without a prologue have no trace of one.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "common/check.h"
#include "common/grid.cuh"
#include "common/hadamard.cuh"
#include "common/ptx.cuh"
#include "quest/cuda/quantize.h"
#include "quest/packing.h"
#include "quest/plan.h"
#include "quest/rotation.h"

namespace quest::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;  // leaves a thread 128 registers, of which 8 chunks take 64

struct Problem {
  const void* x;
  Prologue prologue;
  DType dtype;
  int64_t rows, k;
  int64_t chunks;  // of a row with its padding
  int64_t code_row_bytes, mask_row_bytes, index_row_bytes;
  int block;     // of the rotation; 1: none
  float factor;  // 1/sqrt(block)
  bool sparse;
  QuantizeParams params;
  Layout layout;
  int bits;
  QuantizeOutput output;
  bool vectorized_input, vectorized_codes;
};

struct Row {
  float reciprocal;  // of the step between codes; 0 for a row of zeros
  float scale;
  float mask_limit;
};

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

__device__ __forceinline__ int32_t sum_over_warp(int32_t value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

// Sum over the threads of a row; every one of them gets it. partial: kWarpSize words that nothing else uses.
template <typename T>
__device__ T sum_over_row(T value, T* partial) {
  value = sum_over_warp(value);
  if (blockDim.x == kWarpSize) return value;
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return sum_over_warp(lane < static_cast<int>(blockDim.x / kWarpSize) ? partial[lane] : T(0));
}

// x/(1 + e^-x), off by at most some (|x| + 6) 2^-24 of it: the product with 1/ln(2) is rounded, and two approximations follow. (Rounded to
// bfloat16, one value in about 10000 is the neighbour of the right one; to float16, one in 1000.)
__device__ __forceinline__ float silu(float x) {
  constexpr float kOneOverLn2 = 1.44269504f;
  return x * reciprocal_approximate(1.0f + exp2_approximate(-kOneOverLn2 * x));
}

// What rms_norm multiplies by, of the sum of a row's squares.
__device__ __forceinline__ float norm_factor(float squares, float one_over_k, float epsilon) {
  return rsqrtf(fmaf(squares, one_over_k, epsilon));
}

template <typename Grid>
__device__ Row make_row(const QuantizeParams& params, const Grid& grid, float sigma) {
  Row row;
  row.scale = __fadd_rn(__fmul_rn(params.scale_factor, sigma), params.scale_epsilon);
  const float step = grid.step(row.scale);
  row.reciprocal = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
  switch (params.mask_kind) {
    case kMaskScale: row.mask_limit = __fmul_rn(params.mask_factor, row.scale); break;
    // k (alpha sigma + 1e-8) for int: the ratio of the scale's two terms is 1e-8/alpha
    case kMaskMagnitude:
      row.mask_limit = __fmul_rn(params.mask_factor, __fadd_rn(sigma, __fdiv_rn(params.scale_epsilon, params.scale_factor)));
      break;
    case kMaskError: row.mask_limit = __fmul_rn(params.mask_factor, sigma); break;
    default: row.mask_limit = INFINITY;
  }
  return row;
}

// The pairs that 4:8 sparsity keeps, as a mask of 4 bits: the 2 of largest norm; of equal ones the earlier.
__device__ __forceinline__ uint32_t kept_pairs(const float (&x)[kChunk]) {
  float norm[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) norm[p] = __fadd_rn(__fmul_rn(x[2 * p], x[2 * p]), __fmul_rn(x[2 * p + 1], x[2 * p + 1]));
  uint32_t kept = 0;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    int before = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q != p) before += (q < p ? norm[q] >= norm[p] : norm[q] > norm[p]) ? 1 : 0;
    }
    kept |= (before < 2 ? 1u : 0u) << p;
  }
  return kept;
}

// p0 | p1 << 2 of the two set bits p0 < p1 of `kept`.
__device__ __forceinline__ uint32_t pair_index(uint32_t kept) { return static_cast<uint32_t>(__ffs(kept) - 1) | (31u - __clz(kept)) << 2; }

// The kept 4 of 8 codes, in order, in one word.
__device__ __forceinline__ uint32_t keep_codes(uint2 codes, uint32_t index) {
  // Pair p is the bytes 2p and 2p + 1.
  const uint32_t first = (index & 3u) * 0x22u + 0x10u;
  const uint32_t second = (index >> 2) * 0x22u + 0x10u;
  return __byte_perm(codes.x, codes.y, first | second << 8);
}

// Everything that is written of one chunk. codes: 0 beyond the row's end and in rows that hold no numbers; stored: as layout kValues holds
// them.
__device__ void write_chunk(const Problem& problem, int64_t row, int64_t chunk, int count, uint2 codes, uint2 stored, uint32_t pairs) {
  const QuantizeOutput& output = problem.output;
  const int64_t bytes = problem.code_row_bytes;
  uint8_t* const target = static_cast<uint8_t*>(output.codes) + row * bytes;
  if (problem.sparse) {
    // An index byte holds two chunks: even lanes write.
    const uint32_t next = __shfl_down_sync(0xFFFFFFFFu, pairs, 1);
    if (chunk % 2 == 0 && chunk / 2 < problem.index_row_bytes) {
      output.index[row * problem.index_row_bytes + chunk / 2] = static_cast<uint8_t>(pairs | next << 4);
    }
  }
  switch (problem.layout) {
    case Layout::kCodes:
      if (!problem.sparse) {
        store_bytes(target + chunk * kChunk, codes, count, problem.vectorized_codes);
      } else if (count > 0) {
        store_bytes(target + chunk * (kChunk / 2), make_uint2(keep_codes(codes, pairs), 0), kChunk / 2, false);
      }
      break;
    case Layout::kValues: store_bytes(target + chunk * kChunk, stored, count, problem.vectorized_codes); break;
    case Layout::kPacked:
      if (!problem.sparse) {
        if (chunk * 4 < bytes) *reinterpret_cast<uint32_t*>(target + chunk * 4) = codes_to_nibbles(codes);
      } else if (chunk * 2 < bytes) {
        const uint32_t kept = codes_to_nibbles(make_uint2(keep_codes(codes, pairs), 0));
        *reinterpret_cast<uint16_t*>(target + chunk * 2) = static_cast<uint16_t>(kept);
      }
      break;
    case Layout::kEvenOdd:
      if (chunk * kChunk < bytes) store_even_odd(target, chunk, codes);
      break;
    case Layout::kPlanes:
      if (chunk < bytes) {
        for (int j = 0; j < problem.bits; ++j) target[j * problem.rows * bytes + chunk] = static_cast<uint8_t>(codes_to_plane(codes, j));
      }
      break;
  }
}

// Codes, mask and index of one chunk of x_h. Returns the sum of its stored codes.
template <typename Grid>
__device__ int32_t quantize_chunk(const Problem& problem, const Grid& grid, const float* table, const Row& row_params, bool finite,
                                  int64_t row, int64_t chunk, int count, const float (&x)[kChunk]) {
  const uint32_t kept = problem.sparse && finite ? kept_pairs(x) : problem.sparse ? 3u : 15u;
  uint32_t codes[2] = {0, 0}, stored[2] = {0, 0};
  uint32_t mask = 0;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < count && finite) {
      const bool keep = (kept >> (i / 2) & 1u) != 0;
      const uint32_t code = grid.code(__fmul_rn(x[i], row_params.reciprocal), table);
      codes[i / 4] |= code << (8 * (i % 4));
      if (keep) {
        if (problem.layout == Layout::kValues) stored[i / 4] |= grid.stored(code) << (8 * (i % 4));
        sum += static_cast<int32_t>(code);
      }
      float distance = fabsf(x[i]);
      if (problem.params.mask_kind == kMaskError) {
        const float level = keep ? grid.level(code, table) : 0.0f;
        distance = fabsf(__fsub_rn(__fmul_rn(row_params.scale, level), x[i]));
      }
      mask |= (distance <= row_params.mask_limit ? 1u : 0u) << i;
    }
  }
  if (problem.output.mask != nullptr && row < problem.rows && chunk < problem.mask_row_bytes) {
    problem.output.mask[row * problem.mask_row_bytes + chunk] = static_cast<uint8_t>(mask);
  }
  // Chunks beyond the end of the row have no index: their nibbles are padding.
  const uint32_t pairs = problem.sparse && count > 0 ? pair_index(kept) : 0u;
  if (row < problem.rows) {
    write_chunk(problem, row, chunk, count, make_uint2(codes[0], codes[1]), make_uint2(stored[0], stored[1]), pairs);
  }
  return sum;
}

template <DType DTYPE>
__device__ __forceinline__ void round_chunk(float (&x)[kChunk]) {
  RawChunk<DTYPE> rounded;
  rounded.from_floats(x);
  rounded.to_floats(x);
}

// To the nearest numbers of dtype.
__device__ __forceinline__ void round_chunk(float (&x)[kChunk], DType dtype) {
  if (dtype == DType::kBFloat16) round_chunk<DType::kBFloat16>(x);
  if (dtype == DType::kFloat16) round_chunk<DType::kFloat16>(x);
}

// blockDim: threads a row (whole warps), rows a block (1 when a row has several warps). CHUNKS: chunks a thread holds.
template <typename Grid, int CHUNKS, bool PROLOGUE>
__global__ __launch_bounds__(kMaxThreads) void quantize_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Grid grid) {
  __shared__ float table[Grid::kTableFloats];
  __shared__ float square_sums[kWarpSize];
  __shared__ int32_t code_sums[kWarpSize];
  grid.prepare(table);

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t k = row < problem.rows ? problem.k : 0;  // rows beyond the last one: nothing to load
  const int64_t pass = static_cast<int64_t>(blockDim.x) * CHUNKS;
  const bool in_registers = problem.chunks <= pass;

  const bool gated = PROLOGUE && problem.prologue.kind == PrologueKind::kSiluMul;
  const bool normalized = PROLOGUE && problem.prologue.kind == PrologueKind::kRmsNorm;

  float x[CHUNKS][kChunk];
  auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int64_t column = (first + i * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kChunk;
      const int64_t left = k - column;
      const int count = static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk);
      const int64_t start = row * (gated ? 2 * k : k);
      load_chunk(x[i], problem.x, problem.dtype, start + column, count, problem.vectorized_input);
      if (gated) {
        float up[kChunk];
        load_chunk(up, problem.x, problem.dtype, start + k + column, count, problem.vectorized_input);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[i][j] = silu(x[i][j]);
        round_chunk(x[i], problem.dtype);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[i][j] *= up[j];
        round_chunk(x[i], problem.dtype);
      }
    }
  };
  float factor = 0.0f;  // of rms_norm
  auto normalize = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int64_t column = (first + i * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kChunk;
      const int64_t left = k - column;
      float weight[kChunk];
      load_chunk(weight, problem.prologue.weight, problem.dtype, column,
                 static_cast<int>(left < 0        ? 0
                                  : left < kChunk ? left
                                                  : kChunk),
                 problem.vectorized_input);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[i][j] = x[i][j] * factor * weight[j];
      round_chunk(x[i], problem.dtype);
    }
  };
  auto add_squares = [&](float& sum) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum = fmaf(x[i][j], x[i][j], sum);
    }
  };

  if (normalized) {
    __shared__ float input_sums[kWarpSize];
    float input_squares = 0.0f;
    for (int64_t first = 0; first < problem.chunks; first += pass) {
      load(first);
      add_squares(input_squares);
    }
    factor = norm_factor(sum_over_row(input_squares, input_sums), 1.0f / static_cast<float>(problem.k), problem.prologue.epsilon);
  }
  float squares = 0.0f;
  for (int64_t first = 0; first < problem.chunks; first += pass) {
    if (!normalized || !in_registers) load(first);
    if (normalized) normalize(first);
    add_squares(squares);
  }
  squares = sum_over_row(squares, square_sums);
  if (blockDim.x == kWarpSize) __syncthreads();  // for `table`; longer rows have met in the sum
  const bool finite = squares <= kLargestFloat;
  const Row row_params =
      make_row(problem.params, grid, problem.k > 0 ? __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(problem.k))) : 0.0f);

  int32_t code_sum = 0;
  for (int64_t first = 0; first < problem.chunks; first += pass) {
    if (!in_registers) {
      load(first);
      if (normalized) normalize(first);
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (problem.block > 1) {
        hadamard_warp(x[i], problem.block);
        multiply(x[i], problem.factor);
      }
      const int64_t chunk = first + i * static_cast<int64_t>(blockDim.x) + threadIdx.x;
      const int64_t left = k - chunk * kChunk;
      code_sum += quantize_chunk(problem, grid, table, row_params, finite, row, chunk,
                                 static_cast<int>(left < 0        ? 0
                                                  : left < kChunk ? left
                                                                  : kChunk),
                                 x[i]);
    }
  }
  code_sum = sum_over_row(code_sum, code_sums);
  if (threadIdx.x == 0 && row < problem.rows) {
    problem.output.scale[row] = finite ? row_params.scale : NAN;
    problem.output.code_sum[row] = code_sum;
  }
}

// ---- the common case

constexpr int kMaxRowWarps = 32;
constexpr int kWarpBlocks = 8;  // blocks of 128 values that a warp holds, a quad of lanes each

// How codes are made: one bit is a comparison; int4 as nibbles and int2 as planes have an instruction that clamps and packs two of them.
enum class CodeKind : int32_t { kNibble, kTwoBits, kBit, kAny };

// The registers hold x_h/gain: what the rotation multiplies by is part of the factors that follow it.
struct BlocksProblem {
  // What most launches need, in the first lines of a kernel's parameters: each line takes its time to come.
  const uint8_t* x;
  uint8_t* codes;
  float* scale;
  int32_t* code_sum;
  uint8_t* mask;  // or nullptr
  int32_t rows;
  int32_t blocks;     // of a row
  float mean_factor;  // from the sum of squares that registers give to their mean over K
  float scale_factor, scale_epsilon;
  float gain_over_steps;
  float limit_factor, limit_add;  // of the mask, in registers' units: limit_factor sigma + limit_add
  bool error_mask;                // the mask compares |x-hat - x_h|, not |x_h|
  CodeKind code_kind;
  Layout layout;
  float shift;            // code = rint(x_h/step + shift) + offset
  float boundary_factor;  // of one bit, times scale
  float one;              // 1: to multiply by it is to ask for this line
  // And what some need.
  int64_t plane_bytes;
  uint32_t offset, largest_code;    // each twice, in 16 bits
  uint32_t stored_mul, stored_add;  // layout kValues, four bytes: (mul c + add) ^ 0x80 in each
  float level_mul, level_add;       // x-hat/s = level_mul code + level_add
  float inverse_gain;
  float norm_epsilon, one_over_k;
  const uint8_t* norm_weight;
  int32_t bits;
};
// Parameters begin 16 bytes into a line of 64, on Hopper.
static_assert((16 + offsetof(BlocksProblem, one)) / 64 == (16 + offsetof(BlocksProblem, mean_factor)) / 64, "the line of mean_factor");

// The instructions for pairs of a 16-bit type.
template <DType DTYPE>
using PairOf = std::conditional_t<DTYPE == DType::kBFloat16, MmaBFloat16, MmaFloat16>;

// gate becomes silu(gate), rounded, times up, rounded.
template <DType DTYPE>
__device__ __forceinline__ void silu_mul(RawChunk<DTYPE>& gate, const RawChunk<DTYPE>& up) {
  float x[kChunk];
  gate.to_floats(x);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = silu(x[j]);
  gate.from_floats(x);
  auto product = [](uint32_t a, uint32_t b) {
    if constexpr (DTYPE == DType::kFloat32) {
      return __float_as_uint(__uint_as_float(a) * __uint_as_float(b));
    } else {  // two products a word, each rounded once, as from float32, which holds it exactly; -0 added keeps every sign
      return PairOf<DTYPE>::fma(a, b, 0x80008000u);
    }
  };
#pragma unroll
  for (int i = 0; i < RawChunk<DTYPE>::kBytes / 16; ++i) {
    uint4& a = gate.vectors[i];
    const uint4 b = up.vectors[i];
    a = make_uint4(product(a.x, b.x), product(a.y, b.y), product(a.z, b.z), product(a.w, b.w));
  }
}

__device__ __forceinline__ float sum_of_squares(const float (&x)[kQuadValues]) {
  float partial[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sums that do not wait for each other
#pragma unroll
  for (int i = 0; i < kQuadValues; ++i) partial[i % 4] = fmaf(x[i], x[i], partial[i % 4]);
  return (partial[0] + partial[1]) + (partial[2] + partial[3]);
}

// Of the warps of a row, in shared memory.
using WarpSums = float4[kMaxRowWarps / 4 + 1];  // the last warp leaves zeros up to a whole vector
struct RowSums {
  WarpSums squares;
  uint32_t codes;  // of those that have arrived, and how many these are: kArrival each
};
constexpr uint32_t kArrival = 1u << 24;  // more than 32768 codes of 8 bits
static_assert(kMaxRowWarps * kWarpBlocks * kQuadBlock * 255 < kArrival && kMaxRowWarps < 256, "a word holds both");
static_assert(sizeof(RowSums) + sizeof(WarpSums) <= kSpreadStaticBytes, "as planned");  // rms_norm has a second sum

// Sum over the warps of a row; every thread gets it.
__device__ __forceinline__ float sum_over_warps(float value, WarpSums& sums, int warps) {
  if (warps == 1) return value;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane < (warp + 1 == warps ? 4 : 1)) reinterpret_cast<float*>(sums)[warp + lane] = lane == 0 ? value : 0.0f;
  __syncthreads();
  auto sum_of_four = [&](int i) {
    const float4 four = sums[i];
    return (four.x + four.y) + (four.z + four.w);
  };
  float sum = sum_of_four(0);
#pragma unroll
  for (int i = 1; i < kMaxRowWarps / 4; ++i) {
    if (4 * i >= warps) break;
    sum += sum_of_four(i);
  }
  return sum;
}

// A lane's chunks 2t, 2t + 1, 8 + 2t, 9 + 2t have a byte each in `word`. Neighbouring lanes exchange halves, so that each has 4 bytes of
// the 16 of its block that lie side by side, from gathered_byte() on: the lanes of a quad those at byte 0, 8, 4, 12.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t word) {
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, word, 1);
  return __byte_perm(word, other, (threadIdx.x & 1) == 0 ? 0x5410 : 0x3276);
}
__device__ __forceinline__ uint32_t gathered_byte() { return (threadIdx.x & 1) * 8 + (threadIdx.x & 2) * 2; }

// The squares of a row over those of what the products of its rotation on the tensor cores give: 32 sums of 32 values, each over 16.
constexpr float kSquaresOver = 8.0f;

// The rotation of a lane's 32 values (four chunks of 16-bit values) on the tensor cores, without moving a value between lanes. A of a
// product holds 16 runs of 16 values, two words of a chunk in the four lanes of a quad; B is +-H_16/16: exact in both types, products are
// exact and sums are in float32. B's columns have the order of a run. A second product adds or subtracts the neighbouring chunk; strides 2
// and 64 remain for the registers. Gives x H/16 = x_h/sqrt(2). Returns this lane's share of the squares over kSquaresOver: those of what
// the products give. (Squares by the tensor cores, of whose sums one in eight would be of use, cost more; so do more products instead
// of the additions of stride 64.)
template <DType DTYPE>
__device__ __forceinline__ float hadamard_tensor_cores(float (&x)[kQuadValues], const RawChunk<DTYPE> (&raw)[4]) {
  // Entry (k, n) of H_16 is -1 to the number of bits that k and n share. This lane's are k = 2t, 2t + 1 (and 8 more) of column lane/4 (and
  // 8 more): the last two differ in the sign where both are the upper ones.
  constexpr uint32_t kSixteenth = DTYPE == DType::kBFloat16 ? 0x3D80u : 0x2C00u;
  using Mma = PairOf<DTYPE>;
  const uint32_t column = threadIdx.x % kWarpSize / 4;
  const uint32_t low = __popc(2 * (threadIdx.x % 4) & column) & 1;
  const uint32_t high = low ^ (column & 1);
  const uint32_t plus = (kSixteenth | low << 15) | (kSixteenth | high << 15) << 16;
  const uint32_t minus = plus ^ 0x80008000u;
  // A product takes a pair of neighbouring registers. That a thread block has no second and third coordinate is not known to the compiler:
  // it keeps all pairs, instead of copying one together for each product (1 % at K = 11008).
  const uint32_t y = blockIdx.y, z = blockIdx.z;
  const uint32_t both_plus[2] = {plus, plus ^ y}, both_minus[2] = {minus, minus ^ y};
  const uint32_t plus_minus[2] = {plus ^ z, minus ^ z}, minus_plus[2] = {minus ^ (y | z), plus ^ (y | z)};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint4 first = raw[i].vectors[0], second = raw[i + 1].vectors[0];
    const uint32_t a[4] = {first.x, first.y, first.z, first.w};
    const uint32_t b[4] = {second.x, second.y, second.z, second.w};
    float sums[4][4] = {};  // four values side by side each: two for the first chunk, two for the second
    auto add = [&](int to, const uint32_t(&runs)[4], const uint32_t(&signs)[2]) { Mma::mma(sums[to], runs, signs[0], signs[1]); };
    add(0, a, both_plus);
    add(1, a, plus_minus);
    add(2, a, both_plus);
    add(3, a, plus_minus);
    add(0, b, both_plus);
    add(1, b, plus_minus);
    add(2, b, both_minus);
    add(3, b, minus_plus);
#pragma unroll
    for (int j = 0; j < 2 * kChunk; ++j) x[i * kChunk + j] = sums[j / 4][j % 4];
  }
  const float squares = sum_of_squares(x);
  butterfly<kQuadValues, 2>(x);
  butterfly<kQuadValues, 16>(x);
  return squares;
}

// 32 integers as numbers of 2 bits, those beyond 0 ... 3 as the nearest: the even ones' and the odd ones', each from the lowest bits on.
template <typename Integer>
__device__ __forceinline__ uint2 pack_evens_and_odds(const Integer& integer) {
  uint2 words{};
#pragma unroll
  for (int i = kQuadValues - 4; i >= 0; i -= 4) {
    words.x = pack_two_bits(integer(i), integer(i + 2), words.x);
    words.y = pack_two_bits(integer(i + 1), integer(i + 3), words.y);
  }
  return words;
}

// Which of 32 numbers are positive, the first one's bit lowest; number(i) gives them. As integers, floats have their signs: of two bits,
// positive ones are 3, others 0. (One or two units of 2^-149 would not be; numbers as near as that are compared only in float32 rows whose
// sigma is 0.)
template <typename Number>
__device__ __forceinline__ uint32_t gather_positive(const Number& number) {
  const auto [even, odd] = pack_evens_and_odds([&](int i) { return __float_as_uint(number(i)); });
  return (even & 0x55555555u) | (odd & 0xAAAAAAAAu);
}

// x_h/step + shift, rounded. The CPU rounds twice, to this and then to an integer: so does this kernel, or what lies just above a boundary
// at 0 would be on the other side.
__device__ __forceinline__ float shifted(const BlocksProblem& problem, float x, float slope) { return __fmaf_rn(x, slope, problem.shift); }

// Where the error |x-hat - x_h| exceeds the limit.
__device__ __forceinline__ uint32_t fails_of_error(const BlocksProblem& problem, const float (&x)[kQuadValues], float slope, float limit,
                                                   float register_scale) {
  const float largest = static_cast<float>(problem.largest_code & 0xFFFFu), offset = static_cast<float>(problem.offset & 0xFFFFu);
  return gather_positive([&](int i) {
    const float code = __fadd_rn(shifted(problem, x[i], slope), kIntegerFloat) - (kIntegerFloat - offset);
    const float clamped = fminf(fmaxf(code, 0.0f), largest);
    return fabsf(fmaf(fmaf(clamped, problem.level_mul, problem.level_add), register_scale, -x[i])) - limit;
  });
}

// ---- codes of 32 values. They write those of a block that exists and return their sum. all: ones, or zeros for a row without numbers,
// whose codes are 0.

// int1 as a plane: a bit is set above the boundary, which lies where the CPU's first rounding (see `shifted`) leaves more than 1/2.
__device__ __forceinline__ uint32_t write_bits(const BlocksProblem& problem, const float (&x)[kQuadValues], float boundary, uint32_t all,
                                               uint32_t block, bool exists) {
  const uint32_t bits = gather_positive([&](int i) { return x[i] - boundary; }) & all;
  const uint32_t gathered = gather_bytes(bits);
  if (exists) *reinterpret_cast<uint32_t*>(problem.codes + (uint64_t{block} * 16 + gathered_byte())) = gathered;
  return __popc(bits);
}

// Of int grids: 2^(bits - 1) - rint(x_h/step + shift), which is the largest code less the code. A float below 2^-126 has the bits of an
// integer: its multiple of 2^-149. One addition so rounds to an integer, ties to even, which the conversion to 2 or 4 bits clamps and
// packs; a negative one is a negative integer for it. (To keep the CPU's ties, what is added must be even.)
template <int BITS>
__device__ __forceinline__ uint32_t complement(const BlocksProblem& problem, float x, float slope) {
  constexpr float kUnit = 0x1p-149f;
  static_assert(BITS > 1, "1 is odd");
  return __float_as_uint(__fmaf_rn(shifted(problem, x, slope), -kUnit, (1 << (BITS - 1)) * kUnit));
}

// int2 as planes.
__device__ __forceinline__ uint32_t write_two_planes(const BlocksProblem& problem, const float (&x)[kQuadValues], float slope, uint32_t all,
                                                     uint32_t block, bool exists) {
  const auto [even, odd] = pack_evens_and_odds([&](int i) { return complement<2>(problem, x[i], slope); });
  const uint32_t evens = ~even & all, odds = ~odd & all;
  const uint32_t planes[2] = {(evens & 0x55555555u) | (odds & 0x55555555u) << 1, (evens >> 1 & 0x55555555u) | (odds & 0xAAAAAAAAu)};
  uint8_t* const target = problem.codes + (uint64_t{block} * 16 + gathered_byte());
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint32_t gathered = gather_bytes(planes[p]);
    if (exists) *reinterpret_cast<uint32_t*>(target + p * problem.plane_bytes) = gathered;
  }
  return __popc(planes[0]) + 2 * __popc(planes[1]);
}

// int4 in layout packed or even_odd.
__device__ __forceinline__ uint32_t write_nibbles(const BlocksProblem& problem, const float (&x)[kQuadValues], float slope, uint32_t all,
                                                  uint32_t block, bool exists) {
  uint32_t words[4];  // of 8 codes
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
#pragma unroll
    for (int j = kChunk - 2; j >= 0; j -= 2) {
      auto code = [&](int k) { return complement<4>(problem, x[i * kChunk + k], slope); };
      words[i] = pack_nibbles(code(j), code(j + 1), words[i]);
    }
  }
  uint32_t all_sum = 0, high_sum = 0;  // of bytes, which are low + 16 high, and of 16 high alone
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = ~words[i] & all;
    all_sum = __dp4a(words[i], 0x01010101u, all_sum);
    high_sum = __dp4a(words[i] & 0xF0F0F0F0u, 0x01010101u, high_sum);
  }
  const int quad_lane = threadIdx.x % 4;
  if (exists) {
    if (problem.layout == Layout::kPacked) {
      uint2* const target = reinterpret_cast<uint2*>(problem.codes + (uint64_t{block} * (kQuadBlock / 2) + quad_lane * 8));
      target[0] = make_uint2(words[0], words[1]);
      target[4] = make_uint2(words[2], words[3]);
    } else {
      uint2* const target = reinterpret_cast<uint2*>(problem.codes + (uint64_t{block} * kQuadBlock + quad_lane * 8));
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // 64 columns, of which this lane has 16 neighbours
        target[8 * i] = make_uint2(words[2 * i] & 0x0F0F0F0Fu, words[2 * i + 1] & 0x0F0F0F0Fu);
        target[8 * i + 4] = make_uint2(words[2 * i] >> 4 & 0x0F0F0F0Fu, words[2 * i + 1] >> 4 & 0x0F0F0F0Fu);
      }
    }
  }
  return all_sum - high_sum / 16 * 15;
}

// Any grid in any layout.
__device__ __forceinline__ uint32_t write_codes(const BlocksProblem& problem, const float (&x)[kQuadValues], float slope, uint32_t all,
                                                uint32_t block, bool exists) {
  const int quad_lane = threadIdx.x % 4;
  // Integers in the low 16 bits: |x_h| is at most sigma sqrt(K), so they suffice.
  auto rounded = [&](int i) { return __float_as_uint(__fadd_rn(shifted(problem, x[i], slope), kIntegerFloat)); };
  auto pair = [&](int i, int j) {
    return __viaddmin_s16x2_relu(__byte_perm(rounded(i), rounded(j), 0x5410), problem.offset, problem.largest_code);
  };
  // Four codes a word: of neighbouring values; for planes, word j has value j of each chunk.
  uint32_t words[8];
  if (problem.layout == Layout::kPlanes) {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = __byte_perm(pair(j, kChunk + j), pair(2 * kChunk + j, 3 * kChunk + j), 0x6420) & all;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = __byte_perm(pair(4 * j, 4 * j + 1), pair(4 * j + 2, 4 * j + 3), 0x6420) & all;
  }
  uint32_t code_sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) code_sum = __dp4a(words[j], 0x01010101u, code_sum);

  if (problem.layout == Layout::kPacked) {
    uint2* const target = reinterpret_cast<uint2*>(problem.codes + (uint64_t{block} * (kQuadBlock / 2) + quad_lane * 8));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* four = words + 4 * i;
      const uint2 packed = make_uint2(codes_to_nibbles(make_uint2(four[0], four[1])), codes_to_nibbles(make_uint2(four[2], four[3])));
      if (exists) target[4 * i] = packed;
    }
  } else if (problem.layout == Layout::kEvenOdd) {
    uint2* const target = reinterpret_cast<uint2*>(problem.codes + (uint64_t{block} * kQuadBlock + quad_lane * 8));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* four = words + 4 * i;
      if (exists) {
        target[8 * i] = make_uint2(__byte_perm(four[0], four[1], 0x6420), __byte_perm(four[2], four[3], 0x6420));
        target[8 * i + 4] = make_uint2(__byte_perm(four[0], four[1], 0x7531), __byte_perm(four[2], four[3], 0x7531));
      }
    }
  } else if (problem.layout == Layout::kPlanes) {
    uint8_t* const target = problem.codes + (uint64_t{block} * 16 + gathered_byte());
    for (int p = 0; p < problem.bits; ++p) {
      // Bit p of the bytes of word j becomes bit j of the bytes of the plane.
      uint32_t plane = 0;
#pragma unroll
      for (int j = 7; j >= 0; --j) plane = plane << 1 | (words[j] >> p & 0x01010101u);
      plane = gather_bytes(plane);
      if (exists) *reinterpret_cast<uint32_t*>(target + p * problem.plane_bytes) = plane;
    }
  } else {
    uint4* const target = reinterpret_cast<uint4*>(problem.codes + (uint64_t{block} * kQuadBlock + quad_lane * 16));
    if (problem.layout == Layout::kValues) {
      // Bytes 0 in a row that holds no numbers.
#pragma unroll
      for (int j = 0; j < 8; ++j) words[j] = ((words[j] * problem.stored_mul + problem.stored_add) ^ 0x80808080u) & all;
    }
    if (exists) {
      target[0] = make_uint4(words[0], words[1], words[2], words[3]);
      target[4] = make_uint4(words[4], words[5], words[6], words[7]);
    }
  }
  return code_sum;
}

// ---- rows of whole blocks. A warp holds 8 blocks of 128 values, 32 values a lane. Lane t of a quad has the chunks 2t, 2t + 1, 8 + 2t, 9 +
// 2t of its block: a pair of chunks is 8 bytes of packed codes or 16 of int8, so a quad writes whole sectors of 32 bytes.

// What a lane has of a row: a block, or nothing (it then holds some other block's values, which are not counted or written).
struct RowBlock {
  uint32_t row, index;  // index: of all rows' blocks
  bool row_exists, exists;
};

// From what is loaded to what is written. 16-bit values are rotated by hadamard_tensor_cores, float32 values in the CPU's order of strides,
// 16 and 32 between the lanes. ASKS_AHEAD: looks at the second line of parameters before the row is summed, so that it comes meanwhile.
template <DType DTYPE, bool ROTATE, bool ASKS_AHEAD>
__device__ __forceinline__ void quantize_loaded(const BlocksProblem& problem, const RawChunk<DTYPE> (&raw)[4], const RowBlock& block,
                                                RowSums& sums, int warps) {
  constexpr bool kTensorCores = ROTATE && DTYPE != DType::kFloat32;
  float x[kQuadValues];
  float squares;
  if constexpr (kTensorCores) {
    squares = hadamard_tensor_cores<DTYPE>(x, raw);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i].to_floats(x + i * kChunk);
    squares = sum_of_squares(x);
  }
  if constexpr (ASKS_AHEAD) squares *= problem.one;
  squares = sum_over_warp(block.exists ? squares : 0.0f);
  if constexpr (ROTATE && !kTensorCores) {
    butterfly<kQuadValues, 1>(x);
    butterfly<kQuadValues, 2>(x);
    butterfly<kQuadValues, 4>(x);
    butterfly<kQuadValues, 8>(x);
    butterfly_lanes(x, 1);
    butterfly_lanes(x, 2);
    butterfly<kQuadValues, 16>(x);
  }
  if (warps > 1 && threadIdx.x == 0) sums.codes = 0;
  squares = sum_over_warps(squares, sums.squares, warps);

  const bool finite = squares <= (kTensorCores ? kLargestFloat / kSquaresOver : kLargestFloat);
  const float sigma = sqrt_approximate(__fmul_rn(squares, problem.mean_factor));
  const float scale = __fadd_rn(__fmul_rn(problem.scale_factor, sigma), problem.scale_epsilon);
  // (A scale above 0 is no subnormal number: sigma is 0, or at least 2^-75. Of rows that are smaller the CPU's may still be above 0.)
  const float slope = finite && scale > 0.0f ? problem.gain_over_steps * reciprocal_approximate(scale) : 0.0f;
  const uint32_t all = finite ? 0xFFFFFFFFu : 0u;
  if (problem.mask != nullptr) {
    const float limit = fmaf(sigma, problem.limit_factor, problem.limit_add);
    const uint32_t fails = problem.error_mask ? fails_of_error(problem, x, slope, limit, scale * problem.inverse_gain)
                                              : gather_positive([&](int i) { return fabsf(x[i]) - limit; });
    const uint32_t mask = gather_bytes(~fails & all);
    if (block.exists) *reinterpret_cast<uint32_t*>(problem.mask + (uint64_t{block.index} * 16 + gathered_byte())) = mask;
  }
  uint32_t code_sum = 0;
  if (problem.code_kind == CodeKind::kNibble) {  // (A switch becomes a table in memory: 140 cycles.)
    code_sum = write_nibbles(problem, x, slope, all, block.index, block.exists);
  } else if (problem.code_kind == CodeKind::kBit) {
    code_sum = write_bits(problem, x, scale * problem.boundary_factor, all, block.index, block.exists);
  } else if (problem.code_kind == CodeKind::kTwoBits) {
    code_sum = write_two_planes(problem, x, slope, all, block.index, block.exists);
  } else {
    code_sum = write_codes(problem, x, slope, all, block.index, block.exists);
  }
  if (block.exists && threadIdx.x == 0) problem.scale[block.row] = finite ? scale : NAN;

  // The last warp that arrives has the row's sum.
  code_sum = __reduce_add_sync(0xFFFFFFFFu, block.exists ? code_sum : 0);
  if (threadIdx.x % kWarpSize == 0) {
    const uint32_t before = warps > 1 ? shared_add(&sums.codes, code_sum + kArrival) : 0;
    const bool last = before / kArrival == static_cast<uint32_t>(warps - 1);
    if (block.row_exists && last) problem.code_sum[block.row] = static_cast<int32_t>(before % kArrival + code_sum);
  }
}

// This lane's chunks of block `at`: two, and two that begin kFurtherChunks after them.
constexpr int kFurtherChunks = kQuadBlock / kChunk / 2;
template <DType DTYPE>
__device__ __forceinline__ const uint8_t* chunks_at(const uint8_t* base, uint64_t at) {
  return base + (at * (kQuadBlock / kChunk) + threadIdx.x % 4 * 2) * RawChunk<DTYPE>::kBytes;
}
template <DType DTYPE>
__device__ __forceinline__ void load_chunks(RawChunk<DTYPE> (&chunks)[4], const uint8_t* source) {
  constexpr int kBytes = RawChunk<DTYPE>::kBytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunks[i].load(source + (i / 2 * kFurtherChunks + i % 2) * kBytes);
}

// 56 registers: fewer do not hold the 32 values, their addresses and what a row needs; with 64 fewer warps would cover the time that loads
// take. (Two groups of 8 blocks a warp share more of the work that is not per value, but half as many warps cost as much as that saves.)
constexpr int kBlocksRegisters = 56, kNormRegisters = 64;  // rms_norm also holds its weight

constexpr int kBlocksWarps = 36;  // of a multiprocessor, with kBlocksRegisters each

// A row a thread block, or short rows a warp each. PREFETCHES: rows go to the second cache while the kernel before this one ends, where
// there are so few that no other warps cover the time that they take to come.
template <DType DTYPE, bool ROTATE, PrologueKind PROLOGUE, bool PREFETCHES>
__global__ __maxnreg__(PROLOGUE == PrologueKind::kRmsNorm
                           ? kNormRegisters
                           : kBlocksRegisters) void quantize_blocks_kernel(const __grid_constant__ BlocksProblem problem) {
  __shared__ RowSums sums;
  using Raw = RawChunk<DTYPE>;

  const int warps = static_cast<int>(blockDim.x / kWarpSize);
  const uint32_t own_row = blockIdx.x * blockDim.y + threadIdx.y, row = min(own_row, static_cast<uint32_t>(problem.rows) - 1);
  const int own_block = static_cast<int>(threadIdx.x / 4), in_row = min(own_block, problem.blocks - 1);
  const uint32_t blocks = static_cast<uint32_t>(problem.blocks);
  const RowBlock block{row, row * blocks + in_row, own_row == row, own_row == row && own_block == in_row};

  constexpr bool kGated = PROLOGUE == PrologueKind::kSiluMul;
  const uint8_t* source = chunks_at<DTYPE>(problem.x, kGated ? uint64_t{block.index} + row * blocks : block.index);
  const uint64_t up_distance = uint64_t{blocks} * (kQuadBlock / kChunk * Raw::kBytes);
  if constexpr (PREFETCHES) {
    settle_global(source);  // reckoned here, not behind the wait
    constexpr int kFurtherBytes = kFurtherChunks * Raw::kBytes;
    prefetch(source), prefetch(source + kFurtherBytes);
    if constexpr (kGated) prefetch(source + up_distance), prefetch(source + up_distance + kFurtherBytes);
  }
  wait_for_prerequisites();
  Raw raw[4];
  load_chunks(raw, source);
  if constexpr (kGated) {
    Raw up[4];
    load_chunks(up, source + up_distance);
#pragma unroll
    for (int i = 0; i < 4; ++i) silu_mul(raw[i], up[i]);
  } else if constexpr (PROLOGUE == PrologueKind::kRmsNorm) {
    // The weight is on its way while the row is summed, where registers hold both.
    constexpr bool kLoadsAhead = DTYPE != DType::kFloat32;
    Raw weight[4];
    if constexpr (kLoadsAhead) load_chunks(weight, chunks_at<DTYPE>(problem.norm_weight, in_row));
    __shared__ WarpSums input_squares;
    float values[kQuadValues];
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i].to_floats(values + i * kChunk);
    const float squares = sum_over_warps(sum_over_warp(block.exists ? sum_of_squares(values) : 0.0f), input_squares, warps);
    if constexpr (!kLoadsAhead) load_chunks(weight, chunks_at<DTYPE>(problem.norm_weight, in_row));
    const float factor = norm_factor(squares, problem.one_over_k, problem.norm_epsilon);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kChunk], w[kChunk];
      raw[i].to_floats(x);
      weight[i].to_floats(w);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = x[j] * factor * w[j];
      raw[i].from_floats(x);
    }
  }
  launch_dependents();
  quantize_loaded<DTYPE, ROTATE, PREFETCHES>(problem, raw, block, sums, warps);
}

// Runs quantize_blocks_kernel if this problem is one for it.
bool quantize_blocks(const char* op, const Quantizer& quantizer, const Problem& problem, const Device& device, cudaStream_t stream) {
  const GridKind kind = quantizer.grid.kind;
  const bool rotate = problem.block > 1;
  const PrologueKind prologue = problem.prologue.kind;
  // A prologue without a rotation is too rare for kernels of its own.
  const bool suits = kind != GridKind::kFp4 && kind != GridKind::kGauss && !problem.sparse && problem.k > 0 &&
                     problem.k % kQuadBlock == 0 && problem.k <= kMaxRowWarps * kWarpBlocks * kQuadBlock &&
                     problem.rows * (problem.k / kQuadBlock) <= INT32_MAX && is_aligned(problem.x, 16) &&
                     is_aligned(problem.output.codes, 16) && is_aligned(problem.output.mask, 16) &&
                     is_aligned(problem.prologue.weight, 16) && (rotate || prologue == PrologueKind::kNone);
  if (!suits) return false;
  const bool tensor_cores = rotate && problem.dtype != DType::kFloat32;
  // What the registers hold times this is x_h: with the tensor cores x H/16, else x H, instead of x H/sqrt(128).
  const double gain = tensor_cores ? 16 / std::sqrt(128.0) : rotate ? 1 / std::sqrt(128.0) : 1.0;
  const UniformGrid grid = uniform_grid(quantizer.grid);
  const QuantizeParams& params = problem.params;
  const double scale_factor = params.scale_factor, scale_epsilon = params.scale_epsilon, mask_factor = params.mask_factor;

  BlocksProblem blocks{};
  blocks.x = static_cast<const uint8_t*>(problem.x);
  blocks.norm_weight = static_cast<const uint8_t*>(problem.prologue.weight);
  blocks.norm_epsilon = problem.prologue.epsilon;
  blocks.one_over_k = 1.0f / static_cast<float>(problem.k);
  blocks.mean_factor = (tensor_cores ? kSquaresOver : 1.0f) / static_cast<float>(problem.k);
  blocks.one = 1.0f;
  blocks.codes = static_cast<uint8_t*>(problem.output.codes);
  blocks.scale = problem.output.scale;
  blocks.code_sum = problem.output.code_sum;
  blocks.mask = problem.output.mask;
  blocks.rows = static_cast<int32_t>(problem.rows);
  blocks.plane_bytes = problem.rows * problem.code_row_bytes;
  blocks.blocks = static_cast<int32_t>(problem.k / kQuadBlock);
  blocks.bits = problem.bits;
  blocks.layout = problem.layout;
  blocks.scale_factor = params.scale_factor;
  blocks.scale_epsilon = params.scale_epsilon;
  blocks.gain_over_steps = static_cast<float>(gain / grid.steps);
  blocks.inverse_gain = static_cast<float>(1 / gain);
  switch (params.mask_kind) {
    case kMaskScale:
      blocks.limit_factor = static_cast<float>(mask_factor * scale_factor / gain);
      blocks.limit_add = static_cast<float>(mask_factor * scale_epsilon / gain);
      break;
    case kMaskMagnitude:
      blocks.limit_factor = static_cast<float>(mask_factor / gain);
      blocks.limit_add = static_cast<float>(mask_factor * scale_epsilon / scale_factor / gain);
      break;
    case kMaskError: blocks.limit_factor = static_cast<float>(mask_factor / gain); break;
    default: blocks.limit_add = INFINITY;
  }
  blocks.error_mask = params.mask_kind == kMaskError;
  blocks.code_kind = CodeKind::kAny;
  const bool nibbles = problem.layout == Layout::kPacked || problem.layout == Layout::kEvenOdd;
  if (kind == GridKind::kInt && quantizer.grid.bits == 1 && problem.layout == Layout::kPlanes) blocks.code_kind = CodeKind::kBit;
  if (kind == GridKind::kInt && quantizer.grid.bits == 2 && problem.layout == Layout::kPlanes) blocks.code_kind = CodeKind::kTwoBits;
  if (kind == GridKind::kInt && quantizer.grid.bits == 4 && nibbles) blocks.code_kind = CodeKind::kNibble;
  // 1/2 + x_h/step is rounded to more than 1/2 from 2^-25 on.
  blocks.boundary_factor = static_cast<float>(0x1p-25 * grid.steps / gain);
  blocks.shift = grid.shift;
  blocks.offset = static_cast<uint32_t>(grid.offset) * 0x00010001u;
  blocks.largest_code = static_cast<uint32_t>(params.levels - 1) * 0x00010001u;
  blocks.level_mul = grid.mul;
  blocks.level_add = grid.add;
  blocks.stored_mul = grid.stored_mul;
  blocks.stored_add = ((grid.stored_add + 0x80u) & 0xFFu) * 0x01010101u;

  const int warps = (blocks.blocks + kWarpBlocks - 1) / kWarpBlocks;
  // In one dimension (hadamard_tensor_cores). A row a thread block: rows then finish, and others start, without waiting. Only rows of one
  // warp share a block, since a multiprocessor holds fewer blocks than such rows; not where that would leave multiprocessors idle.
  int block_rows = warps == 1 ? 8 : 1;
  while (block_rows > 1 && problem.rows / block_rows < device.sm_count) block_rows /= 2;
  const dim3 threads(static_cast<unsigned>(warps * kWarpSize), static_cast<unsigned>(block_rows));
  const dim3 thread_blocks = grid_of(op, (problem.rows + block_rows - 1) / block_rows);
  // (Behind a product by 128 blocks 64 rows of 4096 values took 2.8 us instead of 1.4, from when that had ended, by clocks in the kernel;
  // 512 rows of 2048 3.9 instead of 2.)
  const int64_t shared =
      device.hopper_code ? plan_spread_bytes(thread_blocks.x, warps * block_rows, device.sm_count, device.shared_bytes) : 0;
  constexpr int64_t kPrefetchedWaves = 2;  // 4096 rows of 2048 values are 1.7 on an H200, and gained; 16384 lost, by a bulk copy a row
  const bool prefetches =
      device.hopper_code && int64_t{thread_blocks.x} * warps * block_rows <= kPrefetchedWaves * device.sm_count * kBlocksWarps;
  with_dtype(problem.dtype, [&](auto type) {
    auto run = [&](auto kernel) {
      launch_with({1, device.hopper_code}, op, kernel, thread_blocks, threads, static_cast<size_t>(shared), stream, blocks);
    };
    auto run_with = [&](auto prefetched) {
      switch (prologue) {
        case PrologueKind::kNone:
          rotate ? run(quantize_blocks_kernel<type(), true, PrologueKind::kNone, prefetched()>)
                 : run(quantize_blocks_kernel<type(), false, PrologueKind::kNone, prefetched()>);
          break;
        case PrologueKind::kRmsNorm: run(quantize_blocks_kernel<type(), true, PrologueKind::kRmsNorm, prefetched()>); break;
        case PrologueKind::kSiluMul: run(quantize_blocks_kernel<type(), true, PrologueKind::kSiluMul, prefetched()>); break;
      }
    };
    prefetches ? run_with(std::true_type()) : run_with(std::false_type());
  });
  return true;
}

}  // namespace

void quantize(const Quantizer& quantizer, Layout layout, const void* x, DType dtype, int64_t rows, int64_t k, const QuantizeOutput& output,
              cudaStream_t stream, const Prologue& prologue) {
  const char* op = "quantize";
  const QuantizeParams params = quantize_params(quantizer);
  check_layout(op, quantizer, layout, rows, k);
  check_prologue(op, prologue);
  check_index(op, quantizer, output.index != nullptr);
  if (rows == 0) return;
  const Device device = current_device(op);
  if (layout == Layout::kPacked || layout == Layout::kEvenOdd) check_aligned(op, "codes", output.codes);

  const int64_t block = rotation_block(quantizer, k);
  // To the end of the padding of masks, planes and indices, of whose rows 16 bytes are at most 32 chunks.
  const int64_t chunks = round_up(k, kWarpSize * kChunk) / kChunk;
  Problem problem{};
  problem.x = x;
  problem.prologue = prologue;
  problem.dtype = dtype;
  problem.rows = rows;
  problem.k = k;
  problem.chunks = chunks;
  problem.code_row_bytes = row_bytes(layout, stored_codes(quantizer, layout, k));
  problem.mask_row_bytes = plane_row_bytes(k);
  problem.index_row_bytes = index_row_bytes(k);
  problem.block = static_cast<int>(block);
  problem.factor = 1.0f / std::sqrt(static_cast<float>(block));
  problem.sparse = quantizer.sparsity == Sparsity::kFourEight;
  problem.params = params;
  problem.layout = layout;
  problem.bits = quantizer.grid.bits;
  problem.output = output;
  problem.vectorized_input = is_aligned(x, 16) && is_aligned(prologue.weight, 16) && k * element_size(dtype) % 16 == 0;
  problem.vectorized_codes = is_aligned(output.codes, 8) && k % 8 == 0;

  if (quantize_blocks(op, quantizer, problem, device, stream)) return;

  // Chunks a thread: as few as keep a row within 256, then 512 threads; with a prologue always two, so that there are few kernels.
  const bool plain = prologue.kind == PrologueKind::kNone;
  const int64_t held = !plain ? 2 : chunks <= 256 ? 1 : chunks <= 1024 ? 2 : chunks <= 2048 ? 4 : 8;
  const int64_t threads = std::max<int64_t>(kWarpSize, std::min<int64_t>(kMaxThreads, round_up((chunks + held - 1) / held, kWarpSize)));
  const int64_t rows_a_block = threads == kWarpSize ? std::min<int64_t>(rows, 8) : 1;
  const dim3 threads_of_block(static_cast<unsigned>(threads), static_cast<unsigned>(rows_a_block));
  const dim3 blocks = grid_of(op, (rows + rows_a_block - 1) / rows_a_block);
  with_grid(quantizer.grid, [&](auto grid) {
    using Grid = decltype(grid);
    auto run = [&](auto kernel) { launch(op, kernel, blocks, threads_of_block, 0, stream, problem, grid); };
    if (!plain) return run(quantize_kernel<Grid, 2, true>);
    switch (held) {
      case 1: run(quantize_kernel<Grid, 1, false>); break;
      case 2: run(quantize_kernel<Grid, 2, false>); break;
      case 4: run(quantize_kernel<Grid, 4, false>); break;
      default: run(quantize_kernel<Grid, 8, false>);
    }
  });
}

}  // namespace quest::cuda
