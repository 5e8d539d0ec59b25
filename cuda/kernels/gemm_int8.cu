// gemm_int8: y = s_a s_w (v_a v_w^T) + bias of operands stored one integer a byte. On wgmma (gemm_int8_wgmma.cu) and for few rows bytes go
// to the tensor cores as they lie in memory; else codes are turned into values on their way to shared memory.
#include "common/gemm_skinny.cuh"
#include "common/gemm_tile.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {
namespace {

// At most 16 rows, if their kernel takes these operands.
bool gemm_int8_skinny(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                      cudaStream_t stream) {
  if (!plan_skinny(GemmFamily::kInt8, output.m, k, device.compute_capability)) return false;
  if (!is_skinny_a(a, k) || !is_skinny_w(w, k)) return false;
  const IntegerEpilogue epilogue = integer_epilogue(a, w, skinny_affine(a, false), skinny_affine(w, false), output, k);
  if (epilogue.a.sums_values || epilogue.w.sums_values) return false;
  launch_skinny<MmaInt8, SkinnyBytes, StreamedBytes<false>>(op, skinny_rows(a, output.m, k), skinny_rows(w, output.n, k), epilogue, device,
                                                            stream);
  return true;
}

}  // namespace

void gemm_int8(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream) {
  const char* op = "gemm_int8";
  check_layout(op, "a", a, Layout::kValues, Layout::kCodes);
  check_layout(op, "w", w, Layout::kValues, Layout::kCodes);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  if (gemm_int8_skinny(op, a, w, output, k, device, stream)) return;
  if (gemm_int8_wgmma(op, a, w, output, k, device, stream)) return;
  const GemmTile tile = plan_mma_sync(GemmFamily::kInt8, m, n, device.sm_count);
  const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, is_fp4(a)), operand_affine(w, is_fp4(w)), output, k);
  launch_tile<MmaInt8, ByteLoader, ByteLoader>(op, tile, byte_rows(a, m, k), byte_rows(w, n, k), steps_of(k), epilogue, stream);
}

}  // namespace quest::cuda
