// gemm_int8: y = s_a s_w (v_a v_w^T) + bias of operands stored one integer a byte. On wgmma (gemm_int8_wgmma.cu) bytes go to the tensor
// cores as they lie in memory; else codes are turned into values on their way there.
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
  const Output output = make_output(y, dtype, bias, m, n);
  const bool skinny = plan_skinny(GemmFamily::kInt8, m, k, device.compute_capability);
  if (!skinny && gemm_int8_wgmma(op, a, w, output, k, device, stream)) return;
  const ByteRows a_rows = byte_rows(a, m, k), w_rows = byte_rows(w, n, k);
  const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, is_fp4(a)), operand_affine(w, is_fp4(w)), output, k);
  if (skinny) {
    launch_skinny<MmaInt8, SkinnyBytes>(op, a_rows, w_rows, k, epilogue, device, stream);
  } else {
    const GemmTile tile = plan_mma_sync(GemmFamily::kInt8, m, n, k, device.compute_capability, device.sm_count);
    launch_tile<MmaInt8, ByteLoader, ByteLoader>(op, tile, a_rows, w_rows, steps_of(k), epilogue, stream);
  }
}

}  // namespace quest::cuda
