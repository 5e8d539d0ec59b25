// The operations on rows (quantize, dequantize, quantize_backward, hadamard, pack) on the GPU against the CPU's, as the GPU's tests and the
// emulated ones check them. All but quantize are equal to the bit.
//
// quantize adds the squares of a row in another order than the CPU, and may add the values of a rotation in another order, so sigma and x_h
// may differ in the last bits, and with them codes and mask bits whose x_h/s lies that close to a boundary: at most one in a thousand.
// Everything else is equal to the bit, also between the layouts. A prologue's square root and exponential differ from the CPU's by some
// 2^-22, so one value in thousands rounds to its neighbour in a 16-bit type: that moves few codes, but a short row's sigma.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gpu.h"
#include "quest/cuda/packing.h"
#include "quest/cuda/quantize.h"
#include "quest/cuda/rotation.h"
#include "quest/grid.h"
#include "quest/packing.h"

namespace quest::testing {

inline constexpr double kMostDifferent = 1e-3;  // of codes and mask bits

struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> code_sum;
  std::vector<uint8_t> mask, index;
};

inline bool is_sparse(const Quantizer& quantizer) { return quantizer.sparsity == Sparsity::kFourEight; }

inline int64_t codes_row_bytes(const Quantizer& quantizer, Layout layout, int64_t k) {
  return row_bytes(layout, is_sparse(quantizer) && layout != Layout::kValues ? k / 2 : k);
}

inline int64_t codes_bytes(const Quantizer& quantizer, Layout layout, int64_t rows, int64_t k) {
  return rows * codes_row_bytes(quantizer, layout, k) * (layout == Layout::kPlanes ? quantizer.grid.bits : 1);
}

// A prologue whose weight is a vector, in host or, shifted by an offset, in device memory.
struct PrologueInput {
  PrologueKind kind = PrologueKind::kNone;
  std::vector<uint8_t> weight;

  static PrologueInput of(PrologueKind kind, Random& random, DType dtype, int64_t k) {
    if (kind != PrologueKind::kRmsNorm) return {kind, {}};
    std::vector<float> values = random.normals(k);
    for (float& value : values) value = 1 + value / 4;
    return {kind, to_dtype(values, dtype)};
  }
  Prologue prologue(const uint8_t* data) const { return kind == PrologueKind::kRmsNorm ? Prologue{kind, data, 1e-5f} : Prologue{kind}; }
};

inline constexpr PrologueKind kPrologueKinds[] = {PrologueKind::kRmsNorm, PrologueKind::kSiluMul};

inline Quantized quantize_cpu(const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype, int64_t rows,
                              int64_t k, const PrologueInput& input = {}) {
  Quantized result{std::vector<uint8_t>(codes_bytes(quantizer, layout, rows, k)), std::vector<float>(rows), std::vector<int32_t>(rows),
                   std::vector<uint8_t>(rows * plane_row_bytes(k)),
                   std::vector<uint8_t>(is_sparse(quantizer) ? rows * index_row_bytes(k) : 0)};
  quantize(quantizer, layout, x.data(), dtype, rows, k,
           {result.codes.data(), result.scale.data(), result.code_sum.data(), result.mask.data(),
            is_sparse(quantizer) ? result.index.data() : nullptr},
           serial_for, input.prologue(input.weight.data()));
  return result;
}

template <typename Run>
Quantized quantize_gpu_with(const Run& run, const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype,
                            int64_t rows, int64_t k, int64_t offset, const PrologueInput& input = {}) {
  const OnDevice<uint8_t> in(x, offset), weight(input.weight, offset), codes(codes_bytes(quantizer, layout, rows, k));
  const OnDevice<uint8_t> mask(rows * plane_row_bytes(k)), index(is_sparse(quantizer) ? rows * index_row_bytes(k) : 0);
  const OnDevice<float> scale(rows);
  const OnDevice<int32_t> code_sum(rows);
  run([&](cudaStream_t stream) {
    cuda::quantize(quantizer, layout, in.data(), dtype, rows, k,
                   {codes.data(), scale.data(), code_sum.data(), mask.data(), is_sparse(quantizer) ? index.data() : nullptr}, stream,
                   input.prologue(weight.data()));
  });
  return {codes.host(), scale.host(), code_sum.host(), mask.host(), index.host()};
}

inline Quantized quantize_gpu(const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype, int64_t rows,
                              int64_t k, int64_t offset = 0, const PrologueInput& input = {}) {
  return quantize_gpu_with([](const auto& body) { body(nullptr); }, quantizer, layout, x, dtype, rows, k, offset, input);
}

inline void expect_close(const Quantized& expected, const Quantized& got, double scale_tolerance = 1e-5, double index_share = 0) {
  EXPECT_LE(share_different(expected.codes, got.codes), kMostDifferent);
  EXPECT_LE(share_different(expected.mask, got.mask), kMostDifferent);
  EXPECT_LE(share_different(expected.index, got.index), index_share);  // depends on x_h alone
  for (size_t r = 0; r < expected.scale.size(); ++r) {
    if (std::isnan(expected.scale[r])) {
      EXPECT_TRUE(std::isnan(got.scale[r])) << "row " << r;
    } else {
      EXPECT_NEAR(got.scale[r], expected.scale[r], scale_tolerance * expected.scale[r]) << "row " << r;
    }
  }
}

// What quantize writes in `layout` follows from what it writes as codes: the same numbers, packed by the CPU.
inline void expect_same_codes(const Quantizer& quantizer, Layout layout, const Quantized& codes, const Quantized& got, int64_t rows,
                              int64_t k) {
  const int64_t stored = is_sparse(quantizer) ? k / 2 : k;
  std::vector<uint8_t> expected(codes_bytes(quantizer, layout, rows, k));
  if (layout == Layout::kValues) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = codes.codes.data() + r * stored;
      for (int64_t j = 0; j < k; ++j) {
        if (is_sparse(quantizer)) {
          const int32_t pairs = codes.index[r * index_row_bytes(k) + j / 16] >> (j / 8 % 2 * 4) & 15;
          const int64_t pair = j % 8 / 2;
          if (pair != (pairs & 3) && pair != pairs >> 2) continue;
        }
        const int32_t code = *row++;
        if (std::isnan(codes.scale[r])) continue;
        expected[r * k + j] = static_cast<uint8_t>(quantizer.grid.bits == 8 ? code - 128 : code_value(quantizer.grid, code));
      }
    }
  } else if (layout == Layout::kCodes) {
    expected = codes.codes;
  } else if (layout == Layout::kEvenOdd) {
    for (int64_t i = 0; i < rows * k; ++i) {
      expected[i / k * row_bytes(layout, k) + even_odd_column(i % k)] = codes.codes[i];
    }
  } else {
    pack(quantizer.grid, layout, codes.codes.data(), expected.data(), rows, stored, serial_for);
  }
  EXPECT_TRUE(bitwise_equal(expected, got.codes, codes_row_bytes(quantizer, layout, k)));
  EXPECT_EQ(codes.code_sum, got.code_sum);
  EXPECT_TRUE(bitwise_equal(codes.mask, got.mask, plane_row_bytes(k)));
}

inline std::vector<Layout> layouts_of(const Quantizer& quantizer) {
  std::vector<Layout> layouts = {Layout::kCodes};
  const bool has_zero = !is_sparse(quantizer) || quantizer.grid.bits < 8;  // 8-bit values leave none for the pruned
  if (has_values(quantizer.grid) && has_zero) layouts.push_back(Layout::kValues);
  if (quantizer.grid.bits <= 4) layouts.push_back(Layout::kPacked);
  if (!is_sparse(quantizer)) layouts.insert(layouts.end(), {Layout::kPlanes, Layout::kEvenOdd});
  return layouts;
}

inline void check_all_layouts(const Quantizer& quantizer, const std::vector<float>& values, DType dtype, int64_t rows, int64_t k,
                              int64_t offset, const PrologueInput& input = {}) {
  SCOPED_TRACE(concat(to_string(quantizer), ", [", rows, ", ", k, "], dtype ", static_cast<int>(dtype), ", offset ", offset, ", prologue ",
                      to_string(input.kind)));
  const std::vector<uint8_t> x = to_dtype(values, dtype);
  const Quantized codes = quantize_gpu(quantizer, Layout::kCodes, x, dtype, rows, k, offset, input);
  const Quantized expected = quantize_cpu(quantizer, Layout::kCodes, x, dtype, rows, k, input);
  if (input.kind == PrologueKind::kNone) {
    expect_close(expected, codes);
  } else {
    // A value that rounds to its neighbour, by 2 roundings, has at most k, and seldom more than 32, of the k sigma^2 of its row.
    const double moved = 2 * rounding(dtype) * std::min(1.0, 32.0 / static_cast<double>(k));
    expect_close(expected, codes, 1e-5 + moved, kMostDifferent);
  }
  const int64_t stored = is_sparse(quantizer) ? k / 2 : k;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int64_t j = 0; j < stored; ++j) sum += codes.codes[r * stored + j];
    EXPECT_EQ(codes.code_sum[r], sum) << "row " << r;
  }
  for (const Layout layout : layouts_of(quantizer)) {
    SCOPED_TRACE(to_string(layout));
    expect_same_codes(quantizer, layout, codes, quantize_gpu(quantizer, layout, x, dtype, rows, k, offset, input), rows, k);
  }
}

inline void check_prologue_of_normals(PrologueKind kind, const Quantizer& quantizer, DType dtype, int64_t rows, int64_t k, Random& random,
                                      int64_t offset = 0) {
  const PrologueInput input = PrologueInput::of(kind, random, dtype, k);
  check_all_layouts(quantizer, random.normals(rows * input_width(kind, k)), dtype, rows, k, offset, input);
}

// A row is the same, whatever the number of rows: the first of many and the last of them as they are by themselves.
inline void check_many_rows_as_few(Random& random, const Quantizer& quantizer, DType dtype, PrologueKind kind, int64_t rows,
                                   int64_t few_rows, int64_t k) {
  SCOPED_TRACE(concat(to_string(quantizer), ", dtype ", static_cast<int>(dtype), ", prologue ", to_string(kind)));
  const PrologueInput input = PrologueInput::of(kind, random, dtype, k);
  const std::vector<uint8_t> x = to_dtype(random.normals(rows * input_width(kind, k)), dtype);
  const Quantized many = quantize_gpu(quantizer, Layout::kPacked, x, dtype, rows, k, 0, input);
  const int64_t x_row = input_width(kind, k) * element_size(dtype), codes_row = packed_row_bytes(k), mask_row = plane_row_bytes(k);
  for (const int64_t first : {int64_t{0}, rows - few_rows}) {
    auto rows_of = [&](const auto& all, int64_t width) {
      return std::decay_t<decltype(all)>(all.begin() + first * width, all.begin() + (first + few_rows) * width);
    };
    const Quantized few = quantize_gpu(quantizer, Layout::kPacked, rows_of(x, x_row), dtype, few_rows, k, 0, input);
    EXPECT_TRUE(bitwise_equal(few.codes, rows_of(many.codes, codes_row), codes_row));
    EXPECT_TRUE(bitwise_equal(few.mask, rows_of(many.mask, mask_row), mask_row));
    EXPECT_TRUE(bitwise_equal(few.scale, rows_of(many.scale, 1), 1));
    EXPECT_TRUE(bitwise_equal(few.code_sum, rows_of(many.code_sum, 1), 1));
  }
}

inline void check_dequantize(Random& random, const Quantizer& quantizer, Layout layout, DType dtype, int64_t rows, int64_t k) {
  SCOPED_TRACE(concat(to_string(quantizer), ", ", to_string(layout), ", k = ", k, ", dtype ", static_cast<int>(dtype)));
  const Quantized stored = quantize_cpu(quantizer, layout, to_dtype(random.normals(rows * k), DType::kFloat32), DType::kFloat32, rows, k);
  std::vector<uint8_t> expected(rows * k * element_size(dtype));
  const bool needs_index = is_sparse(quantizer);
  dequantize(quantizer, layout, stored.codes.data(), stored.scale.data(), needs_index ? stored.index.data() : nullptr, expected.data(),
             dtype, rows, k, serial_for);
  const OnDevice<uint8_t> codes(stored.codes), index(stored.index), y(static_cast<int64_t>(expected.size()));
  const OnDevice<float> scale(stored.scale);
  cuda::dequantize(quantizer, layout, codes.data(), scale.data(), needs_index ? index.data() : nullptr, y.data(), dtype, rows, k, nullptr);
  EXPECT_TRUE(bitwise_equal(expected, y.host(), k * element_size(dtype)));
}

// run: of a body that takes a stream.
template <typename Run>
void check_quantize_backward(Random& random, const Quantizer& quantizer, DType dtype, int64_t rows, int64_t k, const Run& run) {
  const std::vector<uint8_t> grad = to_dtype(random.normals(rows * k), dtype);
  const std::vector<uint8_t> mask = random.codes(rows * plane_row_bytes(k), 256);
  std::vector<uint8_t> expected(grad.size());
  quantize_backward(quantizer, grad.data(), mask.data(), expected.data(), dtype, rows, k, serial_for);
  const OnDevice<uint8_t> in(grad), bits(mask), dx(static_cast<int64_t>(grad.size()));
  run([&](cudaStream_t stream) { cuda::quantize_backward(quantizer, in.data(), bits.data(), dx.data(), dtype, rows, k, stream); });
  EXPECT_TRUE(bitwise_equal(expected, dx.host(), k * element_size(dtype)))
      << to_string(quantizer) << ", [" << rows << ", " << k << "], dtype " << static_cast<int>(dtype);
}

inline std::vector<uint8_t> hadamard_cpu(const std::vector<uint8_t>& x, DType dtype, int64_t rows, int64_t k, int64_t block) {
  std::vector<uint8_t> y(x.size());
  hadamard(x.data(), y.data(), dtype, rows, k, block, serial_for);
  return y;
}

// Both add in the same order and round alike.
inline void check_hadamard(Random& random, DType dtype, int64_t rows, int64_t k, int64_t block, int64_t offset = 0) {
  const std::vector<uint8_t> x = to_dtype(random.normals(rows * k), dtype);
  const OnDevice<uint8_t> in(x, offset), out(static_cast<int64_t>(x.size()), offset);
  cuda::hadamard(in.data(), out.data(), dtype, rows, k, block, nullptr);
  EXPECT_TRUE(bitwise_equal(hadamard_cpu(x, dtype, rows, k, block), out.host(), k * element_size(dtype)))
      << "block " << block << ", [" << rows << ", " << k << "], offset " << offset << ", dtype " << static_cast<int>(dtype);
}

// There, padding included, and back.
inline void check_packing(Random& random, Grid grid, Layout layout, int64_t rows, int64_t k, int64_t offset = 0) {
  const std::vector<uint8_t> codes = random.codes(rows * k, level_count(grid));
  std::vector<uint8_t> expected(rows * row_bytes(layout, k) * (layout == Layout::kPlanes ? grid.bits : 1));
  pack(grid, layout, codes.data(), expected.data(), rows, k, serial_for);
  const OnDevice<uint8_t> in(codes, offset), packed(static_cast<int64_t>(expected.size())), back(rows * k, offset);
  cuda::pack(grid, layout, in.data(), packed.data(), rows, k, nullptr);
  EXPECT_TRUE(bitwise_equal(expected, packed.host(), row_bytes(layout, k))) << to_string(grid) << ", k = " << k;
  cuda::unpack(grid, layout, packed.data(), back.data(), rows, k, nullptr);
  EXPECT_TRUE(bitwise_equal(codes, back.host(), k)) << to_string(grid) << ", k = " << k;
}

}  // namespace quest::testing
