#include <functional>

#include "quest/grid.h"
#include "testing.h"

namespace quest {
namespace {

using testing::error_text;

// E (x - x_hat)^2 for x of N(0,1) and levels v with nearest-level cells: closed form per cell, integral of (x - v)^2 phi.
double cell_error(double lo, double hi, double v) {
  const auto density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  const auto below = [](double x) { return std::erfc(-x / M_SQRT2) / 2; };
  const auto moment = [&](double x) { return std::isinf(x) ? 0.0 : x * density(x); };
  const double mass = lo > 0 ? below(-lo) - below(-hi) : below(hi) - below(lo);
  return mass * (1 + v * v) - (moment(hi) - moment(lo)) + 2 * v * (density(hi) - density(lo));
}

double grid_error(const std::vector<double>& levels) {
  double sum = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const double lo = i == 0 ? -INFINITY : (levels[i - 1] + levels[i]) / 2;
    const double hi = i + 1 == levels.size() ? INFINITY : (levels[i] + levels[i + 1]) / 2;
    sum += cell_error(lo, hi, levels[i]);
  }
  return sum;
}

double int_error(int32_t bits, double alpha) {
  const int n = 1 << bits;
  std::vector<double> levels(n);
  for (int c = 0; c < n; ++c) levels[c] = alpha * (2 * c - (n - 1)) / (n - 1);
  return grid_error(levels);
}

// Golden section: the minimum of a function with one.
double minimum(double lo, double hi, const std::function<double(double)>& f) {
  const double ratio = (std::sqrt(5.0) - 1) / 2;
  while (hi - lo > 1e-9) {
    const double a = hi - ratio * (hi - lo);
    const double b = lo + ratio * (hi - lo);
    (f(a) < f(b) ? hi : lo) = f(a) < f(b) ? b : a;
  }
  return (lo + hi) / 2;
}

TEST(Grid, AlphaMinimisesTheError) {
  for (int32_t bits = 1; bits <= 8; ++bits) {
    const double best = minimum(0.3, 6, [&](double alpha) { return int_error(bits, alpha); });
    const double tolerance = bits <= 6 ? 1e-5 : bits == 7 ? 2e-4 : 2e-3;
    EXPECT_LE(int_error(bits, int_alpha(bits)) / int_error(bits, best) - 1, tolerance) << bits;
  }
}

TEST(Grid, ErrorsOnTheNormalAreTheDocumentedOnes) {
  EXPECT_NEAR(int_error(1, int_alpha(1)), .36338, 5e-6);
  EXPECT_NEAR(int_error(2, int_alpha(2)), .11885, 5e-6);
  EXPECT_NEAR(int_error(3, int_alpha(3)), .03744, 5e-6);
  EXPECT_NEAR(int_error(4, int_alpha(4)), .011543, 5e-7);
  EXPECT_NEAR(int_error(8, int_alpha(8)), 8.782e-5, 5e-9);
}

TEST(Grid, Fp4AndTernaryScalesMinimiseTheError) {
  const auto fp4 = [](double scale) {
    std::vector<double> levels;
    for (const double v : {-6., -4., -3., -2., -1.5, -1., -.5, 0., .5, 1., 1.5, 2., 3., 4., 6.}) levels.push_back(v * scale);
    return grid_error(levels);
  };
  EXPECT_NEAR(kFp4Scale / minimum(0.2, 1, fp4), 1, 1e-3);
  const auto ternary = [](double step) { return grid_error({-step, 0, step}); };
  EXPECT_NEAR(kTernaryStep / minimum(0.5, 2, ternary), 1, 1e-4);
}

TEST(Grid, GaussLevelsDescendOnTheError) {
  for (int32_t bits = 2; bits <= 8; ++bits) {
    const int n = 1 << bits;
    const std::vector<double> levels(gauss_levels(bits), gauss_levels(bits) + n);
    for (int i = 0; i < n; ++i) EXPECT_NEAR(levels[i], -levels[n - 1 - i], 1e-6);
    for (int i = 1; i < n; ++i) EXPECT_LT(levels[i - 1], levels[i]);
    // Better than the best uniform grid; at 2 bits the sweeps have converged to Max's table.
    EXPECT_LT(grid_error(levels), int_error(bits, int_alpha(bits))) << bits;
  }
  EXPECT_NEAR(gauss_levels(2)[3], 1.5104, 1e-3);
  EXPECT_NEAR(gauss_levels(2)[2], 0.4528, 1e-3);
}

TEST(Grid, ValuesFollowTheTable) {
  EXPECT_EQ(code_value({GridKind::kInt, 4}, 0), -15);
  EXPECT_EQ(code_value({GridKind::kInt, 8}, 255), 255);
  EXPECT_EQ(code_value({GridKind::kIntZero, 4}, 0), -7);
  EXPECT_EQ(code_value({GridKind::kIntZero, 4}, 15), 8);
  EXPECT_EQ(code_value({GridKind::kTernary, 2}, 2), 1);
  const std::vector<int32_t> fp4 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (int32_t c = 0; c < 16; ++c) EXPECT_EQ(code_value({GridKind::kFp4, 4}, c), fp4[c]);
  EXPECT_EQ(level_count({GridKind::kTernary, 2}), 3);
  EXPECT_FALSE(has_values({GridKind::kGauss, 4}));
}

TEST(Grid, AffineFormsGiveTheValue) {
  for (const Grid grid : testing::all_grids()) {
    if (!has_values(grid)) continue;
    int32_t largest = 0;
    for (int32_t c = 0; c < level_count(grid); ++c) {
      const int32_t v = code_value(grid, c);
      largest = std::max(largest, std::abs(v));
      EXPECT_EQ(code_level(grid, c), v);
      const Affine values = affine(grid, Layout::kValues);
      const int32_t u = grid.bits == 8 ? c - 128 : v;
      EXPECT_LE(std::abs(u), 128);
      EXPECT_EQ(values.mul * u + values.add, v) << to_string(grid);
      if (grid.kind == GridKind::kFp4) continue;
      const Affine codes = affine(grid, Layout::kCodes);
      EXPECT_EQ(codes.mul * c + codes.add, v) << to_string(grid);
    }
    EXPECT_EQ(max_value(grid), largest) << to_string(grid);
  }
}

TEST(Grid, DefaultBounds) {
  Quantizer q;
  EXPECT_NEAR(default_trust({GridKind::kInt, 4}), int_alpha(4) / 15, 1e-15);
  EXPECT_NEAR(default_trust({GridKind::kFp4, 4}), default_trust({GridKind::kGauss, 4}), 0);
  EXPECT_EQ(default_clip(q), 1.0);
  q.grid.bits = 1;
  EXPECT_EQ(default_clip(q), 1.30);
  q.rotation = Rotation::kNone;
  EXPECT_EQ(default_clip(q), 1.25);
  EXPECT_NEAR(clip_limit({GridKind::kFp4, 4}), 2.92247856, 1e-8);
  q.grid.bits = 4;
  EXPECT_EQ(quantize_params(q).mask_kind, kMaskScale);
  q.bound = 0.5f;
  EXPECT_EQ(quantize_params(q).mask_kind, kMaskError);
  EXPECT_EQ(quantize_params(q).mask_factor, 0.5f);
}

TEST(Grid, ErrorsNameTheBits) {
  EXPECT_CONTAINS(error_text([] { int_alpha(9); }), "expected bits from 1 to 8, got 9");
  EXPECT_CONTAINS(error_text([] { check_grid({GridKind::kInt, 0}); }), "got 0");
  EXPECT_CONTAINS(error_text([] { check_grid({GridKind::kFp4, 5}); }), "from 4 to 4, got 5");
  EXPECT_CONTAINS(error_text([] { code_value({GridKind::kGauss, 4}, 0); }), "use code_level");
}

}  // namespace
}  // namespace quest
