// gemm_int4 on Hopper: 4-bit weights that are widened in registers.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

bool gemm_int4_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream) {
  if (!is_bytes(a) || !takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_wgmma(GemmFamily::kInt4, output.m, output.n, k, device.sm_count);
  const Affine a_map = affine(a.grid, a.layout);
  WgmmaProblem problem{};
  if (is_fp4(a) || is_fp4(w)) {
    // Codes and 8-bit values need the sum of each row of fp4 values, which does not follow from its codes.
    if (a_map.add != 0) return false;
    problem.output.epilogue = integer_epilogue(a, w, a_map, {1, 0}, output, k);
    problem.table = value_table(w.grid);
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenByTable>>(op, tile, a, w, problem, k, device, stream);
  } else {
    problem.output.epilogue = integer_epilogue(a, w, a_map, affine(w.grid, Layout::kPacked), output, k);
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenCodes>>(op, tile, a, w, problem, k, device, stream);
  }
  return true;
}

}  // namespace quest::cuda
