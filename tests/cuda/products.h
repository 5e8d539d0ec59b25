// The products on operands of random codes, as the GPU's tests and the emulated ones check them: against the CPU's, to the bit where sums
// are integers.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "gpu.h"
#include "quest/cuda/gemm.h"
#include "quest/grid.h"
#include "quest/packing.h"
#include "quest/plan.h"

namespace quest::testing {

enum class Fill { kRandom, kTop, kBottom };

// A [rows, k] matrix of codes in a layout, on both sides. offset: of the data's address on the GPU, in bytes.
class Matrix {
 public:
  Matrix(Random& random, Grid grid, Layout layout, int64_t rows, int64_t k, Fill fill = Fill::kRandom, bool sparse = false,
         int64_t offset = 0)
      : grid_(grid),
        layout_(layout),
        code_sum_(rows),
        data_(make_data(random, rows, k, fill, sparse)),
        scale_(make_scale(random, rows)),
        device_data_(data_, offset),
        device_index_(index_),
        device_scale_(scale_),
        device_code_sum_(code_sum_) {}

  Operand host() const { return {grid_, layout_, data_.data(), scale_.data(), code_sum_.data(), index_.empty() ? nullptr : index_.data()}; }
  Operand device() const {
    return {grid_,
            layout_,
            device_data_.data(),
            device_scale_.data(),
            device_code_sum_.data(),
            index_.empty() ? nullptr : device_index_.data()};
  }

 private:
  std::vector<uint8_t> make_data(Random& random, int64_t rows, int64_t k, Fill fill, bool sparse) {
    std::vector<uint8_t> codes = random.codes(rows * k, level_count(grid_));
    const bool fp4 = grid_.kind == GridKind::kFp4;
    if (fill == Fill::kTop) std::fill(codes.begin(), codes.end(), static_cast<uint8_t>(fp4 ? 7 : level_count(grid_) - 1));
    if (fill == Fill::kBottom) std::fill(codes.begin(), codes.end(), static_cast<uint8_t>(fp4 ? 15 : 0));
    std::vector<uint8_t> stored;
    if (sparse) index_.resize(rows * index_row_bytes(k));
    for (int64_t i = 0; i < rows * k; ++i) {
      if (sparse) {
        const int64_t r = i / k, group = i % k / 8, pair = i % 8 / 2;
        uint8_t& byte = index_[r * index_row_bytes(k) + group / 2];
        const int shift = static_cast<int>(group % 2 * 4);
        if (i % 8 == 0) {
          const int64_t p0 = random.below(3), p1 = p0 + 1 + random.below(3 - p0);
          byte = static_cast<uint8_t>(byte | (p0 | p1 << 2) << shift);
        }
        if (pair != (byte >> shift & 3) && pair != (byte >> shift >> 2 & 3)) continue;
      }
      stored.push_back(codes[i]);
      code_sum_[i / k] += codes[i];
    }
    if (layout_ == Layout::kCodes) return stored;
    if (layout_ == Layout::kValues) {
      for (uint8_t& code : stored) code = static_cast<uint8_t>(grid_.bits == 8 ? code - 128 : code_value(grid_, code));
      return stored;
    }
    if (layout_ == Layout::kEvenOdd) {
      std::vector<uint8_t> ordered(rows * row_bytes(layout_, k));
      for (int64_t i = 0; i < rows * k; ++i) {
        ordered[i / k * row_bytes(layout_, k) + even_odd_column(i % k)] = stored[i];
      }
      return ordered;
    }
    const int64_t width = sparse ? k / 2 : k;
    std::vector<uint8_t> packed(rows * row_bytes(layout_, width) * (layout_ == Layout::kPlanes ? grid_.bits : 1));
    pack(grid_, layout_, stored.data(), packed.data(), rows, width, serial_for);
    return packed;
  }
  static std::vector<float> make_scale(Random& random, int64_t rows) {
    std::vector<float> scale(rows);
    for (float& value : scale) value = static_cast<float>(random.uniform() + 0.5);
    return scale;
  }

  Grid grid_;
  Layout layout_;
  std::vector<int32_t> code_sum_;
  std::vector<uint8_t> index_;
  std::vector<uint8_t> data_;
  std::vector<float> scale_;
  OnDevice<uint8_t> device_data_, device_index_;
  OnDevice<float> device_scale_;
  OnDevice<int32_t> device_code_sum_;
};

using CpuGemm = decltype(&gemm_int8);
using GpuGemm = decltype(&cuda::gemm_int8);

struct Product {
  const char* name;
  CpuGemm cpu;
  GpuGemm gpu;
};
inline constexpr Product kInt8{"gemm_int8", gemm_int8, cuda::gemm_int8};
inline constexpr Product kInt4{"gemm_int4", gemm_int4, cuda::gemm_int4};
inline constexpr Product kPlanes{"gemm_planes", gemm_planes, cuda::gemm_planes};
inline constexpr Product kSparse{"gemm_sparse", gemm_sparse, cuda::gemm_sparse};

inline void check_product(const Product& product, const Matrix& a, const Matrix& w, int64_t m, int64_t n, int64_t k,
                          DType dtype = DType::kFloat32, bool with_bias = true, int64_t offset = 0) {
  SCOPED_TRACE(concat(product.name, " ", to_string(a.host().grid), " (", to_string(a.host().layout), ") x ", to_string(w.host().grid), " (",
                      to_string(w.host().layout), "), ", m, " x ", n, " x ", k, ", dtype ", static_cast<int>(dtype)));
  Random random(99);
  const std::vector<float> bias = random.normals(n);
  std::vector<uint8_t> expected(m * n * element_size(dtype));
  product.cpu(a.host(), w.host(), with_bias ? bias.data() : nullptr, expected.data(), dtype, m, n, k, serial_for);
  const OnDevice<float> device_bias(bias);
  const OnDevice<uint8_t> y(static_cast<int64_t>(expected.size()), offset);
  product.gpu(a.device(), w.device(), with_bias ? device_bias.data() : nullptr, y.data(), dtype, m, n, k, nullptr);
  EXPECT_TRUE(bitwise_equal(expected, y.host(), n * element_size(dtype)));
}

struct Shape {
  int64_t m, n, k;
};

// Whether this GPU takes x as fixed-point numbers.
inline bool is_fixed(Grid grid, Layout layout, int64_t m, int64_t n, int64_t k) {
  const cuda::Device device = cuda::current_device("is_fixed");
  return device.hopper_code && plan_fixed(grid, layout, m, n, k) && !plan_widened(grid, layout, m, n, k, device.sm_count);
}

// |y - y_ref| for float32 sums of k products in any order: each of about k additions and one product rounds to 2^-24 of sums that are at
// most the sum of magnitudes; the levels of gauss are rounded to x's type once; the output is rounded to it once. Weights of integer
// grids may meet x as fixed-point numbers that are off by 2^-15 of the row's largest, by those of 8 bits 2^-14 (plan_fixed).
inline void check_weight_only_of(Random& random, const std::vector<float>& values, const Matrix& w, DType dtype, int64_t m, int64_t n,
                                 int64_t k, int64_t offset = 0) {
  const Grid grid = w.host().grid;
  const Layout layout = w.host().layout;
  SCOPED_TRACE(concat(to_string(grid), " (", to_string(layout), "), ", m, " x ", n, " x ", k, ", dtype ", static_cast<int>(dtype)));
  const std::vector<uint8_t> x = to_dtype(values, dtype);
  const std::vector<float> bias = random.normals(n);
  std::vector<float> wide(m * k);
  for (int64_t i = 0; i < m * k; ++i) wide[i] = element(x, dtype, i);
  std::vector<uint8_t> codes(n * k);
  if (layout == Layout::kCodes) {
    std::memcpy(codes.data(), w.host().data, codes.size());
  } else {
    unpack(grid, layout, static_cast<const uint8_t*>(w.host().data), codes.data(), n, k, serial_for);
  }
  const OnDevice<uint8_t> device_x(x, offset), y(m * n * element_size(dtype), offset);
  const OnDevice<float> device_bias(bias);
  cuda::gemm_weight_only(device_x.data(), w.device(), device_bias.data(), y.data(), dtype, m, n, k, nullptr);
  const std::vector<uint8_t> got = y.host();
  const double level_rounding = grid.kind == GridKind::kGauss && dtype != DType::kFloat32 ? rounding(dtype) : 0.0;
  const bool fixed = dtype != DType::kFloat32 && is_fixed(grid, layout, m, n, k);
  for (int64_t i = 0; i < m; ++i) {
    double largest = 0;
    for (int64_t l = 0; l < k; ++l) largest = std::max(largest, std::abs(static_cast<double>(wide[i * k + l])));
    const double x_rounding = fixed ? largest * (grid.bits == 8 ? 0x1p-14 : 0x1p-15) : 0.0;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0, levels = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double term = static_cast<double>(wide[i * k + l]) * code_level(grid, codes[j * k + l]);
        sum += term;
        magnitude += std::abs(term);
        levels += std::abs(code_level(grid, codes[j * k + l]));
      }
      const double scale = w.host().scale[j];
      const double expected = sum * scale + bias[j];
      const double tolerance = magnitude * scale * ((static_cast<double>(k) + 4) * 0x1p-24 + level_rounding) + levels * x_rounding * scale +
                               std::abs(expected) * (rounding(dtype) * 1.01 + 0x1p-23) + 1e-6;
      ASSERT_NEAR(element(got, dtype, i * n + j), expected, tolerance) << "row " << i << ", column " << j;
    }
  }
}

inline void check_weight_only(Random& random, Grid grid, Layout layout, DType dtype, int64_t m, int64_t n, int64_t k, int64_t offset = 0) {
  const Matrix w(random, grid, layout, n, k);
  check_weight_only_of(random, random.normals(m * k), w, dtype, m, n, k, offset);
}

// The largest sums that there are, of numbers with all bits, in both directions; rows of zeros, of bfloat16 numbers too small for a step of
// their own, of large ones, and of normal ones. As many products as it takes for every kind to have had a row.
inline void check_extremes(Random& random, Grid grid, Layout layout, DType dtype, int64_t m, int64_t n, int64_t k) {
  const bool wide = dtype == DType::kBFloat16;
  const float all_bits = wide ? 255.0f * 0x1p-7f : 2047.0f * 0x1p-10f, tiny = wide ? 0x1p-130f : 0x1p-24f, large = wide ? 0x1p60f : 0x1p3f;
  constexpr int64_t kKinds = 8;
  const float rows[] = {all_bits, -all_bits, 0.0f, tiny, large};
  for (int64_t first = 0; first < kKinds; first += m) {
    std::vector<float> x = random.normals(m * k);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t kind = (first + i) % kKinds;
      for (int64_t j = 0; j < k && kind < 6; ++j) x[i * k + j] = kind < 5 ? rows[kind] : j % 2 == 0 ? all_bits : -all_bits;
    }
    for (const Fill fill : {Fill::kTop, Fill::kBottom, Fill::kRandom}) {
      check_weight_only_of(random, x, Matrix(random, grid, layout, n, k, fill), dtype, m, n, k);
    }
  }
}

// Whole numbers below 64 are fixed-point numbers as they are, with any step that they can get: the sum of a unit is exact, at most
// 255 x 63 x 512 < 2^24 or 1024 of fewer bits, as a float32 too. What is left is a rounding (2^-24 of the magnitudes) for each of a few
// units, and one of y.
inline void check_whole_numbers(Random& random, Grid grid, Layout layout, DType dtype, int64_t m, int64_t n, int64_t k) {
  SCOPED_TRACE(concat(to_string(grid), " (", to_string(layout), "), ", m, " x ", n, " x ", k, ", dtype ", static_cast<int>(dtype)));
  const Matrix w(random, grid, layout, n, k);
  std::vector<uint8_t> codes(n * k);
  if (layout == Layout::kCodes) {
    std::memcpy(codes.data(), w.host().data, codes.size());
  } else {
    unpack(grid, layout, static_cast<const uint8_t*>(w.host().data), codes.data(), n, k, serial_for);
  }
  std::vector<float> x(m * k);
  const std::vector<uint8_t> whole = random.codes(m * k, 127);
  for (int64_t i = 0; i < m * k; ++i) x[i] = static_cast<float>(whole[i]) - 63.0f;
  const OnDevice<uint8_t> device_x(to_dtype(x, dtype)), y(m * n * 2);
  cuda::gemm_weight_only(device_x.data(), w.device(), nullptr, y.data(), dtype, m, n, k, nullptr);
  const std::vector<uint8_t> got = y.host();
  const double units = static_cast<double>(k) / 512 + 2;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double term = static_cast<double>(x[i * k + l]) * code_level(grid, codes[j * k + l]);
        sum += term;
        magnitude += std::abs(term);
      }
      const double scale = w.host().scale[j], expected = sum * scale;
      const double tolerance = magnitude * scale * units * 0x1p-24 + std::abs(expected) * (rounding(dtype) + 0x1p-22);
      ASSERT_NEAR(element(got, dtype, i * n + j), expected, tolerance) << "row " << i << ", column " << j;
    }
  }
}

// Rows of x with a NaN make rows of NaNs, those with an infinity too where x becomes fixed-point numbers (else none of their elements is
// finite), and they leave the others alone.
inline void check_rows_without_numbers(Random& random, Grid grid, Layout layout, DType dtype, int64_t m, int64_t n, int64_t k) {
  const bool fixed = is_fixed(grid, layout, m, n, k);
  const Matrix w(random, grid, layout, n, k);
  std::vector<float> x = random.normals(m * k);
  const OnDevice<uint8_t> finite(to_dtype(x, dtype)), expected(m * n * 2), y(m * n * 2);
  for (int64_t i = 1; i < m; i += 2) x[i * k + (i * 7 + i / 4) % k] = i % 4 == 1 ? INFINITY : NAN;  // in even and odd columns
  const OnDevice<uint8_t> device_x(to_dtype(x, dtype));
  cuda::gemm_weight_only(finite.data(), w.device(), nullptr, expected.data(), dtype, m, n, k, nullptr);
  cuda::gemm_weight_only(device_x.data(), w.device(), nullptr, y.data(), dtype, m, n, k, nullptr);
  const std::vector<uint8_t> right = expected.host(), got = y.host();
  for (int64_t i = 0; i < m * n; ++i) {
    const float value = element(got, dtype, i);
    const int64_t row = i / n;
    const bool has_nan = row % 4 == 3 || (fixed && row % 2 == 1);
    ASSERT_TRUE(row % 2 == 0 ? value == element(right, dtype, i)
                : has_nan    ? std::isnan(value)
                             : !std::isfinite(value))
        << row << ", " << i % n;
  }
}

}  // namespace quest::testing
