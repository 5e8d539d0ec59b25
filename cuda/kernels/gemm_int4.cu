// gemm_int4: y = s_a s_w (v_a v_w^T) + bias of a packed weight and a packed or int8 activation.
//
// GPUs of compute capability 8.x have tensor cores for 4-bit integers, at twice the rate of int8. There, products of codes of at most 4
// bits stay nibbles: u = c, unsigned, so that the packed bytes are multiplied as they lie in memory and the zeros beyond K add nothing.
// (Signed nibbles u = c - 8 would need a flip of every top bit, and the zeros would count as 8 * 8.)
//
// Hopper has no such tensor cores (they are emulated there at a few percent of the int8 rate), and fp4 and wider activations do not fit:
// nibbles are widened to bytes, in registers for few rows and on wgmma (gemm_int4_wgmma.cu), else once per tile on their way to shared
// memory. An activation in the order of kEvenOdd meets them as they come: the low halves of some bytes, then the high ones.
#include "common/gemm_skinny.cuh"
#include "common/gemm_tile.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {
namespace {

// Few rows, if their kernel takes these operands.
bool gemm_int4_skinny(const char* op, const Operand& a, const Operand& w, const Output& output, int64_t k, const Device& device,
                      cudaStream_t stream) {
  const bool looks_up = is_fp4(w), both = a.layout == Layout::kPacked && !is_fp4(a) && !looks_up;
  if (!plan_skinny(both ? GemmFamily::kInt4 : GemmFamily::kInt8, output.m, k, device.compute_capability)) return false;
  if (!(both ? is_aligned(a.data, 16) : is_skinny_a(a, k)) || !is_skinny_w(w, k)) return false;
  const IntegerEpilogue epilogue = integer_epilogue(a, w, skinny_affine(a, is_fp4(a)), skinny_affine(w, looks_up), output, k);
  if (epilogue.a.sums_values || epilogue.w.sums_values) return false;
  const SkinnyRows a_rows = skinny_rows(a, output.m, k), w_rows = skinny_rows(w, output.n, k);
  if (both) {
    launch_skinny<MmaInt8, SkinnyNibbles, StreamedNibbles>(op, a_rows, w_rows, epilogue, device, stream);
  } else if (looks_up) {
    launch_skinny<MmaInt8, SkinnyTable, StreamedBytes<false>>(op, a_rows, w_rows, epilogue, device, stream);
  } else {
    launch_skinny<MmaInt8, SkinnyNibbles, StreamedBytes<true>>(op, a_rows, w_rows, epilogue, device, stream);
  }
  return true;
}

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
    ByteRows a_rows = plain_rows(a.data, output.m, row_bytes(a.layout, k));
    a_rows.even_odd = a.layout == Layout::kEvenOdd;
    launch_tile<MmaNibbles, NarrowingLoader, ByteLoader>(op, tile, a_rows, w_rows, steps, epilogue, stream);
  }
}

}  // namespace

// (Here, since it is products of 4-bit weights whose layouts depend on the GPU.)
GemmShape shape_on_device(int64_t m, int64_t n, int64_t k) {
  const Device device = current_device("shape_on_device");
  const bool no_code = device.compute_capability == 90 && !device.hopper_code;
  return {m, n, k, no_code ? 89 : device.compute_capability, device.sm_count};
}

void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               cudaStream_t stream) {
  const char* op = "gemm_int4";
  if (a.layout != Layout::kCodes && a.layout != Layout::kEvenOdd) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  if (a.layout == Layout::kEvenOdd) check_aligned(op, "a", a.data);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  if (gemm_int4_skinny(op, a, w, output, k, device, stream)) return;
  if (gemm_int4_wgmma(op, a, w, output, k, device, stream)) return;
  const bool looks_up = is_fp4(a) || is_fp4(w);
  const GemmTile tile = plan_mma_sync(GemmFamily::kInt4, m, n, device.sm_count);
  if (plan_native_int4(a.layout, a.grid, w.grid, device.compute_capability)) return launch_native(op, tile, a, w, output, k, stream);
  NibbleRows w_rows = nibble_rows(op, "w", w, n, k, looks_up);
  w_rows.even_odd = a.layout == Layout::kEvenOdd;
  const bool packed = a.layout == Layout::kPacked;
  const IntegerEpilogue epilogue =
      integer_epilogue(a, w, operand_affine(a, packed ? looks_up : is_fp4(a)), operand_affine(w, looks_up), output, k);
  packed ? launch_tile<MmaInt8, NibbleLoader, NibbleLoader>(op, tile, nibble_rows(op, "a", a, m, k, looks_up), w_rows, steps_of(k),
                                                            epilogue, stream)
         : launch_tile<MmaInt8, ByteLoader, NibbleLoader>(op, tile, byte_rows(a, m, k), w_rows, steps_of(row_bytes(a.layout, k)), epilogue,
                                                          stream);
}

}  // namespace quest::cuda
