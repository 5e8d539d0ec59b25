// gemm_int4 on Hopper: 4-bit weights that are widened in registers.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {
namespace {

// Whether 8 times the sum of v_a v_w stays in int32, as the product works with 8 v_w.
bool fits_in_eighths(const Operand& a, const Operand& w, int64_t k) {
  return int64_t{8} * max_value(a.grid) * max_value(w.grid) * k <= INT32_MAX;
}

}  // namespace

bool gemm_int4_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream) {
  // fp4 with 8 bits: that needs the sum of each row of fp4 values, which does not follow from its codes.
  if (a.layout != Layout::kValues || (is_fp4(w) && a.grid.bits == 8) || !takes_wgmma(a, w, k, device)) return false;
  const GemmTile tile = plan_tile(GemmFamily::kInt4, output.m, output.n, k, device.compute_capability, device.sm_count);
  const Affine a_map = affine(a.grid, Layout::kValues);
  WgmmaProblem problem{};
  problem.output.unit = 1.0f;
  if (w.grid == Grid{GridKind::kInt, 4} && fits_in_eighths(a, w, k)) {
    problem.output.epilogue = integer_epilogue(a, w, a_map, {1, 0}, output, k);
    problem.output.epilogue.w.weight *= 8;  // everything in eighths
    problem.output.unit = 0.125f;
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenInt4>>(op, tile, a, w, problem, k, device, stream);
  } else if (is_fp4(a) || is_fp4(w)) {
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
