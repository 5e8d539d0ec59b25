#include "quest/plan.h"

#include <algorithm>

#include "quest/check.h"
#include "quest/grid.h"
#include "quest/packing.h"

namespace quest {
namespace {

// Pairs of planes up to which bit products beat int8 ones on tensor cores: 1-bit products have about 8 times the rate of int8 ones.
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

constexpr TileRow kSkinny = {16, 16, "skinny", "few rows: bound by the bytes of w, which are read once, straight to registers"};
constexpr TileRow kSkinny64 = {64, 16, "skinny_m64", "few rows of packed codes: bound by the bytes of w, which are read once"};
constexpr TileRow kLarge = {128, 128, "m128n128", "bound by arithmetic: each byte of shared memory feeds the most products"};
constexpr TileRow kSmall = {64, 64, "m64n64", "fewer large tiles than multiprocessors: four times the thread blocks"};

constexpr TileRow kWgmma256 = {256, 128, "wgmma_m256n128", "bound by arithmetic: the most products for each byte copied"};
constexpr TileRow kWgmma128 = {128, 128, "wgmma_m128n128", "tiles of 256 rows would leave more of the last wave of thread blocks idle"};
constexpr TileRow kWgmma64 = {64, 128, "wgmma_m64n128",
                              "few rows: bound by the bytes of w, which are read once; thread blocks of a cluster share K"};
constexpr TileRow kWgmma16 = {16, 128, "wgmma_m16n128",
                              "at most 16 rows: bound by the bytes of w, which are read once; thread blocks of a cluster share K"};
constexpr TileRow kStationary256 = {kStationaryM, 256, "stationary_n256",
                                    "one plane each: rows of w stay in shared memory, one warpgroup multiplies while the other writes y"};
constexpr TileRow kStationary128 = {kStationaryM, 128, "stationary_n128",
                                    "one plane each: rows of w stay in shared memory, 256 of them and enough stages of a do not fit"};
constexpr int64_t kHopperSharedBytes = 227 * 1024, kFewestStages = 4;
// Rows of a up to which blocks of 128 columns are worth it: they read all of a twice as often as blocks of 256 do, and more rows of it
// leave the L2 cache in between (16384 x 4096 x 11008 on an H200: 171 us, tiles of both operands 146; 4096 rows: 38, 40).
constexpr int64_t kStationary128Rows = 8192;
// Time of a tile of 128 rows, in that of one of 256: it copies more bytes for each product and hides less latency (measured on an H100).
constexpr double kWgmma128Time = 0.7;
constexpr int32_t kMaxSplit = 4;         // splits of 8 took longer than their shorter loops saved: 16 x 4096 x 4096 on an H100
constexpr int32_t kMinStages = 4;        // stages a thread block takes at least, so that sums of few stages are not split further
constexpr int32_t kRoomOf12 = 10;        // of 12 multiprocessors that clusters of 4 find room on together: 120 of 132 of an H100
constexpr int32_t kSplitBlocksOfSm = 2;  // thread blocks that a multiprocessor holds of the split kernels

// Rows of packed codes up to which the kernel for few rows is faster than wgmma on Hopper: its warps unpack a for themselves. Where its
// thread blocks make few tiles of not too many columns, wgmma has to split K, and is slower up to kSkinnyMostRows. (Elsewhere more than 16
// rows are not measured.)
constexpr int32_t kSkinnyRows = 16, kSkinnyNibbleRows = 32, kSkinnyFewTiles = 3, kSkinnyFewColumns = 8192;
constexpr int32_t kHopper = 90, kHopperMultiprocessors = 132;

// Shared memory that a thread block can have beside the 42 KB of the skinny kernel's own.
int64_t skinny_room(int32_t compute_capability) {
  constexpr int64_t kKilobyte = 1024;
  const bool large = compute_capability == 90 || compute_capability / 10 == 10;
  const bool middle = compute_capability == 80 || compute_capability == 87;
  return ((large ? 227 : middle ? 163 : 99) - 42) * kKilobyte;
}

int64_t tiles(const TileRow& row, int64_t m, int64_t n) {
  return ((m + row.block_m - 1) / row.block_m) * ((n + row.block_n - 1) / row.block_n);
}

// Stored elements of a in 64 bytes: int8, bits or 16-bit floats.
int32_t elements_of_64_bytes(GemmFamily family) {
  return family == GemmFamily::kPlanes ? 512 : family == GemmFamily::kWeightOnly ? 32 : 64;
}

int64_t waves(int64_t tiles, int64_t at_once) { return (tiles + at_once - 1) / at_once; }

GemmTile skinny_tile(int64_t m) {
  const TileRow& row = m <= kSkinny.block_m ? kSkinny : kSkinny64;
  return {row.kernel, false, row.block_m, row.block_n, 128, 1, 1, row.reason};
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

GemmOperands plan_operands(Grid weight, const Grid* activation, Sparsity sparsity, const GemmShape* shape) {
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
    const bool fp4 = activation->kind == GridKind::kFp4 || weight.kind == GridKind::kFp4;
    return {GemmFamily::kSparse, fp4 ? Layout::kValues : Layout::kEvenOdd, Layout::kPacked,
            fp4 ? "4:8 sparse weights keep half of their 4-bit codes; fp4 rows have no sum of codes that sparse tensor cores would need"
                : "4:8 sparse weights keep half of their 4-bit codes; activations in the order of sparse tensor cores"};
  }
  if (planes_pay(*activation, weight)) {
    return {GemmFamily::kPlanes, Layout::kPlanes, Layout::kPlanes, "at most 6 pairs of planes: 1-bit products are faster than int8 ones"};
  }
  // Codes, which are never negative, rather than values: the sums then seldom change sign, and a GPU that is out of power runs 10 % faster.
  // An fp4 row has values but no sum of codes to correct by.
  const bool codes = activation->kind != GridKind::kFp4 && weight.kind != GridKind::kFp4;
  if (weight.bits <= 4) {
    const bool packs = codes && activation->bits <= 4;
    const GemmFamily few = packs ? GemmFamily::kInt4 : GemmFamily::kInt8;
    if (shape != nullptr && plan_skinny(few, shape->m, shape->n, shape->k, kHopper, kHopperMultiprocessors)) {
      return packs ? GemmOperands{GemmFamily::kInt4, Layout::kPacked, Layout::kPacked,
                                  "few rows: every warp reads its part of a for itself, and packed it is half as much"}
                   : GemmOperands{GemmFamily::kInt4, Layout::kValues, Layout::kPacked,
                                  "few rows: every warp widens its part of w for itself"};
    }
    if (!codes) return {GemmFamily::kInt4, Layout::kValues, Layout::kPacked, "fp4 codes are no affine map of their values: w by table"};
    return {GemmFamily::kInt4, Layout::kEvenOdd, Layout::kPacked,
            "4-bit weights stay packed: the low and the high halves of their bytes meet the even and the odd columns of a"};
  }
  // Codes of 8 bits are no int8.
  const Layout bytes = codes && activation->bits < 8 ? Layout::kCodes : Layout::kValues;
  return {GemmFamily::kInt8, bytes, Layout::kCodes, "more than 4 bits: one byte an element on both sides"};
}

GemmTile plan_tile(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  check(m >= 0 && n >= 0 && k >= 0, "plan_tile: expected m, n, k >= 0, got ", m, ", ", n, ", ", k);
  check(compute_capability >= 80, "plan_tile: expected compute capability 80 or higher, got ", compute_capability,
        "; the kernels need the tensor cores of that generation");
  check(sm_count >= 1, "plan_tile: expected sm_count >= 1, got ", sm_count);
  const bool has_wgmma =
      family == GemmFamily::kInt8 || family == GemmFamily::kInt4 || family == GemmFamily::kPlanes || family == GemmFamily::kSparse;
  if (plan_skinny(family, m, n, k, compute_capability, sm_count)) return skinny_tile(m);
  // 9.0 alone: later GPUs have other asynchronous tensor cores.
  return compute_capability == kHopper && has_wgmma ? plan_wgmma(family, m, n, k, sm_count) : plan_mma_sync(family, m, n, sm_count);
}

GemmTile plan_wgmma(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  const int32_t block_k = 2 * elements_of_64_bytes(family);
  constexpr int32_t pair = 2;  // blocks that copy half of their a each
  auto tile = [&](const TileRow& row, int32_t cluster, int32_t split) {
    return GemmTile{row.kernel, true, row.block_m, row.block_n, block_k, cluster, split, row.reason};
  };
  const bool few_tiles = m <= 2 * kWgmma64.block_m && 2 * tiles(kWgmma128, m, n) <= sm_count;
  if (m <= kWgmma64.block_m || few_tiles) {
    // Dense products of bytes and of packed weights have the kernel for few rows.
    const bool fewest = m <= kWgmma16.block_m && (family == GemmFamily::kPlanes || family == GemmFamily::kSparse);
    const TileRow& row = fewest ? kWgmma16 : kWgmma64;
    const int64_t stages = (k + block_k - 1) / block_k;
    int32_t split = 1;
    while (2 * split <= kMaxSplit && 2 * split * kMinStages <= stages) {
      const int64_t room = kSplitBlocksOfSm * (split == 1 ? sm_count : sm_count * kRoomOf12 / 12);
      if (2 * split * tiles(row, m, n) > room) break;
      split *= 2;
    }
    return tile(row, 1, split);
  }
  const TileRow pairs = {kWgmma256.block_m, pair * kWgmma256.block_n, "", ""};
  const double time_256 = static_cast<double>(waves(tiles(pairs, m, n), std::max(1, sm_count / pair)));
  const double time_128 = kWgmma128Time * static_cast<double>(waves(tiles(kWgmma128, m, n), sm_count));
  return time_128 < time_256 ? tile(kWgmma128, 1, 1) : tile(kWgmma256, pair, 1);
}

bool is_stationary(const GemmTile& tile) { return tile.kernel == kStationary256.kernel || tile.kernel == kStationary128.kernel; }

int64_t stationary_chunks(int64_t k) { return (plane_row_bytes(k) + kStationaryRowBytes - 1) / kStationaryRowBytes; }

int64_t stationary_stages(int32_t block_n, int64_t k) {
  const int64_t chunks = stationary_chunks(k);
  const int64_t room = kHopperSharedBytes - stationary_other_bytes(block_n) - chunks * block_n * kStationaryRowBytes;
  if (chunks > kStationaryMostChunks || room < 0) return 0;
  return std::min<int64_t>(room / (kStationaryM * kStationaryRowBytes), kStationaryMostStages);
}

GemmTile plan_bits(int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  if (plan_skinny(GemmFamily::kInt8, m, n, k, compute_capability, sm_count)) return skinny_tile(m);
  if (compute_capability == kHopper && m > kWgmma64.block_m && n % kStationarySpan == 0 && k > 0) {
    for (const TileRow& row : {kStationary256, kStationary128}) {
      const bool pays = row.block_n == kStationary256.block_n || m <= kStationary128Rows;
      if (pays && stationary_stages(row.block_n, k) >= kFewestStages) {
        return {row.kernel, true, row.block_m, row.block_n, 8 * kStationaryRowBytes, 1, 1, row.reason};
      }
    }
  }
  return plan_tile(GemmFamily::kPlanes, m, n, k, compute_capability, sm_count);
}

int32_t plan_skinny_rows(GemmFamily family, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  if (k == 0) return 0;
  if (family == GemmFamily::kInt4 && compute_capability == kHopper) {
    const bool few_tiles = n <= int64_t{kSkinnyFewTiles} * kSkinny.block_n * sm_count && k <= kSkinnyFewColumns;
    return few_tiles ? kSkinnyMostRows : kSkinnyNibbleRows;
  }
  if (family == GemmFamily::kInt4 || family == GemmFamily::kInt8) return kSkinnyRows;
  if (family != GemmFamily::kWeightOnly) return 0;
  const int64_t bytes = (2 * k + 1023) / 1024 * 1024;  // of a row in shared memory, in slices of at most 1024
  const int64_t room = skinny_room(compute_capability);
  return kSkinnyRows * bytes <= room ? kSkinnyRows : 8 * bytes <= room ? 8 : 0;
}

bool plan_skinny(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  const int32_t rows = plan_skinny_rows(family, n, k, compute_capability, sm_count);
  // Real activations of 9 to 16 rows that do not fit together are taken 8 at a time: no other kernel reads the weight less often.
  return m <= (family == GemmFamily::kWeightOnly && rows > 0 ? kSkinnyRows : rows);
}

GemmTile plan_mma_sync(GemmFamily family, int64_t m, int64_t n, int32_t sm_count) {
  const TileRow& row = tiles(kLarge, m, n) >= sm_count ? kLarge : kSmall;
  return {row.kernel, false, row.block_m, row.block_n, elements_of_64_bytes(family), 1, 1, row.reason};
}

bool plan_native_int4(Layout a_layout, Grid a, Grid w, int32_t compute_capability) {
  // An fp4 code is no affine map of its value; values need more than 4 bits (int4: odd numbers up to 15).
  auto is_nibble = [](Grid grid) { return grid.bits <= 4 && has_values(grid) && grid.kind != GridKind::kFp4; };
  return compute_capability / 10 == 8 && (a_layout == Layout::kPacked || a_layout == Layout::kCodes || a_layout == Layout::kEvenOdd) &&
         is_nibble(a) && is_nibble(w);
}

}  // namespace quest
