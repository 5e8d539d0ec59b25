// gemm_int8 on Hopper: weights of one byte an integer.
#include "common/gemm_wgmma.cuh"

namespace quest::cuda {

void gemm_int8_wgmma(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                     const Device& device, cudaStream_t stream) {
  WgmmaProblem problem{};
  // The bytes as they are, but c - 128 of 8-bit codes, which is the u of kValues.
  const bool flips = w.layout == Layout::kCodes && w.grid.bits == 8;
  problem.epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kValues), affine(w.grid, flips ? Layout::kValues : w.layout), output, k);
  problem.unit = 1.0f;
  problem.flip = flips ? 0x80808080u : 0u;
  launch_wgmma<WgmmaInt8, ByteFragments, 2>(op, tile, a, w, problem, k, device, stream);
}

}  // namespace quest::cuda
