// gemm_planes: the product of bit planes, sum c_a c_w = sum_ij 2^(i+j) popcount(plane_i(a) & plane_j(w)), on the 1-bit tensor cores.
#include "common/gemm_skinny.cuh"
#include "common/gemm_tile.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {
namespace {

ByteRows plane_rows(const char* op, const char* name, const Operand& operand, int64_t rows, int64_t k) {
  check_layout(op, name, operand, Layout::kPlanes, Layout::kPlanes);
  check(operand.grid.kind == GridKind::kInt && operand.grid.bits <= 4, op, ": expected int grids of 1 to 4 bits, got ",
        to_string(operand.grid), "; use gemm_int4 or gemm_int8");
  check_aligned(op, name, operand.data);
  ByteRows result = plain_rows(operand.data, rows, plane_row_bytes(k));
  result.plane_bytes = rows * result.row_bytes;
  return result;
}

}  // namespace

void gemm_planes(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 cudaStream_t stream) {
  const char* op = "gemm_planes";
  const ByteRows a_rows = plane_rows(op, "a", a, m, k);
  const ByteRows w_rows = plane_rows(op, "w", w, n, k);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, false), operand_affine(w, false), output, k);
  // One plane each: bytes of 8 products.
  if (a.grid.bits * w.grid.bits == 1 && plan_skinny(GemmFamily::kInt8, m, k, device.compute_capability)) {
    launch_skinny<MmaBits, SkinnyBytes, StreamedBytes<false>>(op, skinny_rows(a, m, k), skinny_rows(w, n, k), epilogue, device, stream);
    return;
  }
  if (gemm_planes_wgmma(op, a, w, output, k, device, stream)) return;
  const GemmTile tile = plan_mma_sync(GemmFamily::kPlanes, m, n, device.sm_count);
  launch_tile<MmaBits, ByteLoader, ByteLoader>(op, tile, a_rows, w_rows, steps_of(a_rows.row_bytes, a.grid.bits, w.grid.bits), epilogue,
                                               stream);
}

}  // namespace quest::cuda
