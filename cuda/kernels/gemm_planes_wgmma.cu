// gemm_planes on Hopper: 1-bit products at about 8 times the rate of int8 ones.
#include "common/gemm_stationary.cuh"
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

bool gemm_planes_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream) {
  if (!takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_tile(GemmFamily::kPlanes, output.m, output.n, k, device.compute_capability, device.sm_count);
  const IntegerEpilogue epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kPlanes), affine(w.grid, Layout::kPlanes), output, k);
  const int64_t row_bytes = plane_row_bytes(k);
  auto fits = [&](auto shape) {
    using Tile = decltype(shape);
    const int64_t chunks = Tile::chunks(row_bytes, a.grid.bits);
    return chunks <= Tile::MOST_CHUNKS && Tile::stages(chunks, device.shared_bytes) >= Tile::FEWEST_STAGES;
  };
  if (output.m > 64 && fits(StationaryTile<256>{})) {
    launch_stationary<WgmmaBits, StationaryTile<256>>(op, a, w, epilogue, k, device, stream);
    return true;
  }
  if (output.m > 64 && fits(StationaryTile<128>{})) {
    launch_stationary<WgmmaBits, StationaryTile<128>>(op, a, w, epilogue, k, device, stream);
    return true;
  }
  WgmmaProblem problem{};
  problem.output.epilogue = epilogue;
  problem.output.unit = 1.0f;
  launch_wgmma<WgmmaBits, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
