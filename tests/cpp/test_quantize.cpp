#include <algorithm>
#include <array>

#include "quest/grid.h"
#include "quest/packing.h"
#include "quest/quantize.h"
#include "quest/rotation.h"
#include "testing.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::element;
using testing::error_text;
using testing::Random;

// One row by the definition, in double.
struct RowRef {
  std::vector<double> rotated;
  std::vector<int32_t> codes;
  std::vector<bool> kept, mask;
  double scale;
};

std::vector<double> rotate_ref(const std::vector<double>& x, int64_t block) {
  std::vector<double> y = x;
  for (int64_t s = 1; s < block; s *= 2) {
    for (size_t i = 0; i < y.size(); ++i) {
      if (i & static_cast<size_t>(s)) continue;
      const double a = y[i], b = y[i + s];
      y[i] = a + b;
      y[i + s] = a - b;
    }
  }
  for (double& value : y) value /= std::sqrt(static_cast<double>(block));
  return y;
}

RowRef quantize_ref(const Quantizer& q, const std::vector<double>& x) {
  const int64_t k = static_cast<int64_t>(x.size());
  const int32_t n = 1 << q.grid.bits;
  RowRef row;
  row.rotated = q.rotation == Rotation::kHadamard ? rotate_ref(x, default_block(k)) : x;
  double squares = 0;
  for (const double value : x) squares += value * value;
  const double sigma = std::sqrt(squares / static_cast<double>(k));
  const bool is_int = q.grid.kind == GridKind::kInt;
  switch (q.grid.kind) {
    case GridKind::kInt: row.scale = (int_alpha(q.grid.bits) * sigma + 1e-8) / (n - 1); break;
    case GridKind::kIntZero: row.scale = 2 * int_alpha(q.grid.bits) * sigma / n; break;
    case GridKind::kFp4: row.scale = 0.24353988 * sigma; break;
    case GridKind::kTernary: row.scale = 1.2240 * sigma; break;
    case GridKind::kGauss: row.scale = sigma; break;
  }
  row.kept.assign(k, q.sparsity == Sparsity::kNone);
  for (int64_t g = 0; q.sparsity == Sparsity::kFourEight && g < k; g += 8) {
    std::array<int, 4> order = {0, 1, 2, 3};
    const auto norm = [&](int p) { return std::hypot(row.rotated[g + 2 * p], row.rotated[g + 2 * p + 1]); };
    std::stable_sort(order.begin(), order.end(), [&](int p, int r) { return norm(p) > norm(r); });
    for (const int p : {order[0], order[1]}) row.kept[g + 2 * p] = row.kept[g + 2 * p + 1] = true;
  }
  for (int64_t i = 0; i < k; ++i) {
    const double z = row.scale > 0 ? row.rotated[i] / row.scale : 0;
    int32_t code = 0;
    if (is_int) {
      code = static_cast<int32_t>(std::nearbyint(std::clamp<double>(z, -(n - 1), n - 1) / 2 + 0.5)) + n / 2 - 1;
    } else if (q.grid.kind == GridKind::kIntZero) {
      code = static_cast<int32_t>(std::nearbyint(std::clamp<double>(z, -(n / 2 - 1), n / 2))) + n / 2 - 1;
    } else {
      for (int32_t c = 1; c < level_count(q.grid); ++c) {
        if (std::abs(z - code_level(q.grid, c)) < std::abs(z - code_level(q.grid, code))) code = c;
      }
      if (q.grid.kind == GridKind::kFp4 && z < 0 && code == 0) code = 8;  // -0
    }
    row.codes.push_back(code);
    const double x_hat = row.kept[i] ? row.scale * code_level(q.grid, code) : 0;
    const double given = q.bound;
    bool pass = true;
    if (q.estimator == Estimator::kClip) {
      const double bound = std::isnan(q.bound) ? default_clip(q) : given;
      pass = std::abs(row.rotated[i]) <= bound * (clip_limit(q.grid) * sigma + (is_int ? 1e-8 : 0));
    } else if (q.estimator == Estimator::kTrust && std::isnan(q.bound) && is_int && q.sparsity == Sparsity::kNone) {
      pass = std::abs(row.rotated[i]) <= n * row.scale;
    } else if (q.estimator == Estimator::kTrust) {
      pass = std::abs(x_hat - row.rotated[i]) <= (std::isnan(q.bound) ? default_trust(q.grid) : given) * sigma;
    }
    row.mask.push_back(pass);
  }
  return row;
}

// What quantize writes, with guard bytes of 0xAA where it should not be.
struct Output {
  Quantizer q;
  Layout layout;
  int64_t rows, k, width;
  std::vector<uint8_t> codes, mask, index;
  std::vector<float> scale;
  std::vector<int32_t> code_sum;

  Output(const Quantizer& quantizer, Layout l, const void* x, DType dtype, int64_t r, int64_t columns, const ParallelFor& parallel_for,
         const Prologue& prologue = {})
      : q(quantizer), layout(l), rows(r), k(columns) {
    const bool sparse = q.sparsity == Sparsity::kFourEight;
    width = sparse && layout != Layout::kValues ? k / 2 : k;
    codes.assign(rows * row_bytes(layout, width) * (layout == Layout::kPlanes ? q.grid.bits : 1), 0xAA);
    mask.assign(rows * plane_row_bytes(k), 0xAA);
    if (sparse) index.assign(rows * index_row_bytes(k), 0xAA);
    scale.assign(rows, -1);
    code_sum.assign(rows, -1);
    quantize(q, layout, x, dtype, rows, k, {codes.data(), scale.data(), code_sum.data(), mask.data(), sparse ? index.data() : nullptr},
             parallel_for, prologue);
  }

  // The integer stored for element j of the row (of the kept ones in a half row).
  int32_t stored(int64_t row, int64_t j) const {
    const uint8_t* data = codes.data() + row * row_bytes(layout, width);
    if (layout == Layout::kCodes) return data[j];
    if (layout == Layout::kValues) return static_cast<int8_t>(data[j]);
    if (layout == Layout::kEvenOdd) return data[testing::even_odd_column(j)];
    if (layout == Layout::kPacked) return data[j / 2] >> (j % 2 * 4) & 15;
    int32_t code = 0;
    for (int32_t p = 0; p < q.grid.bits; ++p) code |= (data[p * rows * row_bytes(layout, width) + j / 8] >> (j % 8) & 1) << p;
    return code;
  }
  bool passes(int64_t row, int64_t j) const { return mask[row * plane_row_bytes(k) + j / 8] >> (j % 8) & 1; }
  bool keeps(int64_t row, int64_t j) const {
    if (index.empty()) return true;
    const int32_t nibble = index[row * index_row_bytes(k) + j / 16] >> (j / 8 % 2 * 4) & 15;
    const int64_t pair = j % 8 / 2;
    return (nibble & 3) == pair || (nibble >> 2) == pair;
  }
};

// Compares with the definition. Elements at a boundary may fall either way in float32: a share of 1e-3.
void expect_follows(const Output& out, const std::vector<uint8_t>& x, DType dtype) {
  const Quantizer& q = out.q;
  int64_t wrong_codes = 0, wrong_mask = 0, wrong_kept = 0;
  for (int64_t r = 0; r < out.rows; ++r) {
    std::vector<double> row;
    for (int64_t j = 0; j < out.k; ++j) row.push_back(element(x, dtype, r * out.k + j));
    const RowRef ref = quantize_ref(q, row);
    ASSERT_NEAR(out.scale[r], ref.scale, 1e-6 * ref.scale);
    int64_t sum = 0, position = 0;
    for (int64_t j = 0; j < out.k; ++j) {
      wrong_mask += out.passes(r, j) != ref.mask[j];
      wrong_kept += out.keeps(r, j) != ref.kept[j];
      if (!out.keeps(r, j)) {
        EXPECT_TRUE(out.layout != Layout::kValues || out.stored(r, j) == 0);
        continue;
      }
      const int64_t at = out.width == out.k ? j : position++;
      int32_t code = ref.codes[j];
      const int32_t stored = out.stored(r, at);
      if (out.layout == Layout::kValues) {
        wrong_codes += stored != (q.grid.bits == 8 ? code - 128 : code_value(q.grid, code));
        continue;
      }
      sum += stored;
      wrong_codes += stored != code;
    }
    EXPECT_TRUE(out.layout == Layout::kValues || out.code_sum[r] == sum) << to_string(q);
  }
  const int64_t allowed = out.rows * out.k / 1000 + 1;
  EXPECT_LE(wrong_codes, allowed) << to_string(q) << " " << to_string(out.layout) << " k " << out.k;
  EXPECT_LE(wrong_mask, allowed) << to_string(q) << " " << to_string(out.layout) << " k " << out.k;
  EXPECT_LE(wrong_kept, allowed) << to_string(q) << " " << to_string(out.layout) << " k " << out.k;
}

std::vector<Layout> layouts_of(const Quantizer& q) {
  std::vector<Layout> layouts = {Layout::kCodes};
  const bool has_zero = q.sparsity == Sparsity::kNone || q.grid.bits < 8;  // 8-bit values leave none for the pruned
  if (has_values(q.grid) && has_zero) layouts.push_back(Layout::kValues);
  if (q.grid.bits <= 4) layouts.push_back(Layout::kPacked);
  if (q.sparsity == Sparsity::kNone) layouts.insert(layouts.end(), {Layout::kPlanes, Layout::kEvenOdd});
  return layouts;
}

std::vector<Quantizer> all_quantizers() {
  std::vector<Quantizer> all;
  for (const Grid grid : testing::all_grids()) {
    for (const Rotation rotation : {Rotation::kNone, Rotation::kHadamard}) {
      for (const Sparsity sparsity : {Sparsity::kNone, Sparsity::kFourEight}) {
        for (const Estimator estimator : {Estimator::kTrust, Estimator::kClip, Estimator::kSte}) {
          Quantizer q{grid, rotation, sparsity, estimator};
          all.push_back(q);
          if (estimator == Estimator::kSte) continue;
          q.bound = estimator == Estimator::kTrust ? 0.2f : 1.1f;
          all.push_back(q);
        }
      }
    }
  }
  return all;
}

TEST(Quantize, FollowsTheDefinition) {
  testing::for_each_isa([](Isa) {
    for (const Quantizer& q : all_quantizers()) {
      const bool sparse = q.sparsity == Sparsity::kFourEight;
      for (const Layout layout : layouts_of(q)) {
        const int64_t k = sparse ? 200 : 197, rows = 9;
        const std::vector<uint8_t> x = testing::to_dtype(Random(k).normals(rows * k), DType::kFloat32);
        expect_follows(Output(q, layout, x.data(), DType::kFloat32, rows, k, serial_for), x, DType::kFloat32);
      }
    }
  });
}

TEST(Quantize, WidthsAndTypes) {
  testing::for_each_isa([](Isa) {
    for (const char* text :
         {"int4-hadamard-trust", "int8-hadamard-clip", "int1-none-clip", "fp4-hadamard-trust", "int4-hadamard-4:8-trust"}) {
      const Quantizer q = parse_quantizer(text);
      for (const int64_t k : {8, 16, 24, 120, 128, 136, 256, 384, 1000, 4096}) {
        for (const DType dtype : testing::kDTypes) {
          const std::vector<uint8_t> x = testing::to_dtype(Random(k).normals(3 * k), dtype);
          for (const Layout layout : layouts_of(q)) expect_follows(Output(q, layout, x.data(), dtype, 3, k, serial_for), x, dtype);
        }
      }
    }
  });
}

TEST(Quantize, InstructionSetsAndThreadsAgreeBitForBit) {
  const int64_t rows = 37, k = 520;
  const std::vector<uint8_t> x = testing::to_dtype(Random(5).normals(rows * k), DType::kFloat32);
  for (const char* text :
       {"int4-hadamard-trust", "int2-none-clip", "fp4-hadamard-trust", "gauss5-hadamard-trust", "int4-hadamard-4:8-trust"}) {
    const Quantizer q = parse_quantizer(text);
    for (const Layout layout : layouts_of(q)) {
      const Output expected(q, layout, x.data(), DType::kFloat32, rows, k, serial_for);
      testing::for_each_isa([&](Isa) {
        const Output got(q, layout, x.data(), DType::kFloat32, rows, k, testing::threads_for(4));
        EXPECT_TRUE(bitwise_equal(expected.codes, got.codes, row_bytes(layout, got.width))) << text;
        EXPECT_TRUE(bitwise_equal(expected.mask, got.mask, plane_row_bytes(k))) << text;
        EXPECT_TRUE(bitwise_equal(expected.index, got.index, index_row_bytes(k))) << text;
        EXPECT_TRUE(bitwise_equal(expected.scale, got.scale, 1)) << text;
        EXPECT_TRUE(bitwise_equal(expected.code_sum, got.code_sum, 1)) << text;
      });
    }
  }
}

TEST(Quantize, PaddingIsZero) {
  testing::for_each_isa([](Isa) {
    const int64_t k = 8, rows = 2;
    const std::vector<float> x = Random(6).normals(rows * k);
    for (const char* text : {"int4-none-ste", "int4-none-4:8-ste"}) {
      const Output out(parse_quantizer(text), Layout::kPacked, x.data(), DType::kFloat32, rows, k, serial_for);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = out.width / 2; j < 16; ++j) EXPECT_EQ(out.codes[16 * r + j], 0);
        for (int64_t j = 1; j < 16; ++j) EXPECT_EQ(out.mask[16 * r + j], 0);
        for (int64_t j = 1; j < 16 && !out.index.empty(); ++j) EXPECT_EQ(out.index[16 * r + j], 0);
      }
    }
    const Output planes(parse_quantizer("int3-none-ste"), Layout::kPlanes, x.data(), DType::kFloat32, rows, k, serial_for);
    for (size_t i = 0; i < planes.codes.size(); ++i) EXPECT_TRUE(i % 16 == 0 || planes.codes[i] == 0);
  });
}

TEST(Quantize, RowsWithoutNumbers) {
  testing::for_each_isa([](Isa) {
    const int64_t k = 264, rows = 5;
    for (const Quantizer& q : all_quantizers()) {
      for (const Layout layout : layouts_of(q)) {
        std::vector<float> x = Random(7).normals(rows * k);
        x[1 * k + 100] = NAN;
        x[2 * k + 263] = INFINITY;
        x[3 * k] = 3e19f;  // its square is no float32
        const Output out(q, layout, x.data(), DType::kFloat32, rows, k, serial_for);
        for (int64_t r = 0; r < rows; ++r) {
          const bool bad = r >= 1 && r <= 3;
          ASSERT_EQ(std::isnan(out.scale[r]), bad) << to_string(q);
          if (!bad) continue;
          EXPECT_EQ(out.code_sum[r], 0);
          for (int64_t j = 0; j < out.width; ++j) ASSERT_EQ(out.stored(r, j), 0);
          for (int64_t j = 0; j < k; ++j) ASSERT_FALSE(out.passes(r, j));
        }
      }
    }
  });
}

TEST(Quantize, ZeroRowsTakeTheLevelBelowZeroAndPass) {
  testing::for_each_isa([](Isa) {
    const int64_t k = 128;
    const std::vector<float> x(k, 0.0f);
    for (const Grid grid : testing::all_grids()) {
      const Quantizer q{grid, Rotation::kHadamard, Sparsity::kNone, Estimator::kTrust};
      const Output out(q, Layout::kCodes, x.data(), DType::kFloat32, 1, k, serial_for);
      const int32_t n = 1 << grid.bits;
      const int32_t zero = grid.kind == GridKind::kFp4 ? 0 : grid.kind == GridKind::kTernary ? 1 : n / 2 - 1;
      for (int64_t j = 0; j < k; ++j) {
        EXPECT_EQ(out.stored(0, j), zero) << to_string(grid);
        EXPECT_TRUE(out.passes(0, j)) << to_string(grid);
      }
      EXPECT_EQ(out.scale[0] > 0, grid.kind == GridKind::kInt);
    }
  });
}

TEST(Quantize, PrunesTheLaterOfEqualPairs) {
  testing::for_each_isa([](Isa) {
    const std::vector<float> x = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 3, 4, 5, 0, 4, 3};
    const Output out(parse_quantizer("int4-none-4:8-ste"), Layout::kPacked, x.data(), DType::kFloat32, 1, 16, serial_for);
    EXPECT_EQ(out.index[0], (0 | 1 << 2) | (1 | 2 << 2) << 4);
  });
}

TEST(Quantize, EmptyShapes) {
  testing::for_each_isa([](Isa) {
    const Quantizer q = parse_quantizer("int4-hadamard-trust");
    Output(q, Layout::kPacked, nullptr, DType::kFloat32, 0, 64, serial_for);
    const Output out(q, Layout::kPacked, nullptr, DType::kFloat32, 2, 0, serial_for);
    EXPECT_EQ(out.code_sum[1], 0);
    EXPECT_GT(out.scale[1], 0);
  });
}

TEST(Quantize, DequantizeGivesScaleTimesLevel) {
  testing::for_each_isa([](Isa) {
    const int64_t rows = 3, k = 264;
    const std::vector<float> x = Random(8).normals(rows * k);
    for (Quantizer q : all_quantizers()) {
      for (const bool original : {false, true}) {
        q.original = original;
        const Output expected(q, Layout::kCodes, x.data(), DType::kFloat32, rows, k, serial_for);
        std::vector<float> x_hat(rows * k);
        for (int64_t r = 0; r < rows; ++r) {
          int64_t position = 0;
          for (int64_t j = 0; j < k; ++j) {
            if (expected.keeps(r, j)) x_hat[r * k + j] = expected.scale[r] * code_level(q.grid, expected.stored(r, position++));
          }
        }
        if (original && q.rotation == Rotation::kHadamard) {
          hadamard(x_hat.data(), x_hat.data(), DType::kFloat32, rows, k, default_block(k), serial_for);
        }
        for (const Layout layout : layouts_of(q)) {
          const Output out(q, layout, x.data(), DType::kFloat32, rows, k, serial_for);
          std::vector<float> y(rows * k);
          dequantize(q, layout, out.codes.data(), out.scale.data(), out.index.empty() ? nullptr : out.index.data(), y.data(),
                     DType::kFloat32, rows, k, testing::threads_for(2));
          for (int64_t i = 0; i < rows * k; ++i) ASSERT_EQ(y[i], x_hat[i]) << to_string(q) << " " << to_string(layout) << " at " << i;
        }
      }
    }
  });
}

TEST(Quantize, DequantizeKeepsNan) {
  testing::for_each_isa([](Isa) {
    const std::vector<float> x(64, NAN);
    for (const char* text : {"int4-hadamard-trust", "int4-hadamard-4:8-trust"}) {
      const Quantizer q = parse_quantizer(text);
      const Output out(q, Layout::kPacked, x.data(), DType::kFloat32, 1, 64, serial_for);
      std::vector<float> y(64);
      dequantize(q, Layout::kPacked, out.codes.data(), out.scale.data(), out.index.empty() ? nullptr : out.index.data(), y.data(),
                 DType::kFloat32, 1, 64, serial_for);
      for (const float value : y) EXPECT_TRUE(std::isnan(value));
    }
  });
}

TEST(Quantize, BackwardMasksThenRotates) {
  testing::for_each_isa([](Isa) {
    const int64_t rows = 3, k = 264;
    const std::vector<float> x = Random(9).normals(rows * k), g = Random(10).normals(rows * k);
    for (const char* text : {"int4-hadamard-trust", "int4-none-trust", "int2-hadamard-trust-original", "int1-hadamard-clip1.3"}) {
      const Quantizer q = parse_quantizer(text);
      const Output out(q, Layout::kCodes, x.data(), DType::kFloat32, rows, k, serial_for);
      const int64_t block = q.rotation == Rotation::kHadamard ? default_block(k) : 1;
      for (const DType dtype : testing::kDTypes) {
        const std::vector<uint8_t> grad = testing::to_dtype(g, dtype);
        std::vector<uint8_t> dx(grad.size());
        quantize_backward(q, grad.data(), out.mask.data(), dx.data(), dtype, rows, k, testing::threads_for(2));
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<double> row;
          for (int64_t j = 0; j < k; ++j) row.push_back(element(grad, dtype, r * k + j));
          if (q.original) row = rotate_ref(row, block);
          for (int64_t j = 0; j < k; ++j) row[j] = out.passes(r, j) ? row[j] : 0;
          row = rotate_ref(row, block);
          for (int64_t j = 0; j < k; ++j) {
            ASSERT_NEAR(element(dx, dtype, r * k + j), row[j], std::abs(row[j]) * testing::rounding(dtype) + 2e-6) << text;
          }
        }
      }
    }
  });
}

// The error on normal samples: within 4 standard errors (the error's own spread is below twice its mean) of the table.
TEST(Quantize, SampledErrorIsTheTables) {
  const int64_t rows = 256, k = 1024;
  const std::vector<float> x = Random(11).normals(rows * k);
  for (const auto& [bits, expected] :
       std::vector<std::pair<int32_t, double>>{{1, .36338}, {2, .11885}, {3, .03744}, {4, .011543}, {8, 8.782e-5}}) {
    const Quantizer q{{GridKind::kInt, bits}, Rotation::kNone};
    const Output out(q, Layout::kCodes, x.data(), DType::kFloat32, rows, k, serial_for);
    std::vector<float> y(rows * k);
    dequantize(q, Layout::kCodes, out.codes.data(), out.scale.data(), nullptr, y.data(), DType::kFloat32, rows, k, serial_for);
    double sum = 0;
    for (int64_t i = 0; i < rows * k; ++i) sum += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    EXPECT_NEAR(sum / static_cast<double>(rows * k) / expected, 1, 4 * 2 / std::sqrt(static_cast<double>(rows * k)) + 1e-3) << bits;
  }
}

// ---- prologues

// The nearest number of dtype, ties to even; subnormals of float16 and bfloat16 included.
float rounded(double value, DType dtype) {
  if (value == 0 || !std::isfinite(value)) return static_cast<float>(value);
  const int bits = dtype == DType::kFloat32 ? 24 : dtype == DType::kFloat16 ? 11 : 8;
  const int lowest = dtype == DType::kFloat32 ? -149 : dtype == DType::kFloat16 ? -24 : -133;
  const int unit = std::max(std::ilogb(value) + 1 - bits, lowest);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit));
}

double silu_ref(double x) { return x / (1 + std::exp(-x)); }

// What a prologue makes of x by the definition, in double but for the roundings to dtype.
std::vector<uint8_t> prologue_ref(const Prologue& prologue, const std::vector<uint8_t>& x, DType dtype, int64_t rows, int64_t k) {
  const int64_t width = input_width(prologue.kind, k);
  std::vector<uint8_t> weight;
  if (prologue.weight != nullptr) {
    const uint8_t* bytes = static_cast<const uint8_t*>(prologue.weight);
    weight.assign(bytes, bytes + k * element_size(dtype));
  }
  std::vector<float> result(rows * k);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t j = 0; j < width; ++j) squares += std::pow(element(x, dtype, r * width + j), 2);
    const double rms = std::sqrt(squares / static_cast<double>(k) + prologue.epsilon);
    for (int64_t j = 0; j < k; ++j) {
      const double first = element(x, dtype, r * width + j);
      float& y = result[r * k + j];
      if (prologue.kind == PrologueKind::kRmsNorm) {
        y = rounded(first / rms * element(weight, dtype, j), dtype);
      } else {
        y = rounded(static_cast<double>(rounded(silu_ref(first), dtype)) * element(x, dtype, r * width + k + j), dtype);
      }
    }
  }
  return testing::to_dtype(result, dtype);
}

std::vector<uint8_t> norm_weight(int64_t k, DType dtype) {
  std::vector<float> values = Random(k + 1).normals(k);
  for (float& value : values) value = 1 + value / 4;
  return testing::to_dtype(values, dtype);
}

constexpr PrologueKind kPrologueKinds[] = {PrologueKind::kRmsNorm, PrologueKind::kSiluMul};

Prologue prologue_of(PrologueKind kind, const std::vector<uint8_t>& weight) {
  return kind == PrologueKind::kRmsNorm ? Prologue{kind, weight.data(), 1e-5f} : Prologue{kind};
}

// A factor 1/rms or an exponential that is off by some 2^-22 makes one value in about 2^-22/2^-9 = 1/8000 round to its neighbour in
// bfloat16 (float16: 1/1000), which moves codes in its rotation block that lie within 2^-9 of a step of a boundary. All in all far
// fewer codes than expect_follows allows.
TEST(Quantize, ProloguesFollowTheDefinition) {
  testing::for_each_isa([](Isa) {
    for (const char* text : {"int4-hadamard-trust", "int8-none-clip", "fp4-hadamard-4:8-trust"}) {
      const Quantizer q = parse_quantizer(text);
      for (const int64_t k : {1, 2, 8, 63, 64, 200, 1000, 4096}) {
        if (q.sparsity == Sparsity::kFourEight && k % 8 != 0) continue;
        for (const DType dtype : testing::kDTypes) {
          const std::vector<uint8_t> weight = norm_weight(k, dtype);
          for (const PrologueKind kind : kPrologueKinds) {
            const Prologue prologue = prologue_of(kind, weight);
            const std::vector<uint8_t> x = testing::to_dtype(Random(k).normals(3 * input_width(kind, k)), dtype);
            const std::vector<uint8_t> y = prologue_ref(prologue, x, dtype, 3, k);
            SCOPED_TRACE(concat(to_string(kind), ", dtype ", static_cast<int>(dtype)));
            for (const Layout layout : {Layout::kCodes, Layout::kPacked}) {
              if (layout == Layout::kPacked && q.grid.bits > 4) continue;
              const Output out(q, layout, x.data(), dtype, 3, k, testing::threads_for(2), prologue);
              const Output separate(q, layout, y.data(), dtype, 3, k, serial_for);
              for (int64_t r = 0; r < 3; ++r) {
                // One of k values that rounds to its neighbour moves sigma by at most two roundings.
                ASSERT_NEAR(out.scale[r], separate.scale[r], (1e-6 + 4 * testing::rounding(dtype) / k) * separate.scale[r]) << k;
              }
              int64_t different = 0;
              for (size_t i = 0; i < out.codes.size(); ++i) different += out.codes[i] != separate.codes[i];
              EXPECT_LE(different, static_cast<int64_t>(out.codes.size()) / 1000) << to_string(q) << " k " << k;
            }
          }
        }
      }
    }
  });
}

TEST(Quantize, ProloguesAgreeBitForBitOnEveryInstructionSet) {
  const int64_t rows = 11, k = 520;
  const Quantizer q = parse_quantizer("int4-hadamard-trust");
  for (const DType dtype : testing::kDTypes) {
    const std::vector<uint8_t> weight = norm_weight(k, dtype);
    for (const PrologueKind kind : kPrologueKinds) {
      const Prologue prologue = prologue_of(kind, weight);
      const std::vector<uint8_t> x = testing::to_dtype(Random(5).normals(rows * input_width(kind, k)), dtype);
      const Output expected(q, Layout::kPacked, x.data(), dtype, rows, k, serial_for, prologue);
      testing::for_each_isa([&](Isa) {
        const Output got(q, Layout::kPacked, x.data(), dtype, rows, k, testing::threads_for(4), prologue);
        EXPECT_TRUE(bitwise_equal(expected.codes, got.codes, packed_row_bytes(k))) << to_string(kind);
        EXPECT_TRUE(bitwise_equal(expected.mask, got.mask, plane_row_bytes(k))) << to_string(kind);
        EXPECT_TRUE(bitwise_equal(expected.scale, got.scale, 1)) << to_string(kind);
      });
    }
  }
}

// A row of one value has |value| = sigma, which its scale tells.
TEST(Quantize, SiluIsAccurateEverywhere) {
  testing::for_each_isa([](Isa) {
    const Quantizer q = parse_quantizer("int_zero8-none-ste");  // whose scale has no epsilon
    const double factor = 2 * int_alpha(8) / 256;
    std::vector<float> x;
    for (double gate = -110; gate < 110; gate += 0.0371) x.insert(x.end(), {static_cast<float>(gate), 1.0f});
    x.insert(x.end(), {-1e30f, 1.0f, 1e30f, 1.0f, 0.0f, 1.0f, -0.0f, 1.0f, 1e-30f, 1.0f});
    const int64_t rows = static_cast<int64_t>(x.size()) / 2;
    const Output out(q, Layout::kCodes, x.data(), DType::kFloat32, rows, 1, serial_for, {PrologueKind::kSiluMul});
    for (int64_t r = 0; r < rows; ++r) {
      const double gate = x[2 * r];
      const double expected = factor * std::abs(silu_ref(gate));
      if (std::abs(gate) > 1e18) {  // has no square in float32
        EXPECT_EQ(std::isnan(out.scale[r]), gate > 0);
      } else if (std::abs(gate) < 1e-18 || gate < -80) {  // has a subnormal square, or none
        EXPECT_LE(out.scale[r], 1e-18);
      } else if (expected > 1e-15) {
        EXPECT_NEAR(out.scale[r], expected, 1e-6 * expected) << gate;
      }
    }
  });
}

TEST(Quantize, ProloguesOfRowsWithoutNumbers) {
  testing::for_each_isa([](Isa) {
    const int64_t k = 136, rows = 5;
    const std::vector<uint8_t> weight = norm_weight(k, DType::kFloat32);
    for (const PrologueKind kind : kPrologueKinds) {
      const int64_t width = input_width(kind, k);
      std::vector<float> x = Random(7).normals(rows * width);
      x[1 * width + 100] = NAN;
      x[2 * width + width - 1] = INFINITY;
      for (int64_t j = 0; j < width; ++j) x[3 * width + j] = 1e30f;
      const Output out(parse_quantizer("int4-hadamard-trust"), Layout::kCodes, x.data(), DType::kFloat32, rows, k, serial_for,
                       prologue_of(kind, weight));
      for (int64_t r = 0; r < rows; ++r) {
        // Numbers whose squares are none: as torch has it, rms_norm makes zeros of them, and of 1e30 1e30 there is no product.
        const bool bad = r == 1 || r == 2 || (r == 3 && kind == PrologueKind::kSiluMul);
        ASSERT_EQ(std::isnan(out.scale[r]), bad) << to_string(kind) << ", row " << r;
        for (int64_t j = 0; j < k && bad; ++j) ASSERT_EQ(out.stored(r, j), 0);
      }
      if (kind == PrologueKind::kRmsNorm) {
        EXPECT_LE(out.scale[3], 1e-9f);
      }
    }
  });
}

TEST(Quantize, Errors) {
  float x[12] = {};
  const auto error = [&](const char* text, Layout layout) {
    return error_text([&] { Output(parse_quantizer(text), layout, x, DType::kFloat32, 1, 12, serial_for); });
  };
  EXPECT_CONTAINS(error("int4-hadamard-4:8-trust", Layout::kCodes), "quantize: expected 8 to divide the last dimension");
  EXPECT_CONTAINS(error("gauss4-hadamard-trust", Layout::kValues), "expected a grid with integer values for layout values, got gauss4");
  EXPECT_CONTAINS(error("int5-hadamard-trust", Layout::kPacked), "expected at most 4 bits for layout packed, got grid int5");
  const Quantizer sparse = parse_quantizer("int4-none-4:8-ste");
  EXPECT_CONTAINS(error_text([&] { dequantize(sparse, Layout::kPlanes, x, x, nullptr, x, DType::kFloat32, 1, 8, serial_for); }),
                  "got planes; use packed");
  EXPECT_CONTAINS(error_text([&] { check_layout("quantize", parse_quantizer("int8-none-4:8-ste"), Layout::kValues, 1, 8); }),
                  "quantize: expected less than 8 bits for layout values of a 4:8 sparse quantizer, got int8");
  EXPECT_CONTAINS(error_text([&] { dequantize(sparse, Layout::kPacked, x, x, nullptr, x, DType::kFloat32, 1, 8, serial_for); }),
                  "dequantize: expected an index for quantizer int4-none-4:8-ste, got none");
  EXPECT_CONTAINS(error_text([&] { check_prologue("quantize", {PrologueKind::kRmsNorm}); }),
                  "quantize: expected a norm_weight for prologue rms_norm, got none; pass the weight of the norm");
  EXPECT_CONTAINS(error_text([&] { check_prologue("linear", {PrologueKind::kSiluMul, x}); }),
                  "linear: expected no norm_weight for prologue silu_mul, got one; leave it out, or use rms_norm");
}

}  // namespace
}  // namespace quest
