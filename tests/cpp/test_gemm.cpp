#include <functional>

#include "quest/gemm.h"
#include "quest/grid.h"
#include "quest/packing.h"
#include "testing.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::error_text;
using testing::Random;

constexpr Grid kInt4{GridKind::kInt, 4};

// A random matrix of codes in a layout, with what a product needs of it.
struct Matrix {
  Grid grid;
  Layout layout;
  int64_t rows, k;
  std::vector<int32_t> values;  // [rows, k]; 0 where pruned
  std::vector<float> levels;    // [rows, k]
  std::vector<uint8_t> data;
  std::vector<float> scale;
  std::vector<int32_t> code_sum;
  std::vector<uint8_t> index;

  Operand operand() const { return {grid, layout, data.data(), scale.data(), code_sum.data(), index.empty() ? nullptr : index.data()}; }
};

enum class Fill { kRandom, kTop, kBottom };

Matrix make(Random& random, Grid grid, Layout layout, int64_t rows, int64_t k, Fill fill = Fill::kRandom, bool sparse = false) {
  Matrix m{grid, layout, rows, k, {}, {}, {}, {}, std::vector<int32_t>(rows), {}};
  std::vector<uint8_t> codes = random.codes(rows * k, level_count(grid));
  const int32_t top = grid.kind == GridKind::kFp4 ? 7 : level_count(grid) - 1;
  const int32_t bottom = grid.kind == GridKind::kFp4 ? 15 : 0;
  if (fill != Fill::kRandom) std::fill(codes.begin(), codes.end(), static_cast<uint8_t>(fill == Fill::kTop ? top : bottom));
  std::vector<uint8_t> stored;
  if (sparse) m.index.resize(rows * index_row_bytes(k));
  std::vector<bool> kept(rows * k, !sparse);
  for (int64_t r = 0; sparse && r < rows; ++r) {
    for (int64_t group = 0; group < k / 8; ++group) {
      const int64_t p0 = random.below(3), p1 = p0 + 1 + random.below(3 - p0);
      m.index[r * index_row_bytes(k) + group / 2] |= (p0 | p1 << 2) << (group % 2 * 4);
      for (const int64_t p : {p0, p1}) kept[r * k + 8 * group + 2 * p] = kept[r * k + 8 * group + 2 * p + 1] = true;
    }
  }
  for (int64_t i = 0; i < rows * k; ++i) {
    m.values.push_back(has_values(grid) && kept[i] ? code_value(grid, codes[i]) : 0);
    m.levels.push_back(code_level(grid, codes[i]));
    if (!kept[i]) continue;
    m.code_sum[i / k] += codes[i];
    stored.push_back(codes[i]);
  }
  const int64_t width = sparse ? k / 2 : k;
  if (layout == Layout::kCodes) m.data = stored;
  if (layout == Layout::kValues) {
    for (int64_t i = 0; i < rows * k; ++i) m.data.push_back(static_cast<uint8_t>(grid.bits == 8 ? codes[i] - 128 : m.values[i]));
  }
  if (layout == Layout::kEvenOdd) {
    const int64_t stride = row_bytes(layout, k);
    m.data.resize(rows * stride);
    for (int64_t i = 0; i < rows * k; ++i) m.data[i / k * stride + testing::even_odd_column(i % k)] = codes[i];
  }
  if (layout == Layout::kPacked || layout == Layout::kPlanes) {
    m.data.resize(rows * row_bytes(layout, width) * (layout == Layout::kPlanes ? grid.bits : 1));
    pack(grid, layout, stored.data(), m.data.data(), rows, width, serial_for);
  }
  for (int64_t r = 0; r < rows; ++r) m.scale.push_back(static_cast<float>(random.uniform() + 0.5));
  return m;
}

using Gemm = decltype(&gemm_int8);

std::vector<float> multiply(Gemm gemm, const Matrix& a, const Matrix& w, const float* bias, const ParallelFor& parallel_for) {
  std::vector<float> y(a.rows * w.rows, -7);
  gemm(a.operand(), w.operand(), bias, y.data(), DType::kFloat32, a.rows, w.rows, a.k, parallel_for);
  return y;
}

// The sum in int64, then the epilogue as documented: rounded to float32, times the row's scale, then one fused multiply-add.
std::vector<float> multiply_ref(const Matrix& a, const Matrix& w, const float* bias) {
  std::vector<float> y(a.rows * w.rows);
  for (int64_t m = 0; m < a.rows; ++m) {
    for (int64_t n = 0; n < w.rows; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < a.k; ++k) sum += static_cast<int64_t>(a.values[m * a.k + k]) * w.values[n * a.k + k];
      EXPECT_EQ(sum, static_cast<int32_t>(sum));
      y[m * w.rows + n] = std::fma(static_cast<float>(sum) * a.scale[m], w.scale[n], bias ? bias[n] : 0.0f);
    }
  }
  return y;
}

void expect_exact(Gemm gemm, const Matrix& a, const Matrix& w, Random& random) {
  const std::vector<float> bias = random.normals(w.rows);
  const std::vector<float> expected = multiply_ref(a, w, bias.data());
  testing::for_each_isa([&](Isa) {
    EXPECT_TRUE(bitwise_equal(expected, multiply(gemm, a, w, bias.data(), serial_for), w.rows))
        << to_string(a.grid) << " " << to_string(a.layout) << " x " << to_string(w.grid) << " " << to_string(w.layout) << ", m " << a.rows
        << " n " << w.rows << " k " << a.k;
    EXPECT_TRUE(bitwise_equal(expected, multiply(gemm, a, w, bias.data(), testing::threads_for(3)), w.rows));
  });
}

std::vector<Grid> value_grids(int32_t most_bits) {
  std::vector<Grid> grids;
  for (const Grid grid : testing::all_grids()) {
    if (has_values(grid) && grid.bits <= most_bits) grids.push_back(grid);
  }
  return grids;
}

TEST(Gemm, Int8IsExactForAllGridsAndLayouts) {
  Random random(1);
  for (const Grid a : value_grids(8)) {
    for (const Grid w : value_grids(8)) {
      for (const Layout la : {Layout::kValues, Layout::kCodes}) {
        for (const Layout lw : {Layout::kValues, Layout::kCodes}) {
          expect_exact(gemm_int8, make(random, a, la, 3, 77), make(random, w, lw, 6, 77), random);
        }
      }
    }
  }
}

TEST(Gemm, Int4IsExactForAllGridsAndLayouts) {
  Random random(2);
  for (const Grid w : value_grids(4)) {
    for (const Grid a : value_grids(8)) {
      for (const Layout layout : {Layout::kValues, Layout::kCodes, Layout::kEvenOdd}) {
        expect_exact(gemm_int4, make(random, a, layout, 3, 145), make(random, w, Layout::kPacked, 7, 145), random);
      }
      if (a.bits > 4) continue;
      expect_exact(gemm_int4, make(random, a, Layout::kPacked, 3, 145), make(random, w, Layout::kPacked, 7, 145), random);
    }
  }
}

TEST(Gemm, PlanesAreExactForAllBits) {
  Random random(3);
  for (int32_t a = 1; a <= 4; ++a) {
    for (int32_t w = 1; w <= 4; ++w) {
      for (const int64_t k : {1, 100, 513, 9000}) {
        expect_exact(gemm_planes, make(random, {GridKind::kInt, a}, Layout::kPlanes, 4, k),
                     make(random, {GridKind::kInt, w}, Layout::kPlanes, 5, k), random);
      }
    }
  }
}

TEST(Gemm, SparseIsExactForAllGrids) {
  Random random(4);
  for (const Grid w : value_grids(4)) {
    for (const Grid a : value_grids(8)) {
      for (const Layout layout : {Layout::kValues, Layout::kEvenOdd}) {
        expect_exact(gemm_sparse, make(random, a, layout, 3, 168), make(random, w, Layout::kPacked, 7, 168, Fill::kRandom, true), random);
      }
      if (a.bits > 4) continue;
      expect_exact(gemm_sparse, make(random, a, Layout::kPacked, 3, 168), make(random, w, Layout::kPacked, 7, 168, Fill::kRandom, true),
                   random);
    }
  }
}

TEST(Gemm, RaggedShapesAreExact) {
  Random random(5);
  const Grid int8{GridKind::kInt, 8}, int1{GridKind::kInt, 1};
  for (const int64_t m : {1, 2, 3, 5, 6, 7, 13, 16, 17, 64, 257}) {
    for (const int64_t n : {1, 3, 33, 67}) {
      for (const int64_t k : {1, 63, 64, 129, 311}) {
        expect_exact(gemm_int4, make(random, kInt4, Layout::kValues, m, k), make(random, kInt4, Layout::kPacked, n, k), random);
        if (k == 129) {
          expect_exact(gemm_int8, make(random, int8, Layout::kCodes, m, k), make(random, int8, Layout::kCodes, n, k), random);
          expect_exact(gemm_planes, make(random, int1, Layout::kPlanes, m, k), make(random, int1, Layout::kPlanes, n, k), random);
        }
      }
    }
  }
}

TEST(Gemm, ManyRowsAreExact) {  // more than a block of rows of a
  Random random(6);
  expect_exact(gemm_int4, make(random, kInt4, Layout::kValues, 1030, 40), make(random, kInt4, Layout::kPacked, 9, 40), random);
}

TEST(Gemm, ExtremeCodesAtGreatDepthAreExact) {
  Random random(7);
  const Grid int8{GridKind::kInt, 8}, int7{GridKind::kInt, 7}, zero8{GridKind::kIntZero, 8};
  const int64_t k = 32768;
  for (const Fill fa : {Fill::kTop, Fill::kBottom}) {
    for (const Fill fw : {Fill::kTop, Fill::kBottom}) {
      expect_exact(gemm_int8, make(random, int8, Layout::kCodes, 2, k, fa), make(random, int8, Layout::kCodes, 5, k, fw), random);
      expect_exact(gemm_int8, make(random, int8, Layout::kValues, 2, k, fa), make(random, int8, Layout::kValues, 5, k, fw), random);
      expect_exact(gemm_int8, make(random, int7, Layout::kValues, 2, k, fa), make(random, int7, Layout::kCodes, 5, k, fw), random);
      expect_exact(gemm_int8, make(random, int7, Layout::kValues, 2, k, fa), make(random, int7, Layout::kValues, 5, k, fw), random);
      expect_exact(gemm_int8, make(random, zero8, Layout::kValues, 2, k, fa), make(random, zero8, Layout::kCodes, 5, k, fw), random);
      expect_exact(gemm_int4, make(random, kInt4, Layout::kPacked, 2, k, fa), make(random, kInt4, Layout::kPacked, 5, k, fw), random);
      expect_exact(gemm_int4, make(random, int8, Layout::kValues, 2, k, fa), make(random, kInt4, Layout::kPacked, 5, k, fw), random);
      expect_exact(gemm_int4, make(random, int8, Layout::kEvenOdd, 2, k, fa), make(random, kInt4, Layout::kPacked, 5, k, fw), random);
      for (int32_t b = 1; b <= 4; ++b) {
        const Grid grid{GridKind::kInt, b};
        expect_exact(gemm_planes, make(random, grid, Layout::kPlanes, 2, k, fa),
                     make(random, {GridKind::kInt, 1}, Layout::kPlanes, 5, k, fw), random);
      }
    }
  }
}

TEST(Gemm, DepthLimit) {
  const Grid int8{GridKind::kInt, 8}, int7{GridKind::kInt, 7};
  EXPECT_EQ(max_gemm_depth(int8, int8), 33025);
  EXPECT_EQ(max_gemm_depth(int7, int7), 133144);
  Random random(8);
  const int64_t k = 33025;
  expect_exact(gemm_int8, make(random, int8, Layout::kCodes, 1, k, Fill::kTop), make(random, int8, Layout::kCodes, 1, k, Fill::kBottom),
               random);
  const Matrix a = make(random, int8, Layout::kCodes, 1, k + 1), w = make(random, int8, Layout::kCodes, 1, k + 1);
  EXPECT_CONTAINS(error_text([&] { multiply(gemm_int8, a, w, nullptr, serial_for); }), "gemm_int8: expected k <= 33025 for int8 x int8");
}

TEST(Gemm, EmptyShapesAndNanRows) {
  testing::for_each_isa([](Isa) {
    Random random(9);
    for (const int64_t k : {0, 8}) {
      const std::vector<float> bias = random.normals(3);
      Matrix a = make(random, kInt4, Layout::kValues, 2, k), w = make(random, kInt4, Layout::kPacked, 3, k);
      a.scale[1] = NAN;
      const std::vector<float> y = multiply(gemm_int4, a, w, bias.data(), serial_for);
      for (int64_t n = 0; n < 3; ++n) {
        EXPECT_TRUE(k != 0 || y[n] == bias[n]);
        EXPECT_FALSE(std::isnan(y[n]));
        EXPECT_TRUE(std::isnan(y[3 + n]));
      }
      const std::vector<float> x(2 * k, 1.0f);
      std::vector<float> z(6);
      gemm_weight_only(x.data(), w.operand(), bias.data(), z.data(), DType::kFloat32, 2, 3, k, serial_for);
      EXPECT_TRUE(k != 0 || z[4] == bias[1]);
    }
    const Matrix a = make(random, kInt4, Layout::kValues, 0, 8), w = make(random, kInt4, Layout::kPacked, 3, 8);
    EXPECT_TRUE(multiply(gemm_int4, a, w, nullptr, serial_for).empty());
    EXPECT_TRUE(
        multiply(gemm_int4, make(random, kInt4, Layout::kValues, 3, 8), make(random, kInt4, Layout::kPacked, 0, 8), nullptr, serial_for)
            .empty());
  });
}

TEST(Gemm, OutputTypesRoundTheSameResult) {
  Random random(10);
  const Matrix a = make(random, kInt4, Layout::kValues, 5, 100), w = make(random, kInt4, Layout::kPacked, 19, 100);
  const std::vector<float> expected = multiply_ref(a, w, nullptr);
  testing::for_each_isa([&](Isa) {
    for (const DType dtype : testing::kDTypes) {
      std::vector<uint8_t> y(expected.size() * element_size(dtype));
      gemm_int4(a.operand(), w.operand(), nullptr, y.data(), dtype, 5, 19, 100, serial_for);
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(testing::element(y, dtype, i), expected[i], std::abs(expected[i]) * testing::rounding(dtype));
      }
    }
  });
}

TEST(Gemm, WeightOnlyForAllGridsLayoutsAndTypes) {
  testing::for_each_isa([](Isa) {
    Random random(11);
    for (const Grid grid : testing::all_grids()) {
      for (const Layout layout : {Layout::kCodes, Layout::kPacked, Layout::kPlanes}) {
        if (layout == Layout::kPacked && grid.bits > 4) continue;
        for (const DType dtype : testing::kDTypes) {
          for (const int64_t m : {1, 7, 19}) {
            const int64_t n = 9, k = 203;
            const Matrix w = make(random, grid, layout, n, k);
            const std::vector<uint8_t> x = testing::to_dtype(random.normals(m * k), dtype);
            const std::vector<float> bias = random.normals(n);
            std::vector<uint8_t> y(m * n * element_size(dtype));
            gemm_weight_only(x.data(), w.operand(), bias.data(), y.data(), dtype, m, n, k, testing::threads_for(2));
            for (int64_t i = 0; i < m * n; ++i) {
              double sum = 0, magnitude = 0;
              for (int64_t j = 0; j < k; ++j) {
                const double term = static_cast<double>(testing::element(x, dtype, i / n * k + j)) * w.levels[i % n * k + j];
                sum += term;
                magnitude += std::abs(term);
              }
              const double expected = sum * w.scale[i % n] + bias[i % n];
              // Any order of k + 3 float32 roundings, then one of the output type.
              const double tolerance =
                  (k + 3) * 0x1p-24 * magnitude * w.scale[i % n] + (std::abs(expected) + 1e-6) * testing::rounding(dtype) * 1.01;
              ASSERT_NEAR(testing::element(y, dtype, i), expected, tolerance) << to_string(grid) << " " << to_string(layout);
            }
          }
        }
      }
    }
  });
}

TEST(Gemm, Errors) {
  Random random(12);
  const Matrix codes = make(random, kInt4, Layout::kCodes, 1, 8), packed = make(random, kInt4, Layout::kPacked, 1, 8);
  const Matrix planes = make(random, kInt4, Layout::kPlanes, 1, 8), gauss = make(random, {GridKind::kGauss, 4}, Layout::kCodes, 1, 8);
  const Matrix ternary = make(random, {GridKind::kTernary, 2}, Layout::kPlanes, 1, 8);
  const auto error = [](Gemm gemm, const Matrix& a, const Matrix& w) {
    return error_text([&] { multiply(gemm, a, w, nullptr, serial_for); });
  };
  EXPECT_CONTAINS(error(gemm_int8, codes, packed), "gemm_int8: expected w in layout values or codes, got packed");
  EXPECT_CONTAINS(error(gemm_int4, planes, packed), "gemm_int4: expected a in layout packed or values, got planes");
  EXPECT_CONTAINS(error(gemm_int8, gauss, codes), "expected a on a grid with integer values, got gauss4");
  EXPECT_CONTAINS(error(gemm_planes, ternary, ternary), "expected int grids of 1 to 4 bits, got ternary");
  EXPECT_CONTAINS(error(gemm_sparse, packed, packed), "expected w with a 4:8 index, got none");
}

}  // namespace
}  // namespace quest
