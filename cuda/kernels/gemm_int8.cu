// gemm_int8: y = s_a s_w (v_a v_w^T) + bias of operands stored one integer a byte. Values go to the tensor cores as they are; codes are
// turned into values on their way to shared memory.
#include "common/gemm_skinny.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {

void gemm_int8(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream) {
  const char* op = "gemm_int8";
  check_layout(op, "a", a, Layout::kValues, Layout::kCodes);
  check_layout(op, "w", w, Layout::kValues, Layout::kCodes);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  if (a.layout == Layout::kValues && !(w.layout == Layout::kCodes && is_fp4(w)) && copies_tensors(a, w, k)) {
    const GemmTile tile = plan_tile(GemmFamily::kInt8, m, n, k, device.compute_capability, device.sm_count);
    // The bytes as they are, but c - 128 of 8-bit codes, which is the u of kValues.
    const Affine w_map = affine(w.grid, w.grid.bits == 8 ? Layout::kValues : w.layout);
    const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, false), w_map, bias, y, dtype, m, n, k);
    if (tile.wgmma && !epilogue.sums_values()) return gemm_int8_wgmma(op, tile, a, w, epilogue, k, device, stream);
  }
  const GemmTile tile = plan_mma_sync(GemmFamily::kInt8, m, n, device.sm_count);
  const IntegerEpilogue epilogue =
      integer_epilogue(a, w, operand_affine(a, is_fp4(a)), operand_affine(w, is_fp4(w)), bias, y, dtype, m, n, k);
  launch_int8<SkinnyBytes, SkinnyBytes, ByteLoader, ByteLoader>(op, tile, byte_rows(a, m, k), byte_rows(w, n, k), k, epilogue, stream);
}

}  // namespace quest::cuda
