// gemm_int4 on Hopper: 4-bit weights that are widened in registers.
#include "common/gemm_stream.cuh"
#include "common/wgmma_launch.cuh"

namespace quest::cuda {

bool gemm_int4_wgmma(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                     cudaStream_t stream) {
  const bool even_odd = a.layout == Layout::kEvenOdd && !is_fp4(a) && !is_fp4(w);
  if (!(even_odd || is_bytes(a)) || !takes_wgmma(a, w, k, device)) return false;
  const Affine a_map = affine(a.grid, a.layout);
  WgmmaProblem problem{};
  auto tile = [&] { return plan_wgmma(GemmFamily::kInt4, output.m, output.n, k, device.sm_count); };
  if (even_odd) {
    const IntegerEpilogue epilogue = integer_epilogue(a, w, a_map, affine(w.grid, Layout::kPacked), output, k);
    const StreamPlan plan = plan_stream_split(output.m, output.n, k, device.sm_count);
    switch (plan.rows) {
      case 16: launch_stream<16>(op, a, w, epilogue, plan, k, stream); return true;
      case 32: launch_stream<32>(op, a, w, epilogue, plan, k, stream); return true;
    }
    problem.output.epilogue = epilogue;
    launch_wgmma<WgmmaUnsigned, CodeFragments>(op, tile(), a, w, problem, k, device, stream);
    return true;
  }
  // Codes of a need the sum of each row of w's values, which does not follow from the codes of fp4.
  if (is_fp4(w) && a_map.add != 0) return false;
  problem.output.epilogue = integer_epilogue(a, w, a_map, {1, 0}, output, k);
  problem.table = value_table(w.grid);
  launch_wgmma<WgmmaInt8, TableFragments>(op, tile(), a, w, problem, k, device, stream);
  return true;
}

}  // namespace quest::cuda
