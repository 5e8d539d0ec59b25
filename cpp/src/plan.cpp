#include "quest/plan.h"

#include <algorithm>

#include "quest/check.h"
#include "quest/grid.h"

namespace quest {
namespace {

// Pairs of planes up to which bit products beat int8 ones on tensor cores: 1-bit products have 7.7 times the rate of int8 ones.
constexpr int32_t kMaxPlaneProducts = 6;
constexpr int32_t kMaxPlaneBits = 4;

bool planes_pay(Grid a, Grid w) {
  return a.kind == GridKind::kInt && w.kind == GridKind::kInt && std::max(a.bits, w.bits) <= kMaxPlaneBits &&
         a.bits * w.bits <= kMaxPlaneProducts;
}

struct TileRow {
  int32_t block_m, block_n;
  const char* kernel;
  const char* reason;
};

constexpr TileRow kSkinny = {16, 32, "skinny",
                             "at most 16 rows: bound by the bytes of w, which are read once; the 8 warps of a block share K"};
constexpr TileRow kLarge = {128, 128, "m128n128", "bound by arithmetic: each byte of shared memory feeds the most products"};
constexpr TileRow kSmall = {64, 64, "m64n64", "fewer large tiles than multiprocessors: four times the thread blocks"};

// Families with a kernel for few rows; the others use the small tile.
bool has_skinny(GemmFamily family) {
  return family == GemmFamily::kInt8 || family == GemmFamily::kInt4 || family == GemmFamily::kWeightOnly;
}

int64_t tiles(const TileRow& row, int64_t m, int64_t n) {
  return ((m + row.block_m - 1) / row.block_m) * ((n + row.block_n - 1) / row.block_n);
}

}  // namespace

std::string to_string(GemmFamily family) {
  switch (family) {
    case GemmFamily::kInt8: return "int8";
    case GemmFamily::kInt4: return "int4";
    case GemmFamily::kPlanes: return "planes";
    case GemmFamily::kSparse: return "sparse";
    case GemmFamily::kWeightOnly: return "weight_only";
    case GemmFamily::kDequantized: break;
  }
  return "dequantized";
}

GemmOperands plan_operands(Grid weight, const Grid* activation, Sparsity sparsity) {
  check_grid(weight);
  const Layout narrow = weight.bits <= 4 ? Layout::kPacked : Layout::kCodes;
  if (activation == nullptr) {
    if (sparsity == Sparsity::kFourEight) {
      return {GemmFamily::kDequantized, Layout::kValues, narrow, "no kernel multiplies 4:8 sparse weights by real activations"};
    }
    const bool planes = weight.kind == GridKind::kInt && weight.bits <= 3;
    return {GemmFamily::kWeightOnly, Layout::kValues, planes ? Layout::kPlanes : narrow,
            "the activation is real: the weight is stored in the fewest bytes and widened to floats"};
  }
  check_grid(*activation);
  if (!has_values(weight) || !has_values(*activation)) {
    return {GemmFamily::kDequantized, Layout::kCodes, narrow, "the gauss grid has no integer values: both sides are dequantized"};
  }
  if (sparsity == Sparsity::kFourEight) {
    if (weight.bits > 4) return {GemmFamily::kDequantized, Layout::kCodes, narrow, "sparse products keep codes of at most 4 bits"};
    return {GemmFamily::kSparse, Layout::kValues, Layout::kPacked, "4:8 sparse weights keep half of their 4-bit codes"};
  }
  if (planes_pay(*activation, weight)) {
    return {GemmFamily::kPlanes, Layout::kPlanes, Layout::kPlanes, "at most 6 pairs of planes: 1-bit products are faster than int8 ones"};
  }
  if (weight.bits <= 4) {
    return {GemmFamily::kInt4, Layout::kValues, Layout::kPacked, "4-bit weights stay packed, and are widened to int8 on the way"};
  }
  return {GemmFamily::kInt8, Layout::kValues, Layout::kCodes, "more than 4 bits: one byte an element on both sides"};
}

GemmTile plan_tile(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  check(m >= 0 && n >= 0 && k >= 0, "plan_tile: expected m, n, k >= 0, got ", m, ", ", n, ", ", k);
  check(compute_capability >= 80, "plan_tile: expected compute capability 80 or higher, got ", compute_capability,
        "; the kernels need the tensor cores of that generation");
  check(sm_count >= 1, "plan_tile: expected sm_count >= 1, got ", sm_count);
  const bool skinny = m <= kSkinny.block_m && has_skinny(family);
  const TileRow& row = skinny ? kSkinny : tiles(kLarge, m, n) >= sm_count ? kLarge : kSmall;
  // A step of the tiled kernels takes 64 bytes of a row: int8, bits or 16-bit floats. The skinny ones take slices of 128 columns.
  const int32_t step = family == GemmFamily::kPlanes ? 512 : family == GemmFamily::kWeightOnly ? 32 : 64;
  return {row.block_m, row.block_n, skinny ? 128 : step, 1, row.kernel, row.reason};
}

}  // namespace quest
