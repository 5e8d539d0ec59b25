// The constants of the grids, and everything that is computed from them once.
#include "quest/grid.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "quest/check.h"

namespace quest {
namespace {

// Twice the E2M1 magnitudes, so that they are integers.
constexpr std::array<int32_t, 8> kFp4Values = {0, 1, 2, 3, 4, 6, 8, 12};

constexpr int kLloydMaxSweeps = 20;

std::vector<float> lloyd_max(int32_t bits) {
  const double infinity = std::numeric_limits<double>::infinity();
  const int32_t n = 1 << bits;
  std::vector<double> level(n);
  for (int32_t i = 0; i < n; ++i) level[i] = -3 + 6.0 * i / (n - 1);
  const auto density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  // P(lo < x < hi). Both sides in the same tail: the difference of two numbers near 1 would lose the digits.
  const auto probability = [](double lo, double hi) {
    const double sign = lo > 0 ? 1 : -1;
    return std::abs(std::erfc(sign * lo / M_SQRT2) - std::erfc(sign * hi / M_SQRT2)) / 2;
  };
  for (int sweep = 0; sweep < kLloydMaxSweeps; ++sweep) {
    double lo = -infinity;
    for (int32_t i = 0; i < n; ++i) {
      const double hi = i + 1 < n ? (level[i] + level[i + 1]) / 2 : infinity;
      level[i] = (density(lo) - density(hi)) / probability(lo, hi);
      lo = hi;
    }
  }
  return {level.begin(), level.end()};
}

// The bits of a grid that has no choice of them, else 0.
int32_t fixed_bits(GridKind kind) { return kind == GridKind::kFp4 ? 4 : kind == GridKind::kTernary ? 2 : 0; }

}  // namespace

double int_alpha(int32_t bits) {
  static constexpr std::array<double, 8> kAlpha = {0.7978845587140913, 1.4935346200015913, 2.051068354131873,  2.513930578568423,
                                                   2.9160938834961225, 3.276597282593217,  3.6010497188221655, 3.884938678807525};
  check(bits >= 1 && bits <= 8, "int_alpha: expected bits from 1 to 8, got ", bits, "; alpha is tabulated for these alone");
  return kAlpha[bits - 1];
}

void check_grid(Grid grid) {
  const int32_t fixed = fixed_bits(grid.kind);
  const int32_t least = fixed ? fixed : grid.kind == GridKind::kInt ? 1 : 2;
  const int32_t most = fixed ? fixed : 8;
  check(grid.bits >= least && grid.bits <= most, "grid ", to_string(grid), ": expected bits from ", least, " to ", most, ", got ",
        grid.bits, "; choose bits that this grid has");
}

int32_t level_count(Grid grid) { return grid.kind == GridKind::kTernary ? 3 : 1 << grid.bits; }

int32_t code_value(Grid grid, int32_t code) {
  switch (grid.kind) {
    case GridKind::kInt: return 2 * code - ((1 << grid.bits) - 1);
    case GridKind::kIntZero: return code - ((1 << (grid.bits - 1)) - 1);
    case GridKind::kFp4: return code < 8 ? kFp4Values[code] : -kFp4Values[code - 8];
    case GridKind::kTernary: return code - 1;
    case GridKind::kGauss: break;
  }
  throw Error(concat("code_value: expected a grid with integer values, got ", to_string(grid), "; use code_level"));
}

float code_level(Grid grid, int32_t code) {
  return grid.kind == GridKind::kGauss ? gauss_levels(grid.bits)[code] : static_cast<float>(code_value(grid, code));
}

int32_t max_value(Grid grid) {
  const int32_t top = grid.kind == GridKind::kFp4 ? 7 : level_count(grid) - 1;
  return std::max(std::abs(code_value(grid, 0)), code_value(grid, top));
}

Affine affine(Grid grid, Layout layout) {
  check(has_values(grid), "affine: expected a grid with integer values, got ", to_string(grid), "; dequantize it");
  const bool stores_values = layout == Layout::kValues;
  if (grid.kind == GridKind::kFp4) {
    check(stores_values, "affine: expected layout values for fp4, got ", to_string(layout), "; look the values up first");
    return {1, 0};
  }
  const bool step_two = grid.kind == GridKind::kInt;
  if (!stores_values) return {step_two ? 2 : 1, code_value(grid, 0)};
  if (grid.bits == 8) return {step_two ? 2 : 1, code_value(grid, 128)};
  return {1, 0};
}

double default_trust(Grid grid) {
  switch (grid.kind) {
    case GridKind::kInt:
    case GridKind::kIntZero: return int_alpha(grid.bits) / (level_count(grid) - 1);
    case GridKind::kTernary: return kTernaryStep / 2;
    case GridKind::kFp4:
    case GridKind::kGauss: break;
  }
  const float* level = gauss_levels(grid.bits);  // fp4: the 16-level gauss grid, as the paper's code has it
  const int32_t n = 1 << grid.bits;
  return (static_cast<double>(level[n - 1]) - level[n - 2]) / 2;
}

double default_clip(const Quantizer& quantizer) {
  if (!(quantizer.grid == Grid{GridKind::kInt, 1})) return 1.0;
  return quantizer.rotation == Rotation::kHadamard ? 1.30 : 1.25;  // best for 1-bit models in the paper's ablation
}

double clip_limit(Grid grid) {
  switch (grid.kind) {
    case GridKind::kInt:
    case GridKind::kIntZero: return int_alpha(grid.bits);
    case GridKind::kFp4: return kFp4Scale / 2 * max_value(grid);
    case GridKind::kTernary: return kTernaryStep;
    case GridKind::kGauss: break;
  }
  return gauss_levels(grid.bits)[level_count(grid) - 1];
}

QuantizeParams quantize_params(const Quantizer& quantizer) {
  const Grid grid = quantizer.grid;
  check_grid(grid);
  const int32_t n = level_count(grid);
  double factor = 1.0;
  double epsilon = 0.0;
  switch (grid.kind) {
    case GridKind::kInt:
      factor = int_alpha(grid.bits) / (n - 1);
      epsilon = static_cast<double>(kScaleEpsilon) / (n - 1);
      break;
    case GridKind::kIntZero: factor = 2 * int_alpha(grid.bits) / n; break;
    case GridKind::kFp4: factor = kFp4Scale / 2; break;
    case GridKind::kTernary: factor = kTernaryStep; break;
    case GridKind::kGauss: break;
  }
  const bool given = !std::isnan(quantizer.bound);
  MaskKind mask = kMaskAll;
  double bound = 0.0;
  if (quantizer.estimator == Estimator::kClip) {
    mask = kMaskMagnitude;
    bound = (given ? quantizer.bound : default_clip(quantizer)) * clip_limit(grid);
  } else if (quantizer.estimator == Estimator::kTrust) {
    const bool half_step = !given && grid.kind == GridKind::kInt && quantizer.sparsity == Sparsity::kNone;
    mask = half_step ? kMaskScale : kMaskError;
    bound = half_step ? n : given ? quantizer.bound : default_trust(grid);
  }
  return {static_cast<float>(factor), static_cast<float>(epsilon), static_cast<float>(bound), mask, n};
}

const float* gauss_levels(int32_t bits) {
  check(bits >= 2 && bits <= 8, "gauss_levels: expected bits from 2 to 8, got ", bits, "; the gauss grid has these alone");
  static const std::array<std::vector<float>, 7> levels = [] {
    std::array<std::vector<float>, 7> all;
    for (int32_t b = 2; b <= 8; ++b) all[b - 2] = lloyd_max(b);
    return all;
  }();
  return levels[bits - 2].data();
}

}  // namespace quest
