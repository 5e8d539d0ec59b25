// gemm_int8 on Hopper: weights of one byte an integer.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

void gemm_int8_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const IntegerEpilogue& epilogue, int64_t k,
                     const Device& device, cudaStream_t stream) {
  WgmmaProblem problem{};
  problem.epilogue = epilogue;
  problem.flip = w.layout == Layout::kCodes && w.grid.bits == 8 ? 0x80808080u : 0u;
  launch_wgmma<WgmmaInt8, ByteFragments, 2>(op, tile, a, w, problem, k, device, stream);
}

}  // namespace quest::cuda
