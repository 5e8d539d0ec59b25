// gemm_int4 on Hopper: 4-bit weights that are widened in registers.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {
namespace {

// Whether sums of u_a 8 v_w stay in int32.
bool fits_in_eighths(const Operand& a, int64_t k) {
  const int64_t largest_u = a.grid.bits == 8 ? 128 : max_value(a.grid);
  return largest_u * 8 * max_value({GridKind::kInt, 4}) * k <= INT32_MAX;
}

}  // namespace

void gemm_int4_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                     const Device& device, cudaStream_t stream) {
  const Affine a_map = affine(a.grid, Layout::kValues);
  WgmmaProblem problem{};
  problem.unit = 1.0f;
  if (w.grid == Grid{GridKind::kInt, 4} && fits_in_eighths(a, k)) {
    problem.epilogue = integer_epilogue(a, w, a_map, {1, 0}, output, k);
    problem.epilogue.w.weight *= 8;  // everything in eighths
    problem.unit = 0.125f;
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenInt4>, 2>(op, tile, a, w, problem, k, device, stream);
  } else if (is_fp4(a) || is_fp4(w)) {
    problem.epilogue = integer_epilogue(a, w, a_map, {1, 0}, output, k);
    problem.table = value_table(w.grid);
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenByTable>, 2>(op, tile, a, w, problem, k, device, stream);
  } else {
    problem.epilogue = integer_epilogue(a, w, a_map, affine(w.grid, Layout::kPacked), output, k);
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenCodes>, 2>(op, tile, a, w, problem, k, device, stream);
  }
}

}  // namespace quest::cuda
