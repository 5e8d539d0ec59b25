// gemm_int4: y = s_a s_w (v_a v_w^T) + bias of a packed weight and a packed or int8 activation.
//
// GPUs of compute capability 8.x have tensor cores for 4-bit integers, at twice the rate of int8. There, products of codes of at most 4
// bits stay nibbles: u = c, unsigned, so that the packed bytes are multiplied as they lie in memory and the zeros beyond K add nothing.
// (Signed nibbles u = c - 8 would need a flip of every top bit, and the zeros would count as 8 * 8.)
//
// Hopper has no such tensor cores (they are emulated there at a few percent of the int8 rate), and fp4 and wider activations do not fit:
// nibbles are widened to int8, in registers for few rows and on wgmma (gemm_int4_wgmma.cu), else once per tile on their way to shared
// memory.
#include "common/gemm_skinny.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {
namespace {

void launch_native(const char* op, const GemmTile& tile, const Operand& a, const Operand& w, const Output& output, int64_t k,
                   cudaStream_t stream) {
  const IntegerEpilogue epilogue = integer_epilogue(a, w, affine(a.grid, Layout::kCodes), affine(w.grid, Layout::kCodes), output, k);
  auto packed_rows = [&](const char* name, const Operand& operand, int64_t rows) {
    check_aligned(op, name, operand.data);
    return plain_rows(operand.data, rows, packed_row_bytes(k));
  };
  const ByteRows w_rows = packed_rows("w", w, output.n);
  const Steps steps = steps_of(packed_row_bytes(k));
  if (a.layout == Layout::kPacked) {
    launch_tile<MmaNibbles, ByteLoader, ByteLoader>(op, tile, packed_rows("a", a, output.m), w_rows, steps, epilogue, stream);
  } else {
    launch_tile<MmaNibbles, NarrowingLoader, ByteLoader>(op, tile, plain_rows(a.data, output.m, k), w_rows, steps, epilogue, stream);
  }
}

}  // namespace

void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream) {
  const char* op = "gemm_int4";
  if (a.layout != Layout::kCodes) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  const bool skinny = plan_skinny(GemmFamily::kInt4, m, k, device.compute_capability);
  if (!skinny && gemm_int4_wgmma(op, a, w, output, k, device, stream)) return;
  const GemmTile tile = plan_mma_sync(GemmFamily::kInt4, m, n, k, device.compute_capability, device.sm_count);
  if (!skinny && plan_native_int4(a.layout, a.grid, w.grid, device.compute_capability)) {
    return launch_native(op, tile, a, w, output, k, stream);
  }
  const bool packed = a.layout == Layout::kPacked;
  const bool looks_up = is_fp4(w) || (packed && is_fp4(a));
  const NibbleRows w_rows = nibble_rows(op, "w", w, n, k, looks_up);
  const IntegerEpilogue epilogue =
      integer_epilogue(a, w, operand_affine(a, packed ? looks_up : is_fp4(a)), operand_affine(w, looks_up), output, k);
  auto multiply = [&](const auto& a_rows, auto load_a) {
    if (!skinny) {
      launch_tile<MmaInt8, decltype(load_a)::template Loader, NibbleLoader>(op, tile, a_rows, w_rows, steps_of(k), epilogue, stream);
    } else if (looks_up) {
      launch_skinny<MmaInt8, SkinnyTable>(op, a_rows, w_rows, k, epilogue, device, stream);
    } else {
      launch_skinny<MmaInt8, SkinnyNibbles>(op, a_rows, w_rows, k, epilogue, device, stream);
    }
  };
  packed ? multiply(nibble_rows(op, "a", a, m, k, looks_up), LoadWith<NibbleLoader>{})
         : multiply(byte_rows(a, m, k), LoadWith<ByteLoader>{});
}

}  // namespace quest::cuda
