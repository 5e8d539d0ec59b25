// gemm_int4: y = s_a s_w (v_a v_w^T) + bias of a packed weight and a packed or int8 activation. Hopper has no 4-bit tensor cores (they are
// emulated there at a few percent of the int8 rate), so nibbles are widened to int8: in registers, on wgmma (gemm_int4_wgmma.cu); else once
// per tile on their way to shared memory.
#include <cstdlib>

#include "common/gemm_skinny.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {

void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream) {
  const char* op = "gemm_int4";
  if (a.layout != Layout::kCodes) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  if (!(m <= 16 && getenv("QUEST_SKINNY")) && gemm_int4_wgmma(op, a, w, output, k, device, stream)) return;
  const bool looks_up = is_fp4(a) || is_fp4(w);
  const GemmTile tile = plan_mma_sync(GemmFamily::kInt4, m, n, device.sm_count);
  const NibbleRows w_rows = nibble_rows(op, "w", w, n, k, looks_up);
  if (a.layout == Layout::kPacked) {
    const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, looks_up), operand_affine(w, looks_up), output, k);
    launch_int8<SkinnyNibbles, SkinnyNibbles, NibbleLoader, NibbleLoader>(op, tile, nibble_rows(op, "a", a, m, k, looks_up), w_rows, k,
                                                                          epilogue, device, stream);
  } else {
    const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, is_fp4(a)), operand_affine(w, looks_up), output, k);
    launch_int8<SkinnyBytes, SkinnyNibbles, ByteLoader, NibbleLoader>(op, tile, byte_rows(a, m, k), w_rows, k, epilogue, device, stream);
  }
}

}  // namespace quest::cuda
