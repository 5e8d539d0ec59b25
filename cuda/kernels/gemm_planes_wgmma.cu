// gemm_planes on Hopper: 1-bit products at about 8 times the rate of int8 ones.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

bool gemm_planes_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream) {
  if (!takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_tile(GemmFamily::kPlanes, output.m, output.n, k, device.compute_capability, device.sm_count);
  WgmmaProblem problem{};
  problem.epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kPlanes), affine(w.grid, Layout::kPlanes), output, k);
  problem.unit = 1.0f;
  launch_wgmma<WgmmaBits, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
