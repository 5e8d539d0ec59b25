// quantize: x_h = x H, sigma, codes, code sum, mask bits and 4:8 index in one pass: one read of x, one write of each output.
//
// A row belongs to one thread block (short rows: several rows a block, a warp each). Thread t holds the chunks t, t + T, ... of 8 values in
// registers, so loads are coalesced and a rotation block of at most 128 values lies in at most 16 neighbouring lanes (hadamard.cuh). Two
// sums over the row (squares, codes) join the warps through shared memory. Rows of up to 32768 values stay in registers between sigma and
// the codes; longer rows are walked twice, and their second read of x comes from the cache or from memory.
//
// The arithmetic is the CPU backend's, operation by operation, but for the order of the sum of squares: a code differs only where that
// moves x_h/s across a rounding boundary.
#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/grid.cuh"
#include "common/hadamard.cuh"
#include "quest/cuda/quantize.h"
#include "quest/packing.h"
#include "quest/rotation.h"

namespace quest::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;  // leaves a thread 128 registers, of which 8 chunks take 64

struct Problem {
  const void* x;
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

// blockDim: threads a row (whole warps), rows a block (1 when a row has several warps). CHUNKS: chunks a thread holds.
template <typename Grid, int CHUNKS>
__global__ __launch_bounds__(kMaxThreads) void quantize_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Grid grid) {
  __shared__ float table[Grid::kTableFloats];
  __shared__ float square_sums[kWarpSize];
  __shared__ int32_t code_sums[kWarpSize];
  grid.prepare(table);

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t k = row < problem.rows ? problem.k : 0;  // rows beyond the last one: nothing to load
  const int64_t pass = static_cast<int64_t>(blockDim.x) * CHUNKS;
  const bool in_registers = problem.chunks <= pass;

  float x[CHUNKS][kChunk];
  auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int64_t column = (first + i * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kChunk;
      const int64_t left = k - column;
      load_chunk(x[i], problem.x, problem.dtype, row * k + column,
                 static_cast<int>(left < 0        ? 0
                                  : left < kChunk ? left
                                                  : kChunk),
                 problem.vectorized_input);
    }
  };

  float squares = 0.0f;
  for (int64_t first = 0; first < problem.chunks; first += pass) {
    load(first);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) squares = fmaf(x[i][j], x[i][j], squares);
    }
  }
  squares = sum_over_row(squares, square_sums);
  if (blockDim.x == kWarpSize) __syncthreads();  // for `table`; longer rows have met in the sum
  const bool finite = squares <= 3.402823466e38f;
  const Row row_params =
      make_row(problem.params, grid, problem.k > 0 ? __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(problem.k))) : 0.0f);

  int32_t code_sum = 0;
  for (int64_t first = 0; first < problem.chunks; first += pass) {
    if (!in_registers) load(first);
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

}  // namespace

void quantize(const Quantizer& quantizer, Layout layout, const void* x, DType dtype, int64_t rows, int64_t k, const QuantizeOutput& output,
              cudaStream_t stream) {
  const char* op = "quantize";
  const bool sparse = quantizer.sparsity == Sparsity::kFourEight;
  const QuantizeParams params = quantize_params(quantizer);
  check(layout != Layout::kValues || has_values(quantizer.grid), op, ": expected a grid with integer values for layout values, got ",
        to_string(quantizer.grid), "; use layout codes");
  check(layout != Layout::kPacked || quantizer.grid.bits <= 4, op, ": expected at most 4 bits for layout packed, got ",
        to_string(quantizer.grid), "; use layout codes");
  check(!sparse || (layout != Layout::kPlanes && k % 8 == 0), op,
        ": expected 8 to divide k and a layout other than planes for 4:8 sparsity, got k = ", k, ", layout ", to_string(layout));
  check(sparse == (output.index != nullptr), op, ": expected output.index ", sparse ? "for" : "to be nullptr without",
        " 4:8 sparsity; pass what the quantizer has");
  if (rows == 0) return;
  current_device(op);
  if (layout == Layout::kPacked) check_aligned(op, "codes", output.codes);

  const int64_t block = quantizer.rotation == Rotation::kHadamard && k > 0 ? default_block(k) : 1;
  const bool keeps_half = sparse && layout != Layout::kValues;
  // To the end of the padding of masks, planes and indices, of whose rows 16 bytes are at most 32 chunks.
  const int64_t chunks = round_up(k, kWarpSize * kChunk) / kChunk;
  Problem problem{};
  problem.x = x;
  problem.dtype = dtype;
  problem.rows = rows;
  problem.k = k;
  problem.chunks = chunks;
  problem.code_row_bytes = row_bytes(layout, keeps_half ? k / 2 : k);
  problem.mask_row_bytes = plane_row_bytes(k);
  problem.index_row_bytes = index_row_bytes(k);
  problem.block = static_cast<int>(block);
  problem.factor = 1.0f / std::sqrt(static_cast<float>(block));
  problem.sparse = sparse;
  problem.params = params;
  problem.layout = layout;
  problem.bits = quantizer.grid.bits;
  problem.output = output;
  problem.vectorized_input = is_aligned(x, 16) && k * element_size(dtype) % 16 == 0;
  problem.vectorized_codes = is_aligned(output.codes, 8) && k % 8 == 0;

  // Chunks a thread: as few as keep a row within 256, then 512 threads.
  const int64_t held = chunks <= 256 ? 1 : chunks <= 1024 ? 2 : chunks <= 2048 ? 4 : 8;
  const int64_t threads = std::max<int64_t>(kWarpSize, std::min<int64_t>(kMaxThreads, round_up((chunks + held - 1) / held, kWarpSize)));
  const int64_t rows_a_block = threads == kWarpSize ? std::min<int64_t>(rows, 8) : 1;
  const dim3 threads_of_block(static_cast<unsigned>(threads), static_cast<unsigned>(rows_a_block));
  const dim3 blocks = grid_of(op, (rows + rows_a_block - 1) / rows_a_block);
  with_grid(quantizer.grid, [&](auto grid) {
    using Grid = decltype(grid);
    auto run = [&](auto kernel) { launch(op, kernel, blocks, threads_of_block, 0, stream, problem, grid); };
    switch (held) {
      case 1: run(quantize_kernel<Grid, 1>); break;
      case 2: run(quantize_kernel<Grid, 2>); break;
      case 4: run(quantize_kernel<Grid, 4>); break;
      default: run(quantize_kernel<Grid, 8>);
    }
  });
}

}  // namespace quest::cuda
