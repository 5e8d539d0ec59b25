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
constexpr const char* kStreamReason = "few rows: they stay in shared memory, and the bytes of w stream past them, by the copy engine";
constexpr const char* kHeldReason = "few rows of real a: they stay in registers, and the bytes of w are read once for as many as fit";
constexpr const char* kFixedReason =
    "few rows of real a: as fixed-point numbers they need half of the instructions, or the weight's bits none to widen them";
constexpr TileRow kLarge = {128, 128, "m128n128", "bound by arithmetic: each byte of shared memory feeds the most products"};
constexpr TileRow kSmall = {64, 64, "m64n64", "fewer large tiles than multiprocessors: four times the thread blocks"};

constexpr TileRow kWgmma256 = {256, 128, "wgmma_m256n128", "bound by arithmetic: the most products for each byte copied"};
constexpr TileRow kWgmma128 = {128, 128, "wgmma_m128n128", "tiles of 256 rows would leave more of the last wave of thread blocks idle"};
constexpr TileRow kWgmma192 = {128, 192, "wgmma_m128n192",
                               "tiles of 256 rows and of 128 columns would leave more of the last wave of thread blocks idle"};
// Tiles of 64 and of 16 rows, of 64, 128 and 192 columns.
constexpr const char* kFewReason =
    "few rows: bound by the bytes of w, which are read once; as many columns a thread block as give each multiprocessor one";
constexpr TileRow kWgmmaFew[2][3] = {
    {{64, 64, "wgmma_m64n64", kFewReason}, {64, 128, "wgmma_m64n128", kFewReason}, {64, 192, "wgmma_m64n192", kFewReason}},
    {{16, 64, "wgmma_m16n64", kFewReason}, {16, 128, "wgmma_m16n128", kFewReason}, {16, 192, "wgmma_m16n192", kFewReason}}};
constexpr TileRow kStationary256 = {kStationaryM, 256, "stationary_n256",
                                    "one plane each: rows of w stay in shared memory, one warpgroup multiplies while the other writes y"};
constexpr TileRow kStationary128 = {kStationaryM, 128, "stationary_n128",
                                    "one plane each: rows of w stay in shared memory, 256 of them and enough stages of a do not fit"};
constexpr int64_t kHopperSharedBytes = 227 * 1024;
constexpr int64_t kFewestStages = 5;  // of a ring; fewer were never measured
// Rows of a up to which blocks of 128 columns are worth it: they read all of a twice as often as blocks of 256 do, and more rows of it
// leave the L2 cache in between (16384 x 4096 x 11008 on an H200: 171 us, tiles of both operands 146; 4096 rows: 38, 40).
constexpr int64_t kStationary128Rows = 8192;
// Times of waves of tiles, in that of one of tiles of 256 rows (a step of 128 columns, measured on an H100). Of 128 rows and 128 or 192
// columns: half and three quarters of its products, for each of which they copy more bytes. Of 64 rows and 64, 128 and 192 columns: 2, 2
// and 1 of their warpgroups share K (measured when 4, 2 and 1 did), and the copy engine brings a multiprocessor some 50 bytes a cycle.
struct WgmmaTimes {
  double m128n128, m128n192;  // 0: no such kernel
  double few[3];
};
constexpr WgmmaTimes kBytesTimes = {0.57, 0.8, {0.25, 0.4, 0.67}}, kOtherTimes = {0.7, 0, {0.5, 0.75, 1.1}};

// Steps along K from which two thread blocks share a tile of 64 columns where half of the multiprocessors would have none: of bytes, and of
// bit planes, which take each once for every pair of planes.
constexpr int64_t kPairedSteps = 8, kPairedPlaneSteps = 4;

// Rows up to which the kernel for few rows is faster than wgmma: of bytes and, on Hopper, where its warps unpack a for themselves, of
// packed codes. (Elsewhere more than 16 rows are not measured.)
constexpr int32_t kSkinnyRows = 16, kSkinnyNibbleRows = 32;
// Rows of real activations up to which fixed-point numbers of them are faster than a product with the dequantized weight, and weights from
// which they are faster than rows in registers, where these take one turn. (Making them takes about 1 us.) 1-bit weights are multiplied as
// they are, and then they are faster from the first.
constexpr int64_t kFixedRows = 256, kFixedWeights = int64_t{1} << 23;
constexpr int64_t kFixedColumns = 16384, kFixedBitColumns = 32768;  // of K, whose numbers fit in the shared memory of a cluster
constexpr int64_t kFixedMostN = int64_t{65535} * kFixedTileN;       // a launch can have so many ranges, of a tile each
// Rows from which a weight of 2 or 3 planes is dequantized first: to widen it anew for every tile takes longer (2 bits, 16384 rows: up to
// 9 %; 4096: not yet).
constexpr int64_t kDequantizedPlanesRows = 8192;
constexpr int32_t kHopper = 90;

// A weight whose bits are multiplied where they lie.
bool is_one_bit(Grid weight, Layout layout) { return layout == Layout::kPlanes && weight == Grid{GridKind::kInt, 1}; }

// Shared memory that a thread block can have.
int64_t shared_bytes(int32_t compute_capability) {
  const bool large = compute_capability == 90 || compute_capability / 10 == 10;
  const bool middle = compute_capability == 80 || compute_capability == 87;
  return (large ? 227 : middle ? 163 : 99) * 1024;
}

int64_t tiles(const TileRow& row, int64_t m, int64_t n) {
  return ((m + row.block_m - 1) / row.block_m) * ((n + row.block_n - 1) / row.block_n);
}

// Stored elements of a in 64 bytes: int8, bits or 16-bit floats.
int32_t elements_of_64_bytes(GemmFamily family) {
  return family == GemmFamily::kPlanes ? 512 : family == GemmFamily::kWeightOnly ? 32 : 64;
}

int64_t waves(int64_t tiles, int64_t at_once) { return (tiles + at_once - 1) / at_once; }

GemmTile skinny_tile() { return {kSkinny.kernel, false, kSkinny.block_m, kSkinny.block_n, 128, 1, 1, kSkinny.reason}; }

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
    const bool streams =
        codes && shape != nullptr && shape->compute_capability == kHopper && plan_stream(shape->m, shape->n, shape->k, shape->sm_count);
    if (!streams && shape != nullptr && plan_skinny(few, shape->m, shape->k, kHopper)) {
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
  if (family == GemmFamily::kInt4 && compute_capability == kHopper && plan_stream(m, n, k, sm_count)) {
    const int32_t rows = plan_stream_split(m, n, k, sm_count).rows;
    return {"stream", true, rows, kStreamTileN, kStreamColumns, kStreamBlocks, kStreamSenders, kStreamReason};
  }
  if (plan_skinny(family, m, k, compute_capability)) return skinny_tile();
  if (family == GemmFamily::kWeightOnly && k > 0 && m <= plan_weight_only_rows(compute_capability)) {
    return {"held", false, plan_held(compute_capability).rows, kHeldUnitN, kHeldColumns, 1, 1, kHeldReason};
  }
  // 9.0 alone: later GPUs have other asynchronous tensor cores.
  return compute_capability == kHopper && has_wgmma ? plan_wgmma(family, m, n, k, sm_count) : plan_mma_sync(family, m, n, sm_count);
}

GemmTile plan_wgmma(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  const int32_t block_k = 2 * elements_of_64_bytes(family);
  constexpr int32_t pair = 2;  // blocks that copy half of their a each
  const bool bytes = family == GemmFamily::kInt4 || family == GemmFamily::kInt8;
  const WgmmaTimes& times = bytes ? kBytesTimes : kOtherTimes;
  GemmTile best{};
  double best_time = 0;
  auto consider = [&](const TileRow& row, double time, int32_t cluster, int32_t split) {
    const TileRow together = {row.block_m, row.block_n * cluster, "", ""};
    const double all = time * static_cast<double>(waves(tiles(together, m, n), std::max(1, sm_count / cluster)));
    if (best.kernel != nullptr && all >= best_time) return;
    best = {row.kernel, true, row.block_m, row.block_n, block_k, cluster, split, row.reason};
    best_time = all;
  };
  // Products of bytes and of packed weights have the kernel for few rows, instead of tiles of 16.
  const bool fewest = !bytes && m <= kWgmmaFew[1][0].block_m;
  for (int i = 0; i < 3; ++i) consider(kWgmmaFew[fewest][i], times.few[i], 1, kWgmmaFewSplit[i]);
  if (m <= kWgmmaFew[0][0].block_m) {
    const TileRow& narrow = kWgmmaFew[fewest][0];
    const int64_t paired_steps = family == GemmFamily::kPlanes ? kPairedPlaneSteps : kPairedSteps;
    if (best.block_n == narrow.block_n && 2 * tiles(narrow, m, n) <= sm_count && k >= paired_steps * block_k) {
      best.cluster = 2;
      best.split_k *= 2;
    }
    return best;
  }
  consider(kWgmma256, 1, pair, 1);
  consider(kWgmma128, times.m128n128, 1, 1);
  if (times.m128n192 > 0) consider(kWgmma192, times.m128n192, 1, 1);
  return best;
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
  if (plan_skinny(GemmFamily::kInt8, m, k, compute_capability)) return skinny_tile();
  if (compute_capability == kHopper && m > kWgmmaFew[0][0].block_m && n % kStationarySpan == 0 && k > 0) {
    for (const TileRow& row : {kStationary256, kStationary128}) {
      const bool pays = row.block_n == kStationary256.block_n || m <= kStationary128Rows;
      if (pays && stationary_stages(row.block_n, k) >= kFewestStages) {
        return {row.kernel, true, row.block_m, row.block_n, 8 * kStationaryRowBytes, 1, 1, row.reason};
      }
    }
  }
  return plan_tile(GemmFamily::kPlanes, m, n, k, compute_capability, sm_count);
}

int32_t plan_skinny_rows(GemmFamily family, int64_t k, int32_t compute_capability) {
  if (k == 0) return 0;
  if (family == GemmFamily::kInt4 && compute_capability == kHopper) return kSkinnyNibbleRows;
  if (family == GemmFamily::kInt4 || family == GemmFamily::kInt8) return kSkinnyRows;
  return 0;
}

int32_t plan_skinny_team(int64_t n, int32_t sm_count) {
  // Thread blocks that make few tiles have few teams: then more warps share K.
  constexpr int64_t kTeam = 4, kLargeTeam = 8;
  const int64_t tiles = (n + kSkinnyN - 1) / kSkinnyN;
  return tiles <= kSkinnyWarps / kLargeTeam * sm_count ? kLargeTeam : kTeam;
}

StreamPlan plan_stream_split(int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  constexpr int64_t kFewestSlots = 2;
  if (m < 1 || m > 32 || n < 1 || k < 1 || sm_count < kStreamBlocks) return {};
  const int32_t rows = m <= 16 ? 16 : 32;
  auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = up(n, kStreamTileN), ranges = std::min<int64_t>(tiles, sm_count / kStreamBlocks), each = up(tiles, ranges);
  const int64_t parts = 4 * up(m, 8) / kStreamBlocks;  // of a tile, that a block adds up
  const int64_t needed = up(up(k, kStreamColumns), kStreamBlocks) * stream_unit_bytes(rows) +
                         each * (kStreamSenders * parts * kStreamPartBytes + kStreamColumnBytes) + stream_other_bytes(rows);
  const int64_t slots = std::min<int64_t>((kHopperSharedBytes - needed) / (kStreamGroups * kStreamSlotBytes), kStreamMostSlots);
  // One wave of thread blocks, or none: a second would start from nothing.
  if (each > kStreamMostTiles || slots < kFewestSlots) return {};
  return {rows, static_cast<int32_t>(slots), ranges, needed + slots * kStreamGroups * kStreamSlotBytes};
}

bool plan_stream(int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  const StreamPlan plan = plan_stream_split(m, n, k, sm_count);
  if (plan.rows == 0) return false;
  // Both are as slow as their slowest block: what counts is the share of the GPU that has work, in rounds of 64 columns for a pair of
  // blocks, and of kSkinnyN columns for each team. (Measured on an H200: at a share of 0.73 and 16 rows it is 4 % slower, from 0.87 on
  // faster.)
  constexpr double kLeastShare = 0.8, kGain = 1.2;
  auto share = [&](int64_t columns, int64_t at_once) {
    const int64_t rounds = ((n + columns - 1) / columns + at_once - 1) / at_once;
    return static_cast<double>(n) / static_cast<double>(columns * at_once * rounds);
  };
  const double stream = share(kStreamTileN, sm_count / kStreamBlocks);
  if (m > 8) return stream > kLeastShare;
  return stream > kGain * share(kSkinnyN, kSkinnyWarps / plan_skinny_team(n, sm_count) * sm_count);
}

HeldPlan plan_held(int32_t compute_capability) {
  // By shared memory: 218 KB, at most 134 or 67, and the sums of passes.
  const int64_t room = shared_bytes(compute_capability);
  return room >= 227 * 1024 ? HeldPlan{16, 8} : room >= 163 * 1024 ? HeldPlan{8, 8} : HeldPlan{8, 4};
}

int64_t plan_weight_only_rows(int32_t compute_capability) {
  // More rows than fit at once are taken one part after another: the weight then comes from the L2 cache. Four times that costs about what
  // dequantizing the weight does.
  constexpr int64_t kTurns = 4;
  return kTurns * plan_held(compute_capability).rows;
}

bool plan_skinny(GemmFamily family, int64_t m, int64_t k, int32_t compute_capability) {
  return m <= plan_skinny_rows(family, k, compute_capability);
}

bool plan_fixed(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k) {
  const bool one_bit = is_one_bit(weight, layout);
  if (m == 0 || n == 0 || k == 0 || k % 8 != 0 || !has_values(weight)) return false;
  if (k > (one_bit ? kFixedBitColumns : kFixedColumns) || n > kFixedMostN) return false;
  switch (layout) {
    case Layout::kPacked: break;
    case Layout::kPlanes:
      if (weight.kind != GridKind::kInt || weight.bits > 3) return false;
      break;
    case Layout::kCodes:
      if (weight.kind == GridKind::kFp4 || k % 16 != 0) return false;
      break;
    default: return false;
  }
  return m <= kFixedRows && (one_bit || m > plan_held(kHopper).rows || n * k >= kFixedWeights);
}

namespace {

// time: in microseconds, to be compared with those of other plans for the same layout.
struct TimedFixedPlan {
  FixedPlan plan;
  double time;
};

TimedFixedPlan timed_fixed_split(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  check(plan_fixed(weight, layout, m, n, k), "plan_fixed_split: expected a product that plan_fixed takes, got ", m, " x ", n, " x ", k,
        " by ", to_string(weight), " in layout ", to_string(layout));
  auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const bool one_bit = is_one_bit(weight, layout);
  // To make bits of numbers takes long, and fewer rows a block are then more blocks that do.
  const int32_t rows = one_bit && m <= 2 ? static_cast<int32_t>(m) : one_bit && m <= 4 ? 4 : m <= (one_bit ? 32 : 8) ? 8 : 16;
  const FixedRoom room = fixed_room(one_bit, layout == Layout::kPlanes ? weight.bits : 1, rows);
  const int64_t eights = up(rows, 8), tiles = up(n, kFixedTileN), units = up(k, room.unit_columns), groups = up(m, rows);

  // Times in microseconds, fitted to an H200's: to make numbers of 8 rows of a unit, or fewer, beside other teams of warps, and at least;
  // of a unit of a tile, by a warpgroup that is alone and beside others; of a tile; for sums on their way to other warpgroups, and through
  // a cluster; until the next wave of blocks is as far as that.
  const double numbers_time = one_bit ? 0.06 * std::min(rows, 8) : 0.18, least_numbers_time = 0.45;
  const double alone_time = one_bit ? 0.28 * static_cast<double>(eights) : 0.6;
  const double unit_time = one_bit ? 0.14 * static_cast<double>(eights) : 0.225 + 0.025 * static_cast<double>(eights);
  constexpr double kTileTime = 0.065, kWaveTime = 2.0;
  // By bits and 8 rows the times tell turns of all warpgroups from the last one, and know clusters of any size. (The others choose well
  // among what was measured, and are left as they were fitted.)
  const bool bits_of_eight = one_bit && rows == 8;
  const double group_time = bits_of_eight ? 0.3 : 0.12;
  auto cluster_time = [&](int64_t blocks) {
    if (blocks == 1) return 0.0;
    return bits_of_eight ? 0.2 + 0.1 * static_cast<double>(blocks) : 0.3 + 0.02 * static_cast<double>(blocks * blocks);
  };

  FixedPlan best{};
  double best_time = 0;
  for (int32_t cluster = 1; cluster <= std::min<int64_t>(8, units); ++cluster) {
    // Powers of two, and 3, 5 and 6 where that is measured: 6 or 11 units are better divided among them. (7: two waves.)
    const bool power = (cluster & (cluster - 1)) == 0;
    if (!power && (!bits_of_eight || cluster == 7)) continue;
    const int64_t most_units = up(units, cluster);
    // Not all multiprocessors find partners for clusters of more than two: they are of one group, and there are 8 of 16 or 18.
    const int64_t found = power ? sm_count * 10 / 11 / cluster : sm_count * 2 / 33 * (16 / cluster);
    const int64_t at_once = std::max<int64_t>(1, cluster > 2 ? found : sm_count / cluster);
    for (int32_t k_groups = 1; k_groups <= std::min<int64_t>(kFixedGroups, most_units); k_groups *= 2) {
      // What is left beside the numbers: for a ring of at least two slots, then for what is received of each tile.
      const int64_t left = kHopperSharedBytes - room.other - most_units * room.unit, slot = kFixedGroups * room.slot;
      const int64_t tile = (cluster * k_groups - 1) * up(room.parts, cluster) * room.part + room.tile_scales;
      if (left < 2 * slot + tile) continue;
      int64_t each = std::min<int64_t>(kFixedMostTiles, up(tiles, std::max<int64_t>(1, at_once / groups)));
      const int64_t slots = std::clamp<int64_t>((left - each * tile) / slot, 2, kFixedMostSlots);
      each = std::min(each, (left - slots * slot) / tile);
      const int64_t waves = up(up(tiles, each) * groups, at_once);
      each = up(tiles, std::max<int64_t>(1, at_once * waves / groups));  // all waves alike
      const int64_t ranges = up(tiles, each);
      const int64_t turn_units = up(most_units, k_groups), turns = up(each, kFixedGroups / k_groups) * turn_units;
      double products_time = std::max(static_cast<double>(turns) * alone_time, static_cast<double>(each * most_units) * unit_time);
      if (bits_of_eight) {  // turns of all warpgroups, then one of those that have a tile left
        const int64_t full = each * k_groups / kFixedGroups, rest = each * k_groups % kFixedGroups;
        auto turn_time = [&](int64_t busy) { return std::max(alone_time, static_cast<double>(busy) * unit_time); };
        products_time =
            static_cast<double>(turn_units) * (static_cast<double>(full) * turn_time(kFixedGroups) + (rest > 0 ? turn_time(rest) : 0.0));
      }
      const double work = std::max(static_cast<double>(most_units * eights) * numbers_time, least_numbers_time) + products_time +
                          static_cast<double>(each) * kTileTime;
      const double time = static_cast<double>(waves) * work + static_cast<double>(waves - 1) * kWaveTime +
                          static_cast<double>(k_groups - 1) * group_time + cluster_time(cluster);
      if (best.rows > 0 && time >= best_time) continue;
      best_time = time;
      best = {rows, cluster, k_groups, static_cast<int32_t>(slots), ranges, kHopperSharedBytes - left + slots * slot + each * tile};
    }
  }
  check(best.rows > 0, "plan_fixed_split: expected room for the numbers of ", k, " columns in shared memory");  // plan_fixed sees to it
  return {best, best_time};
}

struct TimedTile {
  GemmTile tile;
  double time;  // in microseconds
};

TimedTile timed_widened_tile(int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  constexpr int32_t kBlockK = 64;
  TimedTile best{};
  // Microseconds of a wave for kBlockK columns of K, and of the start and end, on an H200.
  auto consider = [&](const TileRow& row, double step_time, int32_t cluster) {
    const TileRow together = {row.block_m, row.block_n * cluster, "", ""};
    const int64_t steps = (k + kBlockK - 1) / kBlockK * waves(tiles(together, m, n), std::max(1, sm_count / cluster));
    const double time = 2 + step_time * static_cast<double>(steps);
    if (best.tile.kernel != nullptr && time >= best.time) return;
    best = {{row.kernel, true, row.block_m, row.block_n, kBlockK, cluster, 1, row.reason}, time};
  };
  consider(kWgmma256, 0.77, 2);
  consider(kWgmma128, 0.41, 1);
  consider(kWgmma192, 0.6, 1);
  return best;
}

}  // namespace

FixedPlan plan_fixed_split(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  return timed_fixed_split(weight, layout, m, n, k, sm_count).plan;
}

bool plan_widened(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k, int32_t sm_count) {
  // Of fewer rows fixed-point numbers, or rows in registers, are faster.
  if (m <= plan_weight_only_rows(kHopper) || n == 0 || k == 0 || !has_values(weight)) return false;
  switch (layout) {
    case Layout::kPacked:
    case Layout::kCodes:
      if (weight.kind == GridKind::kFp4) return false;
      break;
    case Layout::kPlanes:
      if (weight.kind != GridKind::kInt || weight.bits > 3 || (weight.bits > 1 && m >= kDequantizedPlanesRows)) return false;
      break;
    default: return false;
  }
  if (k % 8 != 0 || row_bytes(layout, k) % 16 != 0) return false;  // the copy engine cannot read such rows
  if (!plan_fixed(weight, layout, m, n, k)) return true;
  // Of so many rows fixed-point numbers take longer than their plan's times, which are fitted to fewer: by bits where they lie, unpacked
  // planes, nibbles and bytes.
  const double longer = is_one_bit(weight, layout) ? 1.25 : layout == Layout::kPlanes ? 1.45 : layout == Layout::kPacked ? 1.65 : 2.5;
  return timed_widened_tile(m, n, k, sm_count).time < longer * timed_fixed_split(weight, layout, m, n, k, sm_count).time;
}

GemmTile plan_widened_tile(int64_t m, int64_t n, int64_t k, int32_t sm_count) { return timed_widened_tile(m, n, k, sm_count).tile; }

GemmTile plan_weight_only(Grid weight, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count) {
  const GemmTile tile = plan_tile(GemmFamily::kWeightOnly, m, n, k, compute_capability, sm_count);
  const Layout layout = plan_operands(weight, nullptr, Sparsity::kNone).w;
  if (compute_capability == kHopper && plan_widened(weight, layout, m, n, k, sm_count)) return plan_widened_tile(m, n, k, sm_count);
  if (compute_capability != kHopper || !plan_fixed(weight, layout, m, n, k)) return tile;
  const FixedPlan plan = plan_fixed_split(weight, layout, m, n, k, sm_count);
  const FixedRoom room = fixed_room(is_one_bit(weight, layout), 1, plan.rows);
  return {"fixed", true, plan.rows, kFixedTileN, room.unit_columns, plan.cluster, plan.cluster * plan.k_groups, kFixedReason};
}

GemmTile plan_mma_sync(GemmFamily family, int64_t m, int64_t n, int32_t sm_count) {
  const TileRow& row = tiles(kLarge, m, n) >= sm_count ? kLarge : kSmall;
  return {row.kernel, false, row.block_m, row.block_n, elements_of_64_bytes(family), 1, 1, row.reason};
}

int64_t plan_spread_bytes(int64_t thread_blocks, int64_t block_warps, int32_t sm_count, int64_t shared_bytes) {
  constexpr int64_t kSchedulers = 4, kUnit = 128;  // of a multiprocessor; shared memory is given in
  const int64_t share = std::max((thread_blocks + sm_count - 1) / sm_count, kSchedulers / block_warps);
  if (share > kSpreadMostShare) return 0;
  return (shared_bytes + kReservedSharedBytes) / (share + 1) - kReservedSharedBytes + kUnit;
}

bool plan_native_int4(Layout a_layout, Grid a, Grid w, int32_t compute_capability) {
  // An fp4 code is no affine map of its value; values need more than 4 bits (int4: odd numbers up to 15).
  auto is_nibble = [](Grid grid) { return grid.bits <= 4 && has_values(grid) && grid.kind != GridKind::kFp4; };
  return compute_capability / 10 == 8 && (a_layout == Layout::kPacked || a_layout == Layout::kCodes || a_layout == Layout::kEvenOdd) &&
         is_nibble(a) && is_nibble(w);
}

}  // namespace quest
