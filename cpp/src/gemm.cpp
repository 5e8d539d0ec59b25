// Checks and preparation of the products: which panels, which integers they hold, and how the work is split. The products are in
// isa/gemm.cpp.
#include "quest/gemm.h"

#include <algorithm>
#include <limits>

#include "buffer.h"
#include "kernels.h"
#include "quest/check.h"
#include "quest/grid.h"
#include "quest/packing.h"

namespace quest {
namespace {

// Rows of a that share one panel of w: unpacking w costs about as much as its product with four rows.
constexpr int64_t kBlockM = 512;
// Bytes of a panel of w: a part of L2; of L1 when few rows of a use it before it is gone.
constexpr int64_t kPanelL2 = 256 * 1024;
constexpr int64_t kPanelL1 = 24 * 1024;
constexpr int64_t kFewRows = 16;
constexpr int64_t kMaxBlockN = 64;
// Columns are dealt out in pieces of at least this many products.
constexpr int64_t kGrainProducts = 1 << 20;

void check_shape(const char* op, int64_t m, int64_t n, int64_t k) {
  check(m >= 0 && n >= 0 && k >= 0, op, ": expected m, n, k >= 0, got ", m, ", ", n, ", ", k);
}

void check_layout(const char* op, const char* argument, const Operand& operand, Layout first, Layout second) {
  check(operand.layout == first || operand.layout == second, op, ": expected ", argument, " in layout ", to_string(first),
        first == second ? "" : " or " + to_string(second), ", got ", to_string(operand.layout),
        "; write it in that layout with quantize or pack");
}

void check_operand(const char* op, const char* argument, const Operand& operand) {
  check_grid(operand.grid);
  check(has_values(operand.grid), op, ": expected ", argument, " on a grid with integer values, got ", to_string(operand.grid),
        "; dequantize it and multiply in floating point");
  check(operand.layout != Layout::kPacked || operand.grid.bits <= 4, op, ": expected ", argument,
        " of at most 4 bits in layout packed, got ", to_string(operand.grid), "; use layout codes");
}

void check_index(const char* op, const Operand& w, bool sparse) {
  check(sparse == (w.index != nullptr), op, ": expected w ", sparse ? "with" : "without", " a 4:8 index, got ", sparse ? "none" : "one",
        "; use ", sparse ? "the product of its layout" : "gemm_sparse");
}

// The bytes of a: signed integers u with v = mul u + add, every stored byte or nibble by table.
void set_a_bytes(const Operand& a, GemmTask& task) {
  Affine value{1, 0};
  if (a.layout == Layout::kValues) {
    value = affine(a.grid, Layout::kValues);
    for (int32_t byte = 0; byte < 256; ++byte) task.a_table[byte] = static_cast<uint8_t>(byte);
  } else if (a.grid.bits == 8) {
    value = affine(a.grid, Layout::kValues);
    for (int32_t code = 0; code < 256; ++code) task.a_table[code] = static_cast<uint8_t>(code - 128);
  } else {
    for (int32_t code = 0; code < level_count(a.grid); ++code) task.a_table[code] = static_cast<uint8_t>(code_value(a.grid, code));
  }
  task.mul_a = static_cast<uint32_t>(value.mul);
  task.add_a = static_cast<uint32_t>(value.add);
}

// The bytes of w: unsigned integers.
void set_w_bytes(const Operand& w, GemmTask& task) {
  const int32_t top = max_value(w.grid);
  const bool values = w.layout == Layout::kValues;
  Affine value{1, -top};
  task.w_zero = static_cast<uint8_t>(top);
  if (values && w.grid.bits == 8) {
    value = affine(w.grid, Layout::kCodes);
    for (int32_t byte = 0; byte < 256; ++byte) task.w_table[byte] = static_cast<uint8_t>(byte ^ 0x80);
  } else if (values) {
    for (int32_t byte = 0; byte < 256; ++byte) task.w_table[byte] = static_cast<uint8_t>(byte + top);
  } else if (w.grid.kind == GridKind::kFp4 || w.index != nullptr) {
    for (int32_t code = 0; code < level_count(w.grid); ++code) task.w_table[code] = static_cast<uint8_t>(code_value(w.grid, code) + top);
  } else {
    value = affine(w.grid, w.layout);
    task.w_table_is_identity = true;
  }
  task.mul_w = static_cast<uint32_t>(value.mul);
  task.add_w = static_cast<uint32_t>(value.add);
}

// An odd number of cache lines: rows a power of two apart would share the same few sets of the cache.
int64_t panel_stride(int64_t bytes) {
  const int64_t lines = round_up(bytes, kScratchAlignment) / kScratchAlignment;
  return (lines | 1) * kScratchAlignment;
}

// a in blocks of rows: its panel, then the columns of y, both in parallel.
void run(GemmTask task, const Operand& w, const float* a_scale, const float* bias, void* y, DType dtype, int64_t m,
         const ParallelFor& parallel_for) {
  const Kernels& kernel = kernels();
  const int64_t columns = task.n;
  if (m == 0 || columns == 0) return;
  const int64_t k = task.k;
  const int64_t width = task.panel == Panel::kFloats ? sizeof(float) : 1;
  task.depth = task.panel == Panel::kBits ? round_up((k + 7) / 8, kernel.panel_bytes) : width * round_up(k, 2 * kernel.panel_bytes);
  const bool planes = task.panel == Panel::kBits;
  task.a_stride = panel_stride((planes ? task.a_planes : 1) * task.depth);
  task.w_stride = panel_stride((planes ? task.w_planes : 1) * task.depth);
  task.halves = task.panel != Panel::kBits && task.w_layout == Layout::kPacked && w.index == nullptr;
  task.w = static_cast<const uint8_t*>(w.data);
  task.w_index = w.index;
  task.w_row_bytes = row_bytes(w.layout, w.index ? k / 2 : k);
  task.w_plane_stride = columns * task.w_row_bytes;
  task.w_index_row_bytes = index_row_bytes(k);
  task.w_scale = w.scale;
  task.bias = bias;
  task.y_dtype = dtype;
  task.has_ones = task.add_a != 0;
  task.constant = static_cast<uint32_t>(k) * task.add_a * task.add_w;

  const int64_t block_m = std::min(m, kBlockM);
  const int64_t tile = kernel.tile_n;
  const int64_t fitting = (m <= kFewRows ? kPanelL1 : kPanelL2) / task.w_stride;
  // Few columns are still split, for the sake of the threads.
  const int64_t shared = (columns + 7) / 8;
  task.block_n = round_up(std::max<int64_t>(std::min({fitting, shared, kMaxBlockN}), 1), tile);

  Buffer<uint8_t> panel((block_m + 1) * task.a_stride);
  Buffer<uint32_t> sums(block_m);
  task.a_panel = panel.data();
  task.a_sum = sums.data();
  const uint8_t* const a = task.a;
  const int64_t y_row_bytes = columns * element_size(dtype);
  const int64_t scratch_bytes = task.block_n * task.w_stride + static_cast<int64_t>(sizeof(uint32_t)) * task.block_n * (kernel.tile_m + 2);
  for (int64_t first = 0; first < m; first += block_m) {
    task.m = std::min(block_m, m - first);
    task.a = a + first * task.a_row_bytes;
    task.a_scale = a_scale ? a_scale + first : nullptr;
    task.y = static_cast<uint8_t*>(y) + first * y_row_bytes;
    if (k > 0) {
      parallel_for(0, task.m + task.has_ones, row_grain(k), [&](int64_t begin, int64_t end) { kernel.fill_a(task, begin, end); });
    } else {
      std::fill_n(task.a_sum, task.m, 0u);  // panels of no columns: y is the bias
    }
    const int64_t grain = std::max(task.block_n, kGrainProducts / std::max<int64_t>(task.m * k, 1));
    parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> scratch(scratch_bytes);
      kernel.gemm(task, begin, end, scratch.data());
    });
  }
}

GemmTask task_of(const Operand& a, const Operand& w, int64_t m, int64_t n, int64_t k) {
  GemmTask task{};
  task.n = n;
  task.k = k;
  task.a = static_cast<const uint8_t*>(a.data);
  task.a_layout = a.layout;
  task.a_row_bytes = row_bytes(a.layout, k);
  task.a_plane_stride = m * task.a_row_bytes;
  task.w_layout = w.layout;
  task.a_planes = a.grid.bits;
  task.w_planes = w.grid.bits;
  return task;
}

void multiply_bytes(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                    const ParallelFor& parallel_for) {
  GemmTask task = task_of(a, w, m, n, k);
  task.panel = Panel::kBytes;
  set_a_bytes(a, task);
  set_w_bytes(w, task);
  const int32_t largest_a = task.mul_a == 1 && task.add_a == 0 ? max_value(a.grid) : 128;
  const int32_t largest_w =
      task.w_table_is_identity || (w.layout == Layout::kValues && w.grid.bits == 8) ? level_count(w.grid) - 1 : 2 * max_value(w.grid);
  task.max_pair = 2 * largest_a * largest_w;
  run(task, w, a.scale, bias, y, dtype, m, parallel_for);
}

}  // namespace

int64_t max_gemm_depth(Grid a, Grid w) {
  check_grid(a);
  check_grid(w);
  return std::numeric_limits<int32_t>::max() / (static_cast<int64_t>(max_value(a)) * max_value(w));
}

void check_gemm_depth(const char* op, Grid a, Grid w, int64_t k) {
  const int64_t most = max_gemm_depth(a, w);
  check(k <= most, op, ": expected k <= ", most, " for ", to_string(a), " x ", to_string(w),
        ", beyond which int32 sums could overflow, got ", k, "; split k, or use fewer bits");
}

void gemm_int8(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               const ParallelFor& parallel_for) {
  const char* op = "gemm_int8";
  check_shape(op, m, n, k);
  check_operand(op, "a", a);
  check_operand(op, "w", w);
  check_layout(op, "a", a, Layout::kValues, Layout::kCodes);
  check_layout(op, "w", w, Layout::kValues, Layout::kCodes);
  check_index(op, w, false);
  check_gemm_depth(op, a.grid, w.grid, k);
  multiply_bytes(a, w, bias, y, dtype, m, n, k, parallel_for);
}

void gemm_int4(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
               const ParallelFor& parallel_for) {
  const char* op = "gemm_int4";
  check_shape(op, m, n, k);
  check_operand(op, "a", a);
  check_operand(op, "w", w);
  if (a.layout != Layout::kCodes && a.layout != Layout::kEvenOdd) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check_index(op, w, false);
  check_gemm_depth(op, a.grid, w.grid, k);
  multiply_bytes(a, w, bias, y, dtype, m, n, k, parallel_for);
}

void gemm_planes(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 const ParallelFor& parallel_for) {
  const char* op = "gemm_planes";
  check_shape(op, m, n, k);
  check_layout(op, "a", a, Layout::kPlanes, Layout::kPlanes);
  check_layout(op, "w", w, Layout::kPlanes, Layout::kPlanes);
  for (const Grid grid : {a.grid, w.grid}) {
    check_grid(grid);
    check(grid.kind == GridKind::kInt && grid.bits <= 4, op, ": expected int grids of 1 to 4 bits, got ", to_string(grid),
          "; use gemm_int4 or gemm_int8");
  }
  check_index(op, w, false);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (a.grid.bits * w.grid.bits > kernels().max_bit_products) return multiply_bytes(a, w, bias, y, dtype, m, n, k, parallel_for);
  GemmTask task = task_of(a, w, m, n, k);
  task.panel = Panel::kBits;
  const Affine value_a = affine(a.grid, a.layout);
  const Affine value_w = affine(w.grid, w.layout);
  task.mul_a = static_cast<uint32_t>(value_a.mul);
  task.add_a = static_cast<uint32_t>(value_a.add);
  task.mul_w = static_cast<uint32_t>(value_w.mul);
  task.add_w = static_cast<uint32_t>(value_w.add);
  run(task, w, a.scale, bias, y, dtype, m, parallel_for);
}

void gemm_sparse(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 const ParallelFor& parallel_for) {
  const char* op = "gemm_sparse";
  check_shape(op, m, n, k);
  check_operand(op, "a", a);
  check_operand(op, "w", w);
  if (a.layout != Layout::kEvenOdd) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check_index(op, w, true);
  check(k % 8 == 0, op, ": expected 8 to divide k, got ", k, "; pad k");
  check_gemm_depth(op, a.grid, w.grid, k);
  multiply_bytes(a, w, bias, y, dtype, m, n, k, parallel_for);
}

void gemm_weight_only(const void* x, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                      const ParallelFor& parallel_for) {
  const char* op = "gemm_weight_only";
  check_shape(op, m, n, k);
  check_grid(w.grid);
  check(w.layout != Layout::kValues && w.layout != Layout::kEvenOdd, op, ": expected w in layout codes, packed or planes, got ",
        to_string(w.layout), "; use layout codes");
  check(w.layout != Layout::kPacked || w.grid.bits <= 4, op, ": expected w of at most 4 bits in layout packed, got ", to_string(w.grid),
        "; use layout codes");
  check_index(op, w, false);
  GemmTask task = task_of(Operand{w.grid, Layout::kCodes, x, nullptr, nullptr}, w, m, n, k);
  task.panel = Panel::kFloats;
  task.a_dtype = dtype;
  task.a_row_bytes = k * element_size(dtype);
  for (int32_t code = 0; code < level_count(w.grid); ++code) task.w_levels[code] = code_level(w.grid, code);
  task.w_uniform = has_values(w.grid) && w.grid.kind != GridKind::kFp4;
  run(task, w, nullptr, bias, y, dtype, m, parallel_for);
}

}  // namespace quest
