// gemm_planes on Hopper: 1-bit products at about 8 times the rate of int8 ones.
#include "common/gemm_stationary.cuh"
#include "common/wgmma_launch.cuh"

namespace quest::cuda {

bool gemm_planes_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream) {
  if (!takes_wgmma(a, w, k, device)) return false;
  const IntegerEpilogue epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kPlanes), affine(w.grid, Layout::kPlanes), output, k);
  if (a.grid.bits * w.grid.bits == 1 && output.vectorized) {
    const GemmTile tile = plan_bits(output.m, output.n, k, device.compute_capability, device.sm_count);
    if (is_stationary(tile)) {
      tile.block_n == 256 ? launch_stationary<WgmmaBits, StationaryTile<256>>(op, a, w, epilogue, k, device, stream)
                          : launch_stationary<WgmmaBits, StationaryTile<128>>(op, a, w, epilogue, k, device, stream);
      return true;
    }
  }
  const GemmTile tile = plan_wgmma(GemmFamily::kPlanes, output.m, output.n, k, device.sm_count);
  WgmmaProblem problem{};
  problem.output.epilogue = epilogue;
  launch_wgmma<WgmmaBits, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
