// gemm_sparse on Hopper's sparse tensor cores, which take two of every four values of w: its kept codes become values in registers, its
// index is their metadata.
#include "common/wgmma_launch.cuh"

namespace quest::cuda {

bool gemm_sparse_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                       cudaStream_t stream) {
  // Codes need the sum of each row of w, which does not follow from the codes of fp4.
  if (a.layout != Layout::kEvenOdd || is_fp4(a) || is_fp4(w) || !is_aligned(w.index, 16) || !takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_tile(GemmFamily::kSparse, output.m, output.n, k, device.compute_capability, device.sm_count);
  WgmmaProblem problem{};
  // Values of w, not codes: what is pruned counts as 0.
  problem.output.epilogue = integer_epilogue(a, w, affine(a.grid, a.layout), {1, 0}, output, k);
  const Affine value = affine(w.grid, Layout::kPacked);
  problem.value_mul = static_cast<uint32_t>(value.mul);
  problem.value_add = static_cast<uint32_t>(value.add + 128) * 0x01010101u;
  launch_wgmma<WgmmaSparseInt8, SparseFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
