// pack and unpack: codes, one a byte, to the canonical storage of packing.h and back. A thread moves one chunk of 8 codes.
#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/rows.cuh"
#include "quest/cuda/packing.h"
#include "quest/grid.h"

namespace quest::cuda {
namespace {

struct Problem {
  Layout layout;
  int bits;
  int64_t rows, k, warps_a_row, row_bytes;
  bool vectorized;
};

__global__ __launch_bounds__(kRowsThreads) void largest_code_kernel(const uint8_t* codes, int64_t count, uint32_t* largest) {
  uint32_t found = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsThreads + threadIdx.x; i < count; i += step) {
    found = max(found, static_cast<uint32_t>(codes[i]));
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) found = max(found, __shfl_xor_sync(0xFFFFFFFFu, found, lanes));
  if (threadIdx.x % 32 == 0) atomicMax(largest, found);
}

__global__ __launch_bounds__(kRowsThreads) void pack_kernel(const __grid_constant__ Problem problem, const uint8_t* codes,
                                                            uint8_t* packed) {
  const ChunkPosition at = chunk_position(problem.rows, problem.k, problem.warps_a_row);
  if (!at.exists) return;
  const uint2 chunk = load_bytes(codes + at.row * problem.k + at.chunk * kChunk, at.count, problem.vectorized);
  if (problem.layout == Layout::kPacked) {
    if (at.chunk * 4 < problem.row_bytes) {
      *reinterpret_cast<uint32_t*>(packed + at.row * problem.row_bytes + at.chunk * 4) = codes_to_nibbles(chunk);
    }
  } else if (at.chunk < problem.row_bytes) {
    for (int j = 0; j < problem.bits; ++j) {
      packed[(j * problem.rows + at.row) * problem.row_bytes + at.chunk] = static_cast<uint8_t>(codes_to_plane(chunk, j));
    }
  }
}

__global__ __launch_bounds__(kRowsThreads) void unpack_kernel(const __grid_constant__ Problem problem, const uint8_t* packed,
                                                              uint8_t* codes) {
  const ChunkPosition at = chunk_position(problem.rows, problem.k, problem.warps_a_row);
  if (!at.exists || at.count == 0) return;
  uint2 chunk = make_uint2(0, 0);
  if (problem.layout == Layout::kPacked) {
    chunk = nibbles_to_codes(*reinterpret_cast<const uint32_t*>(packed + at.row * problem.row_bytes + at.chunk * 4));
  } else {
    for (int j = 0; j < problem.bits; ++j) {
      const uint2 plane = plane_to_codes(packed[(j * problem.rows + at.row) * problem.row_bytes + at.chunk], j);
      chunk.x |= plane.x;
      chunk.y |= plane.y;
    }
  }
  store_bytes(codes + at.row * problem.k + at.chunk * kChunk, chunk, at.count, problem.vectorized);
}

Problem make_problem(const char* op, Grid grid, Layout layout, const uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k) {
  check_packing(op, grid, layout, rows, k);
  check_aligned(op, "packed", packed);
  return {layout, grid.bits, rows, k, warps_of_row(k), row_bytes(layout, k), is_aligned(codes, 8) && k % 8 == 0};
}

}  // namespace

void pack(Grid grid, Layout layout, const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t k, cudaStream_t stream) {
  const char* op = "pack";
  const Problem problem = make_problem(op, grid, layout, codes, packed, rows, k);
  if (rows == 0 || k == 0) return;
  const Device device = current_device(op);

  // The first word of the output holds the largest code until the codes are known to be good.
  uint32_t* const largest = reinterpret_cast<uint32_t*>(packed);
  uint32_t found = 0;
  check_cuda(op, cudaMemsetAsync(largest, 0, sizeof(found), stream));
  launch(op, largest_code_kernel, dim3(4 * device.sm_count), dim3(kRowsThreads), 0, stream, codes, rows * k, largest);
  check_cuda(op, cudaMemcpyAsync(&found, largest, sizeof(found), cudaMemcpyDeviceToHost, stream));
  check_cuda(op, cudaStreamSynchronize(stream));
  if (found >= static_cast<uint32_t>(level_count(grid))) {  // the error names the first such code, so it is looked up here
    std::vector<uint8_t> host(static_cast<size_t>(rows * k));
    check_cuda(op, cudaMemcpyAsync(host.data(), codes, host.size(), cudaMemcpyDeviceToHost, stream));
    check_cuda(op, cudaStreamSynchronize(stream));
    const auto bad = std::find_if(host.begin(), host.end(), [&](uint8_t code) { return code >= level_count(grid); });
    throw_out_of_range(grid, *bad, bad - host.begin(), k);
  }

  launch(op, pack_kernel, grid_of(op, blocks_of_rows(rows, k)), dim3(kRowsThreads), 0, stream, problem, codes, packed);
}

void unpack(Grid grid, Layout layout, const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t k, cudaStream_t stream) {
  const char* op = "unpack";
  const Problem problem = make_problem(op, grid, layout, codes, packed, rows, k);
  if (rows == 0 || k == 0) return;
  current_device(op);
  launch(op, unpack_kernel, grid_of(op, blocks_of_rows(rows, k)), dim3(kRowsThreads), 0, stream, problem, packed, codes);
}

}  // namespace quest::cuda
