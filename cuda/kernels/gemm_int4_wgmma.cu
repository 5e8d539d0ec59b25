// gemm_int4 on Hopper: 4-bit weights that are widened in registers.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

void gemm_int4_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, bool by_table,
                     const IntegerEpilogue& epilogue, int64_t k, const Device& device, cudaStream_t stream) {
  WgmmaProblem problem{};
  problem.epilogue = epilogue;
  if (by_table) {
    problem.table = value_table(w.grid);
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenByTable>, 2>(op, tile, a, w, problem, k, device, stream);
  } else {
    launch_wgmma<WgmmaInt8, NibbleFragments<WidenCodes>, 2>(op, tile, a, w, problem, k, device, stream);
  }
}

}  // namespace quest::cuda
