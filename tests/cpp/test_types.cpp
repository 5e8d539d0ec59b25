#include <limits>

#include "quest/types.h"
#include "testing.h"

namespace quest {
namespace {

using testing::error_text;

bool same(const Quantizer& a, const Quantizer& b) {
  const bool same_bound = std::isnan(a.bound) ? std::isnan(b.bound) : a.bound == b.bound;
  return a.grid == b.grid && a.rotation == b.rotation && a.sparsity == b.sparsity && a.estimator == b.estimator && same_bound &&
         a.original == b.original;
}

TEST(Types, StringsAreExactBothWays) {
  testing::Random random(1);
  const float none = std::numeric_limits<float>::quiet_NaN();
  for (const Grid grid : testing::all_grids()) {
    EXPECT_TRUE(parse_grid(to_string(grid)) == grid) << to_string(grid);
    for (int choice = 0; choice < 24; ++choice) {
      Quantizer q;
      q.grid = grid;
      q.rotation = choice & 1 ? Rotation::kHadamard : Rotation::kNone;
      q.sparsity = choice & 2 ? Sparsity::kFourEight : Sparsity::kNone;
      q.original = choice & 4;
      q.estimator = static_cast<Estimator>(choice / 8);
      std::vector<float> bounds = {none};
      if (q.estimator != Estimator::kSte) {
        bounds.insert(bounds.end(), {1.3f, 1.0f, 0.1f, 1e-5f, 3e20f, std::numeric_limits<float>::min(), std::numeric_limits<float>::max()});
        bounds.push_back(static_cast<float>(random.uniform()));
      }
      for (const float bound : bounds) {
        q.bound = bound;
        EXPECT_TRUE(same(parse_quantizer(to_string(q)), q)) << to_string(q);
      }
    }
  }
  for (const Layout layout : {Layout::kCodes, Layout::kValues, Layout::kPacked, Layout::kPlanes, Layout::kEvenOdd}) {
    EXPECT_EQ(parse_layout(to_string(layout)), layout);
  }
  for (const PrologueKind prologue : {PrologueKind::kNone, PrologueKind::kRmsNorm, PrologueKind::kSiluMul}) {
    EXPECT_EQ(parse_prologue(to_string(prologue)), prologue);
  }
}

TEST(Types, StringsAreTheDocumentedOnes) {
  for (const char* text : {"int4-hadamard-trust", "int1-hadamard-clip1.3", "fp4-none-ste", "int4-hadamard-4:8-trust", "ternary-none-clip",
                           "gauss3-hadamard-trust-original", "int_zero4-none-clip"}) {
    EXPECT_EQ(to_string(parse_quantizer(text)), text);
  }
}

TEST(Types, ErrorsNameThePartAndTheRemedy) {
  const auto error = [](const char* text) { return error_text([&] { parse_quantizer(text); }); };
  EXPECT_CONTAINS(error("itn4-hadamard-trust"), "did you mean \"int\"");
  EXPECT_CONTAINS(error("int9-hadamard-trust"), "expected bits from 1 to 8, got 9");
  EXPECT_CONTAINS(error("int_zero1-hadamard-trust"), "expected bits from 2 to 8, got 1");
  EXPECT_CONTAINS(error("int-hadamard-trust"), "expected a number of bits");
  EXPECT_CONTAINS(error("int4x-hadamard-trust"), "expected a number of bits");
  EXPECT_CONTAINS(error("fp44-hadamard-trust"), "with no bits");
  EXPECT_CONTAINS(error("int4-hadamrd-trust"), "rotation: expected one of none, hadamard, got \"hadamrd\"; did you mean \"hadamard\"");
  EXPECT_CONTAINS(error("int4-hadamard-truts"), "did you mean \"trust\"");
  EXPECT_CONTAINS(error("int4-hadamard-2:4-trust"), "estimator");
  EXPECT_CONTAINS(error("int4-hadamard-clip1.3x"), "positive number");
  EXPECT_CONTAINS(error("int4-hadamard-clip-1"), "positive number");
  EXPECT_CONTAINS(error("int4-hadamard-clip0"), "positive number");
  EXPECT_CONTAINS(error("int4-hadamard-ste2"), "which has no bound");
  EXPECT_CONTAINS(error("int4"), "GRID[BITS]-ROTATION");
  EXPECT_CONTAINS(error(""), "GRID[BITS]-ROTATION");
  EXPECT_CONTAINS(error_text([] { parse_layout("plane"); }), "did you mean \"planes\"");
  EXPECT_CONTAINS(error_text([] { parse_prologue("rmsnorm"); }), "did you mean \"rms_norm\"");
  EXPECT_CONTAINS(error_text([] { parse_grid("4"); }), "grid: expected one of");
}

}  // namespace
}  // namespace quest
