// The hot loops of the CPU backend: one table of functions per instruction set.
//
// Every file of src/isa is compiled once per instruction set, with QUEST_ISA naming the namespace. These translation units use no standard
// containers or algorithms and no inline function of other headers, and keep helpers local: a template or inline function compiled for
// AVX-512 could otherwise be the copy that the linker keeps for everyone. All tasks are therefore plain numbers and pointers, prepared by
// the callers.
#pragma once

#include <cstdint>

#include "quest/grid.h"
#include "quest/isa.h"
#include "quest/types.h"

namespace quest {

// What the loops may assume of scratch rows: allocated in multiples of this many elements, at addresses aligned to kScratchAlignment.
inline constexpr int64_t kRowChunk = 128;
inline constexpr int64_t kScratchAlignment = 64;

struct RotateTask {
  const void* x;
  void* y;
  const uint8_t* mask;  // one bit an element, clear: 0 instead of x; nullptr: none
  DType dtype;
  int64_t k, block;
  int64_t mask_row_bytes;
  bool rotate_first;  // before the mask
  bool rotate_last;   // after the mask
};

struct QuantizeTask {
  const void* x;
  DType dtype;
  int64_t k;
  int64_t x_row_bytes;
  PrologueKind prologue;
  const void* norm_weight;  // kRmsNorm, of dtype
  float norm_epsilon;
  int64_t block;  // 1: no rotation
  bool sparse;
  Grid grid;
  QuantizeParams params;
  Layout layout;
  uint8_t* codes;
  float* scale;
  int32_t* code_sum;
  uint8_t* mask;   // or nullptr
  uint8_t* index;  // or nullptr
  int64_t code_row_bytes, mask_row_bytes, index_row_bytes;
  int64_t plane_stride;        // bytes from one plane to the next
  float middles[kMaxLevels];   // gauss, fp4 (magnitudes): middles between neighbouring levels
  float levels[kMaxLevels];    // by code
  uint8_t stored[kMaxLevels];  // by code: the byte that layout kValues stores
};

struct DequantizeTask {
  const uint8_t* codes;
  const float* scale;
  const uint8_t* index;  // or nullptr: dense
  void* y;
  DType dtype;
  int64_t k;
  int64_t block;  // 1: not rotated back
  Layout layout;
  int32_t bits;
  int64_t code_row_bytes, index_row_bytes, plane_stride;
  float levels[kMaxLevels];  // by stored byte
};

struct PackTask {
  uint8_t* codes;
  uint8_t* packed;
  Layout layout;
  int32_t bits;
  int64_t k;
  int64_t row_bytes, plane_stride;
};

// The kind of panel that a product works on. The left operand is "a", the right one "w".
enum class Panel : int32_t {
  kBytes,   // a: int8, w: uint8
  kBits,    // planes, copied
  kFloats,  // float32
};

// A product over panels: rows whose K is padded with zeros, in the order that unpacking w gives for nothing.
//   acc = mul_a mul_w sum u_a u_w + mul_a add_w U_a + mul_w add_a U_w + constant   (mod 2^32)
// U_w comes from one more row of a, all ones. kFloats: acc = sum x level(c_w) alone.
struct GemmTask {
  Panel panel;
  int64_t m, n, k;   // m: rows of this panel of a, without the row of ones
  int64_t block_n;   // columns of y that are made from one panel of w, a multiple of tile_n
  int64_t depth;     // bytes of a panel row (kBits: of one of its planes), zeros from K on
  int64_t a_stride;  // bytes from one panel row to the next
  int64_t w_stride;
  uint8_t* a_panel;  // [m + has_ones, a_stride]
  uint32_t* a_sum;   // [m] U_a
  bool has_ones;
  bool halves;  // both panels hold, in every 2 kPanelBytes columns, the even ones first (w is packed)
  int32_t a_planes, w_planes;

  // a, in its layout, of these m rows
  const uint8_t* a;
  Layout a_layout;
  DType a_dtype;  // kFloats
  int64_t a_row_bytes, a_plane_stride;
  uint8_t a_table[kMaxLevels];  // stored byte (or nibble) -> panel byte

  const uint8_t* w;
  const uint8_t* w_index;  // or nullptr: dense
  Layout w_layout;
  int64_t w_row_bytes, w_plane_stride, w_index_row_bytes;
  uint8_t w_table[kMaxLevels];
  bool w_table_is_identity;
  uint8_t w_zero;              // sparse: the panel byte of value 0
  float w_levels[kMaxLevels];  // kFloats: level by panel byte
  bool w_uniform;              // kFloats: the levels are equally far apart

  uint32_t mul_a, add_a, mul_w, add_w, constant;
  int32_t max_pair;  // largest |u_a u_w + u_a' u_w'|: tells how many sums of two products fit 16 bits

  const float* a_scale;  // [m]; nullptr: 1
  const float* w_scale;  // [n]
  const float* bias;     // [n] or nullptr
  uint8_t* y;            // [m, n] of y_dtype
  DType y_dtype;
};

struct Kernels {
  int64_t panel_bytes;       // rows of byte panels are multiples of twice as many, those of bit panels of as many
  int64_t tile_m, tile_n;    // the part of y that is held in registers
  int32_t max_bit_products;  // with at most this many pairs of planes a product is faster by popcounts than on bytes
  void (*rotate_rows)(const RotateTask& task, int64_t begin, int64_t end, float* row);
  // row: with a prologue, scratch of two rows.
  void (*quantize_rows)(const QuantizeTask& task, int64_t begin, int64_t end, float* row);
  void (*dequantize_rows)(const DequantizeTask& task, int64_t begin, int64_t end, float* row);
  // Position of the first code >= limit, or -1.
  int64_t (*find_above)(const uint8_t* codes, int64_t count, int32_t limit);
  void (*pack_rows)(const PackTask& task, int64_t begin, int64_t end);
  void (*unpack_rows)(const PackTask& task, int64_t begin, int64_t end);
  // Rows [begin, end) of the panel of a, and their sums.
  void (*fill_a)(const GemmTask& task, int64_t begin, int64_t end);
  // Columns [begin, end) of y. scratch: block_n panel rows of w, then tile_m + 2 rows of block_n sums.
  void (*gemm)(const GemmTask& task, int64_t begin, int64_t end, uint8_t* scratch);
};

// The table of the instruction set that cpu_isa() names, or that use_isa chose.
const Kernels& kernels();
bool isa_available(Isa isa);
// For tests: all later calls use this one, which must be available. Not to be called while an operation runs.
void use_isa(Isa isa);

}  // namespace quest
