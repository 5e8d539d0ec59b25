// The host's side of the products on Hopper's wgmma.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm_few.cuh"
#include "common/gemm_wgmma.cuh"
#include "common/matrix_map.h"
#include "common/wgmma_products.h"

namespace quest::cuda {

struct WgmmaMaps {
  CUtensorMap a, w, index;
};

// Completes `problem` and makes the copy engine's maps.
template <typename Tile>
WgmmaMaps wgmma_maps(const char* op, const Operand& a, const Operand& w, WgmmaProblem& problem, int64_t k) {
  using Fragments = typename Tile::Fragments;
  constexpr int block_m = Tile::BLOCK_M, cluster_n = Tile::CLUSTER * Tile::BLOCK_N;
  const Output& output = problem.output.epilogue.output;
  const int64_t m = output.m, n = output.n;
  const bool planes = w.layout == Layout::kPlanes;
  constexpr bool kReal = kRealSums<typename Tile::Mma::Accumulator>;
  const int64_t a_row_bytes = kReal ? 2 * k : row_bytes(a.layout, k), w_row_bytes = row_bytes(w.layout, w.index != nullptr ? k / 2 : k);
  problem.steps = {static_cast<int>((a_row_bytes + kStepRowBytes - 1) / kStepRowBytes), planes && !kReal ? a.grid.bits : 1,
                   planes && !kReal ? w.grid.bits : 1};
  const int64_t tiles_m = (m + block_m - 1) / block_m, clusters_n = (n + cluster_n - 1) / cluster_n;
  // Room for the rows of the last tile that y does not have.
  constexpr int64_t kMostRows = INT32_MAX - 256;
  check(m <= kMostRows && n <= kMostRows && tiles_m * clusters_n <= INT32_MAX, op, ": expected m, n <= ", kMostRows, ", got ", m, ", ", n,
        "; split the rows");
  check(!problem.output.epilogue.a.sums_values && !problem.output.epilogue.w.sums_values, op, ": this kernel sums no values");
  problem.tiles_m = static_cast<int32_t>(tiles_m);
  problem.clusters_n = static_cast<int32_t>(clusters_n);

  constexpr uint32_t kRowBytes = Fragments::kRowBytes;
  constexpr CUtensorMapSwizzle w_swizzle = kRowBytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                           : kRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : kRowBytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                             : CU_TENSOR_MAP_SWIZZLE_NONE;
  // Of a only rows that there are, up to whole groups of 8: the copy engine takes as long for others. (What lies in their place is
  // multiplied, but no row of y is made of it.)
  const auto a_rows = static_cast<uint32_t>(std::min<int64_t>(block_m / Tile::CLUSTER, (m + 7) / 8 * 8));
  problem.copied_bytes = Tile::W_BYTES + Tile::CLUSTER * a_rows * kStepRowBytes;
  WgmmaMaps maps{};
  maps.a = matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.data, a_row_bytes, m, problem.steps.a_planes, a_row_bytes,
                      {kStepRowBytes, a_rows, CU_TENSOR_MAP_SWIZZLE_128B});
  auto rows_map = [&](const void* data, int64_t planes, int64_t row_bytes, Box box) {
    return Tile::ORDERS_ROWS ? weight_map(op, data, n, planes, row_bytes, box, output.adjacent())
                             : matrix_map(op, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, row_bytes, n, planes, row_bytes, box);
  };
  maps.w = rows_map(w.data, planes ? w.grid.bits : 1, w_row_bytes, {kRowBytes, Tile::BLOCK_N, w_swizzle, Fragments::kPlanes});
  maps.index = maps.w;  // of no use to a dense weight
  if constexpr (Fragments::kIndexBytes > 0) {
    maps.index = rows_map(w.index, 1, index_row_bytes(k), {Fragments::kIndexBytes, Tile::BLOCK_N, CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  return maps;
}

// Blocks that stay and take tile after tile.
template <typename Tile>
void launch_wgmma_tile(const char* op, const Operand& a, const Operand& w, WgmmaProblem problem, int64_t k, const Device& device,
                       cudaStream_t stream) {
  const WgmmaMaps maps = wgmma_maps<Tile>(op, a, w, problem, k);
  const CUtensorMap y_map = output_map(op, problem.output, Tile::Piece::ROWS);
  const int64_t tiles = int64_t{problem.tiles_m} * problem.clusters_n;
  const int64_t clusters = std::min<int64_t>(tiles, std::max(1, device.sm_count / Tile::CLUSTER));
  launch_with({Tile::CLUSTER, device.hopper_code}, op, gemm_wgmma_kernel<Tile>, dim3(static_cast<unsigned>(clusters * Tile::CLUSTER)),
              dim3(Tile::THREADS), Tile::SHARED_BYTES, stream, problem, maps.a, maps.w, maps.index, y_map);
}

// A block for each tile, or a pair.
template <typename Tile>
void launch_few_tile(const char* op, const Operand& a, const Operand& w, WgmmaProblem problem, int64_t k, bool paired, const Device& device,
                     cudaStream_t stream) {
  const WgmmaMaps maps = wgmma_maps<Tile>(op, a, w, problem, k);
  check(!paired || Tile::SENT_BYTES > 0, op, ": no kernel for pairs of blocks with tiles of ", Tile::BLOCK_N, " columns");
  problem.paired = paired ? 1 : 0;
  const int64_t blocks = int64_t{problem.tiles_m} * problem.clusters_n << problem.paired;
  launch_with({1 << problem.paired, device.hopper_code}, op, gemm_few_kernel<Tile>, dim3(static_cast<unsigned>(blocks)),
              dim3(Tile::THREADS), Tile::SHARED_BYTES, stream, problem, maps.a, maps.w, maps.index);
}

// Whether this GPU has the code, and the copy engine can read both operands: rows that start at multiples of 16 bytes.
inline bool takes_wgmma(const Operand& a, const Operand& w, int64_t k, const Device& device) {
  return device.hopper_code && k > 0 && is_aligned(a.data, 16) && is_aligned(w.data, 16) && row_bytes(a.layout, k) % 16 == 0 &&
         row_bytes(w.layout, k) % 16 == 0;
}

// The tile of the plan.
template <typename Mma, typename Fragments>
void launch_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const WgmmaProblem& problem, int64_t k,
                  const Device& device, cudaStream_t stream) {
  auto run = [&](auto shape) { launch_wgmma_tile<decltype(shape)>(op, a, w, problem, k, device, stream); };
  auto run_few = [&](auto block_m) {
    const bool paired = tile.cluster > 1;
    switch (tile.block_n) {
      case 64: return launch_few_tile<FewTile<Mma, Fragments, block_m(), 1>>(op, a, w, problem, k, paired, device, stream);
      case 128: return launch_few_tile<FewTile<Mma, Fragments, block_m(), 2>>(op, a, w, problem, k, paired, device, stream);
      default: return launch_few_tile<FewTile<Mma, Fragments, block_m(), 3>>(op, a, w, problem, k, paired, device, stream);
    }
  };
  switch (tile.block_m) {
    case 256: run(WgmmaTile<Mma, Fragments, 256>{}); break;
    case 128:
      if constexpr (!Mma::kPlanes && Fragments::kIndexBytes == 0) {
        if (tile.block_n == 192) return run(WgmmaTile<Mma, Fragments, 128, 3>{});
      }
      run(WgmmaTile<Mma, Fragments, 128>{});
      break;
    case 64: run_few(std::integral_constant<int, 64>()); break;
    case 16:
      // Others have the kernel for few rows.
      if constexpr (Mma::kPlanes || Fragments::kIndexBytes > 0) return run_few(std::integral_constant<int, 16>());
      [[fallthrough]];
    default: check(false, op, ": no kernel for the planned tile ", tile.kernel);
  }
}

}  // namespace quest::cuda
