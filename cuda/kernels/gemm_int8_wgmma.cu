// gemm_int8 on Hopper: weights of one byte an integer.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

bool gemm_int8_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream) {
  // fp4 with integers u that are no values (codes, and c - 128 of 8 bits): that needs the sum of each row of fp4 values, which does not
  // follow from its codes; fp4 codes themselves are no integers.
  const bool w_has_values = w.layout == Layout::kValues && w.grid.bits < 8;
  const bool fp4_without_sums = (!is_fp4(w) || (w.layout == Layout::kValues && a.grid.bits < 8)) && (!is_fp4(a) || w_has_values);
  if (a.layout != Layout::kValues || !fp4_without_sums || !takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_tile(GemmFamily::kInt8, output.m, output.n, k, device.compute_capability, device.sm_count);
  // The bytes as they are, but c - 128 of 8-bit codes, which is the u of kValues.
  const bool flips = w.layout == Layout::kCodes && w.grid.bits == 8;
  WgmmaProblem problem{};
  problem.output.epilogue =
      integer_epilogue(a, w, affine(a.grid, Layout::kValues), affine(w.grid, flips ? Layout::kValues : w.layout), output, k);
  problem.output.unit = 1.0f;
  problem.flip = flips ? 0x80808080u : 0u;
  launch_wgmma<WgmmaInt8, ByteFragments>(op, tile, a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
