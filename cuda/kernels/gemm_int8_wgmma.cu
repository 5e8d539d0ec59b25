// gemm_int8 on Hopper: weights of one byte an integer.
#include "common/wgmma_launch.cuh"

namespace quest::cuda {

bool gemm_int8_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream) {
  // The bytes as they are, but c - 128 of 8-bit codes of w, which is the u of kValues.
  const bool flips = w.layout == Layout::kCodes && w.grid.bits == 8 && !is_fp4(w);
  if (!is_bytes(a) || !(flips || is_bytes(w)) || !takes_wgmma(a, w, k, device)) return false;
  const Affine a_map = affine(a.grid, a.layout), w_map = affine(w.grid, flips ? Layout::kValues : w.layout);
  // The other side of fp4 would need the sum of each row of its values, which does not follow from its codes.
  if ((is_fp4(w) && a_map.add != 0) || (is_fp4(a) && w_map.add != 0)) return false;
  const GemmTile tile = plan_wgmma(GemmFamily::kInt8, output.m, output.n, k, device.sm_count);
  WgmmaProblem problem{};
  problem.output.epilogue = integer_epilogue(a, w, a_map, w_map, output, k);
  problem.flip = flips ? 0x80808080u : 0u;
  launch_wgmma<WgmmaInt8, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
