#include "quest/quantize.h"

#include <algorithm>

#include "buffer.h"
#include "kernels.h"
#include "quest/check.h"
#include "quest/packing.h"
#include "quest/rotation.h"

namespace quest {

void check_layout(const char* op, const Quantizer& quantizer, Layout layout, int64_t rows, int64_t k) {
  check_grid(quantizer.grid);
  check(rows >= 0 && k >= 0, op, ": expected a shape of sizes >= 0, got [", rows, ", ", k, "]");
  check(layout != Layout::kValues || has_values(quantizer.grid), op, ": expected a grid with integer values for layout values, got ",
        to_string(quantizer.grid), "; use layout codes");
  check(layout != Layout::kPacked || quantizer.grid.bits <= 4, op, ": expected at most 4 bits for layout packed, got grid ",
        to_string(quantizer.grid), "; use layout codes or planes");
  if (quantizer.sparsity == Sparsity::kNone) return;
  check(k % 8 == 0, op, ": expected 8 to divide the last dimension of a 4:8 sparse quantizer, got ", k, "; pad it, or drop the sparsity");
  check(layout != Layout::kPlanes && layout != Layout::kEvenOdd, op,
        ": expected layout codes, values or packed for a 4:8 sparse quantizer, got ", to_string(layout), "; use packed");
  // 8-bit values are c - 128, among which no 0 is left to mean a pruned element.
  check(layout != Layout::kValues || quantizer.grid.bits < 8, op,
        ": expected less than 8 bits for layout values of a 4:8 sparse quantizer, got ", to_string(quantizer.grid), "; use layout codes");
}

void check_index(const char* op, const Quantizer& quantizer, bool has_index) {
  const bool sparse = quantizer.sparsity == Sparsity::kFourEight;
  check(sparse == has_index, op, ": expected ", sparse ? "an index" : "no index", " for quantizer ", to_string(quantizer), ", got ",
        has_index ? "one" : "none", "; pass the index that quantize gave, where it gave one");
}

void check_prologue(const char* op, const Prologue& prologue) {
  const bool is_norm = prologue.kind == PrologueKind::kRmsNorm;
  check(is_norm == (prologue.weight != nullptr), op, ": expected ", is_norm ? "a norm_weight" : "no norm_weight", " for prologue ",
        to_string(prologue.kind), ", got ", prologue.weight != nullptr ? "one" : "none",
        is_norm ? "; pass the weight of the norm" : "; leave it out, or use rms_norm");
}

int64_t rotation_block(const Quantizer& quantizer, int64_t k) {
  return quantizer.rotation == Rotation::kHadamard && k > 0 ? default_block(k) : 1;
}

int64_t stored_codes(const Quantizer& quantizer, Layout layout, int64_t k) {
  return quantizer.sparsity == Sparsity::kFourEight && layout != Layout::kValues ? k / 2 : k;
}

void quantize(const Quantizer& quantizer, Layout layout, const void* x, DType dtype, int64_t rows, int64_t k, const QuantizeOutput& output,
              const ParallelFor& parallel_for, const Prologue& prologue) {
  check_layout("quantize", quantizer, layout, rows, k);
  check_prologue("quantize", prologue);
  const Grid grid = quantizer.grid;
  QuantizeTask task{};
  task.x = x;
  task.dtype = dtype;
  task.k = k;
  task.x_row_bytes = input_width(prologue.kind, k) * element_size(dtype);
  task.prologue = prologue.kind;
  task.norm_weight = prologue.weight;
  task.norm_epsilon = prologue.epsilon;
  task.block = rotation_block(quantizer, k);
  task.sparse = quantizer.sparsity == Sparsity::kFourEight;
  check_index("quantize", quantizer, output.index != nullptr);
  task.grid = grid;
  task.params = quantize_params(quantizer);
  task.layout = layout;
  task.codes = static_cast<uint8_t*>(output.codes);
  task.scale = output.scale;
  task.code_sum = output.code_sum;
  task.mask = output.mask;
  task.index = output.index;
  task.code_row_bytes = row_bytes(layout, stored_codes(quantizer, layout, k));
  task.mask_row_bytes = plane_row_bytes(k);
  task.index_row_bytes = index_row_bytes(k);
  task.plane_stride = rows * task.code_row_bytes;
  for (int32_t c = 0; c < 1 << grid.bits; ++c) {
    const bool code = c < task.params.levels;  // ternary has three codes of two bits
    task.levels[c] = code ? code_level(grid, c) : 0.0f;
    if (!has_values(grid) || !code) continue;
    task.stored[c] = static_cast<uint8_t>(grid.bits == 8 ? c - 128 : code_value(grid, c));
  }
  if (grid.kind == GridKind::kGauss || grid.kind == GridKind::kFp4) {
    const int32_t count = grid.kind == GridKind::kFp4 ? 8 : task.params.levels;
    for (int32_t i = 0; i + 1 < count; ++i) task.middles[i] = (task.levels[i] + task.levels[i + 1]) / 2;
    // The gauss levels are symmetric but for rounding: 0 takes the level below it, as in the int grid.
    if (grid.kind == GridKind::kGauss) task.middles[count / 2 - 1] = 0.0f;
  }
  if (k == 0) {  // rows of nothing: sigma 0
    std::fill_n(output.scale, rows, task.params.scale_epsilon);
    std::fill_n(output.code_sum, rows, 0);
    return;
  }
  if (rows == 0) return;
  const Kernels& kernel = kernels();
  const int64_t scratch_rows = prologue.kind == PrologueKind::kNone ? 1 : 2;
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(scratch_rows * round_up(k, kRowChunk));
    kernel.quantize_rows(task, begin, end, row.data());
  });
}

void dequantize(const Quantizer& quantizer, Layout layout, const void* codes, const float* scale, const uint8_t* index, void* y,
                DType dtype, int64_t rows, int64_t k, const ParallelFor& parallel_for) {
  check_layout("dequantize", quantizer, layout, rows, k);
  const Grid grid = quantizer.grid;
  DequantizeTask task{};
  task.codes = static_cast<const uint8_t*>(codes);
  task.scale = scale;
  check_index("dequantize", quantizer, index != nullptr);
  task.index = index;
  task.y = y;
  task.dtype = dtype;
  task.k = k;
  task.block = quantizer.original ? rotation_block(quantizer, k) : 1;
  task.layout = layout;
  task.bits = grid.bits;
  task.code_row_bytes = row_bytes(layout, stored_codes(quantizer, layout, k));
  task.index_row_bytes = index_row_bytes(k);
  task.plane_stride = rows * task.code_row_bytes;
  if (layout == Layout::kValues) {
    const Affine value = affine(grid, layout);
    for (int32_t u = -128; u < 128; ++u) task.levels[static_cast<uint8_t>(u)] = static_cast<float>(value.mul * u + value.add);
  } else {
    for (int32_t c = 0; c < level_count(grid); ++c) task.levels[c] = code_level(grid, c);
  }
  if (rows == 0 || k == 0) return;
  const Kernels& kernel = kernels();
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(round_up(k, kRowChunk));
    kernel.dequantize_rows(task, begin, end, row.data());
  });
}

void quantize_backward(const Quantizer& quantizer, const void* grad, const uint8_t* mask, void* dx, DType dtype, int64_t rows, int64_t k,
                       const ParallelFor& parallel_for) {
  check(rows >= 0 && k >= 0, "quantize_backward: expected a shape of sizes >= 0, got [", rows, ", ", k, "]");
  if (rows == 0 || k == 0) return;
  RotateTask task{};
  task.x = grad;
  task.y = dx;
  task.mask = mask;
  task.dtype = dtype;
  task.k = k;
  task.block = rotation_block(quantizer, k);
  task.mask_row_bytes = plane_row_bytes(k);
  task.rotate_first = quantizer.original;
  task.rotate_last = true;
  const Kernels& kernel = kernels();
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(round_up(k, kRowChunk));
    kernel.rotate_rows(task, begin, end, row.data());
  });
}

}  // namespace quest
