// gemm_planes on Hopper: 1-bit products at about 8 times the rate of int8 ones.
#include "common/gemm_stationary.cuh"
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

bool gemm_planes_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream) {
  if (!takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_wgmma(GemmFamily::kPlanes, output.m, output.n, k, device.sm_count);
  const IntegerEpilogue epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kPlanes), affine(w.grid, Layout::kPlanes), output, k);
  const int64_t row_bytes = plane_row_bytes(k);
  auto stationary = [&](auto shape) {
    using Tile = decltype(shape);
    if (output.m <= 64 || a.grid.bits * w.grid.bits != 1 || !Tile::takes(output, row_bytes, device.shared_bytes)) return false;
    launch_stationary<WgmmaBits, Tile>(op, a, w, epilogue, k, device, stream);
    return true;
  };
  if (stationary(StationaryTile<256>{}) || stationary(StationaryTile<128>{})) return true;
  WgmmaProblem problem{};
  problem.output.epilogue = epilogue;
  launch_wgmma<WgmmaBits, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
