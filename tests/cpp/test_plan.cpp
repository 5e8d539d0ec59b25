#include "quest/grid.h"
#include "quest/plan.h"
#include "testing.h"

namespace quest {
namespace {

using testing::error_text;

TEST(Plan, PlanesWhereTheyPay) {
  for (int32_t a = 1; a <= 8; ++a) {
    for (int32_t w = 1; w <= 8; ++w) {
      const Grid activation{GridKind::kInt, a}, weight{GridKind::kInt, w};
      const GemmOperands plan = plan_operands(weight, &activation, Sparsity::kNone);
      const bool planes = a * w <= 6 && a <= 4 && w <= 4;
      EXPECT_EQ(plan.family, planes ? GemmFamily::kPlanes : w <= 4 ? GemmFamily::kInt4 : GemmFamily::kInt8) << a << " x " << w;
      EXPECT_EQ(plan.a, planes ? Layout::kPlanes : w <= 4 ? Layout::kEvenOdd : a < 8 ? Layout::kCodes : Layout::kValues);
      EXPECT_EQ(plan.w, planes ? Layout::kPlanes : w <= 4 ? Layout::kPacked : Layout::kCodes);
    }
  }
}

// Few rows of real activations as fixed-point numbers: how a product is divided. Every product that is taken has a plan, whatever the GPU.
TEST(Plan, FixedPointNumbers) {
  const Grid bit{GridKind::kInt, 1}, nibble{GridKind::kInt, 4};
  auto plan = [](Grid grid, int64_t m, int64_t n, int64_t k) {
    return plan_fixed_split(grid, grid.bits == 1 ? Layout::kPlanes : Layout::kPacked, m, n, k, 132);
  };
  // A row makes few numbers: blocks need no partners along K, unless it is long. Eight rows make more.
  EXPECT_EQ(plan(bit, 1, 22016, 4096).cluster, 1);
  EXPECT_EQ(plan(bit, 1, 4096, 11008).cluster, 2);
  EXPECT_EQ(plan(bit, 8, 12288, 4096).cluster, 2);
  EXPECT_EQ(plan(bit, 8, 4096, 4096).cluster, 4);
  EXPECT_EQ(plan(bit, 8, 4096, 11008).cluster, 6);  // 11 units
  EXPECT_EQ(plan(bit, 16, 2048, 5632).cluster, 6);  // 6 units
  EXPECT_EQ(plan(nibble, 8, 12288, 4096).cluster, 2);
  EXPECT_EQ(plan(nibble, 8, 4096, 4096).k_groups, 2);  // warpgroups that would have no tile share one
  EXPECT_EQ(plan(nibble, 16, 4096, 11008).cluster, 8);
  const std::pair<int64_t, int32_t> rows[] = {{1, 1}, {2, 2}, {3, 4}, {5, 8}, {32, 8}, {33, 16}, {256, 16}};
  for (const auto& [m, expected] : rows) EXPECT_EQ(plan(bit, m, 4096, 4096).rows, expected) << m;
  EXPECT_EQ(plan(nibble, 1, 12288, 4096).rows, 8);
  EXPECT_EQ(plan(nibble, 9, 12288, 4096).rows, 16);
  // Where blocks need several waves, all are alike: 8 groups of rows in clusters of 4 blocks, of which 30 are there at once.
  EXPECT_EQ(plan(bit, 128, 4096, 11008).cluster, 4);
  EXPECT_EQ(plan(bit, 128, 4096, 11008).ranges, 2 * 30 / 8);

  struct Format {
    Grid grid;
    Layout layout;
  };
  for (const Format& f : {Format{bit, Layout::kPlanes}, Format{{GridKind::kInt, 3}, Layout::kPlanes}, Format{nibble, Layout::kPacked},
                          Format{{GridKind::kInt, 8}, Layout::kCodes}}) {
    for (const int64_t m : {1, 2, 4, 8, 9, 17, 33, 256}) {
      for (const int64_t n : {1, 64, 4100, 152064}) {
        for (const int64_t k : {16, 1024, 1040, 11008, 16384, 32768}) {
          if (!plan_fixed(f.grid, f.layout, m, n, k)) continue;
          for (const int32_t sm_count : {1, 78, 132}) {
            const FixedPlan p = plan_fixed_split(f.grid, f.layout, m, n, k, sm_count);
            EXPECT_LE(p.shared_bytes, 227 * 1024);
            EXPECT_GE(p.slots, 2);
            EXPECT_LE(p.slots, kFixedMostSlots);
            const int64_t tiles = (n + kFixedTileN - 1) / kFixedTileN;
            EXPECT_LE(p.ranges, tiles);
            EXPECT_LE((tiles + p.ranges - 1) / p.ranges, kFixedMostTiles);
          }
        }
      }
    }
  }
  EXPECT_CONTAINS(error_text([&] { plan(nibble, 1, 64, 64); }), "expected a product that plan_fixed takes, got 1 x 64 x 64 by int4");

  auto kernel = [&](Grid grid, int64_t m, int32_t capability) {
    return std::string(plan_weight_only(grid, m, 12288, 4096, capability, 132).kernel);
  };
  EXPECT_EQ(kernel(bit, 1, 90), "fixed");
  EXPECT_EQ(kernel(bit, 1, 80), "held");
  EXPECT_EQ(kernel(nibble, 64, 90), "fixed");
  EXPECT_EQ(kernel({GridKind::kGauss, 4}, 16, 90), "held");
  EXPECT_EQ(kernel(nibble, 257, 80), "m128n128");

  // More rows meet weights that are widened on their way, if the copy engine can read these and they are integers: the sooner, the wider
  // these are, and the more tiles there are.
  EXPECT_EQ(kernel(nibble, 96, 90), "wgmma_m128n128");
  EXPECT_EQ(kernel(bit, 128, 90), "fixed");
  EXPECT_EQ(plan_weight_only(nibble, 128, 4096, 4096, 90, 132).kernel, std::string("fixed"));
  EXPECT_EQ(kernel(nibble, 4096, 90), "wgmma_m256n128");
  EXPECT_EQ(plan_widened_tile(512, 4096, 4096, 132).block_m, 128);  // 128 tiles instead of 64, in pairs
  EXPECT_TRUE(plan_widened(bit, Layout::kPlanes, 300, 64, 136, 132));
  EXPECT_FALSE(plan_widened(bit, Layout::kPlanes, 256, 64, 136, 132));
  EXPECT_FALSE(plan_widened(nibble, Layout::kPacked, 300, 64, 44, 132));
  EXPECT_TRUE(plan_widened({GridKind::kInt, 8}, Layout::kCodes, 300, 64, 48, 132));
  EXPECT_FALSE(plan_widened({GridKind::kInt, 8}, Layout::kCodes, 300, 64, 40, 132));
  EXPECT_FALSE(plan_widened(nibble, Layout::kPacked, 64, 12288, 4096, 132));
  EXPECT_FALSE(plan_widened(nibble, Layout::kPacked, 300, 0, 64, 132));
  EXPECT_FALSE(plan_widened(nibble, Layout::kPacked, 300, 64, 0, 132));
  EXPECT_TRUE(plan_widened({GridKind::kTernary, 2}, Layout::kPacked, 300, 64, 64, 132));
  EXPECT_FALSE(plan_widened({GridKind::kIntZero, 2}, Layout::kPlanes, 300, 64, 128, 132));
  EXPECT_TRUE(plan_widened({GridKind::kInt, 2}, Layout::kPlanes, 4096, 4096, 4096, 132));
  EXPECT_FALSE(plan_widened({GridKind::kInt, 2}, Layout::kPlanes, 16384, 4096, 4096, 132));
  EXPECT_EQ(plan_widened_tile(256, 12288, 4096, 132).block_n, 192);
  EXPECT_EQ(kernel({GridKind::kGauss, 4}, 4096, 90), "m128n128");
  EXPECT_EQ(kernel({GridKind::kFp4, 4}, 4096, 90), "m128n128");
  EXPECT_EQ(plan_weight_only(bit, 8, 12288, 4096, 90, 132).split_k, 2);
}

TEST(Plan, OtherFamilies) {
  const Grid int4{GridKind::kInt, 4}, gauss4{GridKind::kGauss, 4}, ternary{GridKind::kTernary, 2}, int2{GridKind::kInt, 2};
  EXPECT_EQ(plan_operands(ternary, &int2, Sparsity::kNone).family, GemmFamily::kInt4);
  EXPECT_EQ(plan_operands(int4, &int4, Sparsity::kFourEight).family, GemmFamily::kSparse);
  EXPECT_EQ(plan_operands(int4, &int4, Sparsity::kFourEight).a, Layout::kEvenOdd);
  EXPECT_EQ(plan_operands({GridKind::kFp4, 4}, &int4, Sparsity::kFourEight).a, Layout::kValues);
  EXPECT_EQ(plan_operands(gauss4, &int4, Sparsity::kNone).family, GemmFamily::kDequantized);
  EXPECT_EQ(plan_operands(int4, &gauss4, Sparsity::kNone).family, GemmFamily::kDequantized);
  EXPECT_EQ(plan_operands(gauss4, nullptr, Sparsity::kNone).family, GemmFamily::kWeightOnly);
  EXPECT_EQ(plan_operands(int2, nullptr, Sparsity::kNone).w, Layout::kPlanes);
  EXPECT_EQ(plan_operands(ternary, nullptr, Sparsity::kNone).w, Layout::kPacked);
  EXPECT_EQ(plan_operands({GridKind::kInt, 5}, nullptr, Sparsity::kNone).w, Layout::kCodes);
  EXPECT_EQ(plan_operands({GridKind::kInt, 8}, &int4, Sparsity::kFourEight).family, GemmFamily::kDequantized);
  EXPECT_EQ(plan_operands(int4, nullptr, Sparsity::kFourEight).family, GemmFamily::kDequantized);
}

TEST(Plan, EveryRowHasATileAndAReason) {
  for (const GemmFamily family :
       {GemmFamily::kInt8, GemmFamily::kInt4, GemmFamily::kPlanes, GemmFamily::kSparse, GemmFamily::kWeightOnly}) {
    for (const int64_t m : {1, 16, 17, 64, 65, 4096}) {
      for (const int64_t k : {64, 4096, 32768}) {
        const GemmTile tile = plan_tile(family, m, 4096, k, 90, 132);
        EXPECT_GT(tile.block_m * tile.block_n * tile.block_k, 0);
        EXPECT_GE(tile.split_k, 1);
        if (tile.wgmma) {
          const bool streams = std::string(tile.kernel) == "stream";
          EXPECT_TRUE(tile.block_m == 16 || tile.block_m == 64 || tile.block_m == 128 || tile.block_m == 256 ||
                      (streams && tile.block_m == 32))
              << tile.block_m;
          EXPECT_TRUE(tile.split_k == 1 || tile.block_m <= 64) << tile.block_m;
          EXPECT_TRUE(tile.cluster == 1 || tile.block_m == 256 || tile.split_k == (streams ? kStreamSenders : 2 * kWgmmaFewSplit[0]))
              << tile.block_m;
          EXPECT_TRUE(!streams || tile.cluster == kStreamBlocks);
        }
        EXPECT_GT(std::strlen(tile.kernel), 0u);
        EXPECT_GT(std::strlen(tile.reason), 0u);
      }
    }
  }
}

TEST(Plan, HopperTilesByRows) {
  auto plan = [](int64_t m, int64_t n, int64_t k) { return plan_tile(GemmFamily::kInt4, m, n, k, 90, 132); };
  EXPECT_EQ(plan(16384, 12288, 4096).block_m, 256);
  EXPECT_EQ(plan(1024, 4096, 4096).block_m, 256);  // 128 tiles on 132 multiprocessors
  EXPECT_EQ(plan(512, 4096, 4096).block_m, 128);   // 64 tiles of 256 rows would leave half of them idle
  // 2 waves of 256 tiles, where tiles of 256 rows would make one and a half, those of 128 columns almost three.
  EXPECT_EQ(plan(512, 12288, 4096).block_n, 192);
  EXPECT_EQ(plan(512, 12288, 4096).cluster, 1);
  EXPECT_EQ(plan(512, 6144, 2048).block_n, 192);
  EXPECT_EQ(plan(512, 22016, 4096).block_m, 256);
  EXPECT_EQ(plan_tile(GemmFamily::kInt8, 512, 12288, 4096, 90, 132).block_n, 192);
  EXPECT_EQ(plan_tile(GemmFamily::kSparse, 512, 12288, 4096, 90, 132).block_n, 128);  // not built for it
  EXPECT_EQ(plan(128, 4096, 4096).block_m, 64);
  EXPECT_EQ(plan(64, 12288, 4096).block_m, 64);
  // Few rows: as many columns a thread block as leave one to each multiprocessor; of 64 and 128, two warpgroups share K.
  auto columns = [&](int64_t m, int64_t n, int64_t k) { return plan(m, n, k).block_n; };
  EXPECT_EQ(columns(64, 4096, 4096), 64);
  EXPECT_EQ(columns(64, 12288, 4096), 128);
  EXPECT_EQ(columns(64, 22016, 4096), 192);
  EXPECT_EQ(columns(128, 4096, 4096), 64);
  EXPECT_EQ(plan(128, 12288, 4096).block_m, 128);
  EXPECT_EQ(plan(512, 2048, 5632).block_m, 64);
  EXPECT_EQ(plan_tile(GemmFamily::kSparse, 128, 4096, 4096, 90, 132).block_n, 64);
  EXPECT_EQ(plan_tile(GemmFamily::kSparse, 128, 12288, 4096, 90, 132).block_m, 128);
  // Two thread blocks share K where half of the multiprocessors would have none.
  EXPECT_EQ(plan(64, 4096, 4096).split_k, 4);
  EXPECT_EQ(plan(64, 4096, 4096).cluster, 2);
  EXPECT_EQ(plan(64, 4096, 512).cluster, 1);
  EXPECT_EQ(plan_tile(GemmFamily::kSparse, 16, 4096, 4096, 90, 132).cluster, 2);
  EXPECT_EQ(plan_tile(GemmFamily::kPlanes, 64, 4096, 11008, 90, 132).cluster, 2);
  EXPECT_EQ(plan_tile(GemmFamily::kPlanes, 64, 4096, 2048, 90, 132).cluster, 1);
  EXPECT_EQ(plan(128, 4096, 4096).split_k, 2);
  EXPECT_EQ(plan(64, 12288, 4096).split_k, 2);
  EXPECT_EQ(plan(64, 22016, 4096).split_k, 1);
  EXPECT_EQ(plan(4096, 4096, 4096).split_k, 1);
  // An odd number of column tiles leaves half of the last pair of thread blocks idle.
  EXPECT_EQ(plan(16384, 512, 4096).block_m, 256);
  EXPECT_EQ(plan(16384, 384, 4096).block_m, 128);
  EXPECT_EQ(plan(4096, 4096, 4096).cluster, 2);
  EXPECT_EQ(plan_tile(GemmFamily::kPlanes, 4096, 4096, 4096, 90, 132).cluster, 2);
  EXPECT_EQ(plan_tile(GemmFamily::kPlanes, 16, 4096, 4096, 90, 132).block_m, 16);
}

TEST(Plan, SpreadBlocks) {
  constexpr int64_t kBlockBytes = 227 * 1024, kBytes = kBlockBytes + kReservedSharedBytes, kUnit = 128;
  constexpr int32_t kMultiprocessors = 132;
  for (const int64_t warps : {1, 2, 3, 4, 6, 11, 32}) {
    for (int64_t blocks = 1; blocks <= 20 * kMultiprocessors; ++blocks) {
      const int64_t bytes = plan_spread_bytes(blocks, warps, kMultiprocessors, kBlockBytes);
      const int64_t share = std::max<int64_t>((blocks + kMultiprocessors - 1) / kMultiprocessors, warps < 4 ? 4 / warps : 1);
      if (share > kSpreadMostShare) {
        EXPECT_EQ(bytes, 0) << blocks;
        continue;
      }
      // As many blocks fit as are to, whatever static memory they have, and one more does not.
      const int64_t most = (bytes + kSpreadStaticBytes + kUnit - 1) / kUnit * kUnit + kReservedSharedBytes;
      EXPECT_LE(share * most, kBytes) << blocks << " blocks of " << warps;
      EXPECT_GT((share + 1) * (bytes + kReservedSharedBytes), kBytes) << blocks << " blocks of " << warps;
    }
  }
}

TEST(Plan, FewRows) {
  auto is_skinny = [](GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t capability = 90) {
    return std::string(plan_tile(family, m, n, k, capability, 132).kernel).rfind("skinny", 0) == 0;
  };
  EXPECT_TRUE(is_skinny(GemmFamily::kInt4, 32, 22016, 4096));
  EXPECT_FALSE(is_skinny(GemmFamily::kInt4, 33, 22016, 4096));
  EXPECT_TRUE(is_skinny(GemmFamily::kInt4, 16, 4096, 4096, 80));
  EXPECT_FALSE(is_skinny(GemmFamily::kInt4, 17, 4096, 4096, 80));  // which has tensor cores for nibbles
  EXPECT_TRUE(is_skinny(GemmFamily::kInt8, 16, 4096, 32768));
  EXPECT_FALSE(is_skinny(GemmFamily::kInt8, 17, 4096, 4096));
  EXPECT_FALSE(is_skinny(GemmFamily::kSparse, 1, 4096, 4096));
  EXPECT_EQ(plan_skinny_team(4096, 132), 8);
  EXPECT_EQ(plan_skinny_team(12288, 132), 4);
  // Real activations stay in registers, 16 rows of them or 8 at a time.
  auto is_held = [](int64_t m, int32_t capability) {
    return std::string(plan_tile(GemmFamily::kWeightOnly, m, 4096, 11008, capability, 132).kernel) == "held";
  };
  EXPECT_TRUE(is_held(64, 90));
  EXPECT_FALSE(is_held(65, 90));
  EXPECT_TRUE(is_held(32, 86));
  EXPECT_FALSE(is_held(33, 86));
  EXPECT_EQ(plan_held(90).rows, 16);
  EXPECT_EQ(plan_held(80).rows, 8);
  EXPECT_EQ(plan_held(89).warps, 4);
  // On Hopper those of integer grids become fixed-point numbers, if there are many of them, the weight is large, or has one bit.
  const Grid bit{GridKind::kInt, 1}, nibble{GridKind::kInt, 4}, byte{GridKind::kInt, 8}, floats{GridKind::kFp4, 4};
  EXPECT_TRUE(plan_fixed(bit, Layout::kPlanes, 1, 64, 32768));
  EXPECT_FALSE(plan_fixed(bit, Layout::kPlanes, 1, 64, 32776));
  EXPECT_FALSE(plan_fixed(bit, Layout::kPlanes, 1, 65535 * 64 + 1, 64));  // more ranges than a launch can have
  EXPECT_TRUE(plan_fixed(nibble, Layout::kPacked, 1, 12288, 4096));
  EXPECT_FALSE(plan_fixed(nibble, Layout::kPacked, 16, 2048, 2048));
  EXPECT_TRUE(plan_fixed(nibble, Layout::kPacked, 17, 2048, 2048));
  EXPECT_TRUE(plan_fixed(floats, Layout::kPacked, 256, 64, 40));
  EXPECT_FALSE(plan_fixed(floats, Layout::kPacked, 257, 64, 40));
  EXPECT_FALSE(plan_fixed(floats, Layout::kCodes, 17, 4096, 4096));
  EXPECT_FALSE(plan_fixed({GridKind::kGauss, 4}, Layout::kPacked, 17, 4096, 4096));
  EXPECT_FALSE(plan_fixed(nibble, Layout::kPacked, 17, 4096, 4100));
  EXPECT_FALSE(plan_fixed(nibble, Layout::kPacked, 17, 4096, 16392));
  EXPECT_FALSE(plan_fixed(byte, Layout::kCodes, 17, 4096, 4104));

  // The activation is packed where the first of these kernels takes it, and the weight never depends on the shape.
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8}, fp4{GridKind::kFp4, 4};
  auto layout = [&](Grid a, GemmShape shape) { return plan_operands(int4, &a, Sparsity::kNone, &shape).a; };
  EXPECT_EQ(layout(int4, {8, 4096, 4096}), Layout::kPacked);
  EXPECT_EQ(layout(int4, {8, 12288, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(int4, {16, 4096, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(int4, {32, 22016, 4096}), Layout::kPacked);
  EXPECT_EQ(layout(int4, {64, 12288, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(int4, {4096, 4096, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(int8, {8, 4096, 4096}), Layout::kValues);
  EXPECT_EQ(layout(int8, {16, 4096, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(int8, {4096, 4096, 4096}), Layout::kEvenOdd);
  EXPECT_EQ(layout(fp4, {16, 4096, 4096}), Layout::kValues);
  EXPECT_EQ(plan_operands(int4, &int4, Sparsity::kNone).a, Layout::kEvenOdd);
}

TEST(Plan, StreamedWeight) {
  // One wave of pairs of thread blocks, and room for a, what is received, and two slots a ring at least.
  const StreamPlan plan = plan_stream_split(16, 12288, 4096, 132);
  EXPECT_EQ(plan.rows, 16);
  EXPECT_EQ(plan.ranges, 66);
  EXPECT_EQ(plan.slots, 5);
  EXPECT_LE(plan.shared_bytes, 227 * 1024);
  EXPECT_EQ(plan_stream_split(17, 12288, 4096, 132).rows, 32);
  EXPECT_EQ(plan_stream_split(5, 100, 40, 132).ranges, 2);
  EXPECT_EQ(plan_stream_split(33, 12288, 4096, 132).rows, 0);
  EXPECT_EQ(plan_stream_split(32, 22016, 4096, 132).rows, 0);
  EXPECT_EQ(plan_stream_split(1, 12288, 65536, 132).rows, 0);
  EXPECT_EQ(plan_stream_split(1, 128256, 4096, 132).rows, 0);
  EXPECT_EQ(plan_stream_split(1, 64, 64, 1).rows, 0);
  const Grid codes{GridKind::kInt, 4};
  for (const int32_t sm_count : {2, 3, 78, 114, 132}) {
    for (const int64_t m : {1, 8, 9, 16, 17, 32}) {
      for (const int64_t n : {1, 64, 65, 4096, 12288, 67584, 67585}) {
        for (const int64_t k : {1, 256, 257, 4096, 11008, 19456}) {
          const StreamPlan split = plan_stream_split(m, n, k, sm_count);
          EXPECT_LE(split.shared_bytes, 227 * 1024);
          EXPECT_TRUE(split.rows == 0 || (split.rows >= m && split.slots >= 2 && 2 * split.ranges <= sm_count));
          EXPECT_TRUE(split.rows > 0 || !plan_stream(m, n, k, sm_count));
          // The other two plans agree.
          const GemmShape shape{m, n, k, 90, sm_count};
          const bool streams = std::string(plan_tile(GemmFamily::kInt4, m, n, k, 90, sm_count).kernel) == "stream";
          EXPECT_EQ(streams, plan_operands(codes, &codes, Sparsity::kNone, &shape).a == Layout::kEvenOdd);
        }
      }
    }
  }
  // Faster than teams of warps where those leave more of the GPU idle, or have two tiles of rows.
  EXPECT_TRUE(plan_stream(1, 12288, 4096, 132));
  EXPECT_TRUE(plan_stream(8, 11264, 2048, 132));
  EXPECT_FALSE(plan_stream(8, 22016, 4096, 132));
  EXPECT_FALSE(plan_stream(8, 4096, 4096, 132));
  EXPECT_TRUE(plan_stream(9, 22016, 4096, 132));
  EXPECT_TRUE(plan_stream(16, 4096, 11008, 132));
  EXPECT_FALSE(plan_stream(16, 2048, 5632, 132));
  EXPECT_FALSE(plan_stream(16, 6144, 2048, 132));
  EXPECT_TRUE(plan_stream(32, 4096, 4096, 132));
  const GemmTile tile = plan_tile(GemmFamily::kInt4, 16, 4096, 4096, 90, 132);
  EXPECT_EQ(std::string(tile.kernel), "stream");
  EXPECT_EQ(tile.split_k, 4);
  EXPECT_EQ(std::string(plan_tile(GemmFamily::kInt4, 16, 4096, 4096, 80, 132).kernel), "skinny");
  for (const int32_t capability : {0, 80, 89, 100, 120}) {
    const GemmShape shape{16, 4096, 4096, capability, 132};
    EXPECT_EQ(plan_operands(codes, &codes, Sparsity::kNone, &shape).a, Layout::kPacked);
  }
}

TEST(Plan, BitsThatStay) {
  auto kernel = [](int64_t m, int64_t n, int64_t k, int32_t capability = 90) {
    return std::string(plan_bits(m, n, k, capability, 132).kernel);
  };
  EXPECT_EQ(kernel(16, 4096, 4096), "skinny");
  EXPECT_EQ(kernel(64, 4096, 4096), "wgmma_m64n64");
  EXPECT_EQ(kernel(4096, 4096, 4096), "stationary_n256");
  EXPECT_EQ(kernel(4096, 4096, 11008), "stationary_n128");  // 11 chunks of 128 rows, and 6 stages
  EXPECT_EQ(kernel(16384, 4096, 11008), "wgmma_m256n128");  // a would be read too often
  EXPECT_EQ(kernel(16384, 4096, 4096), "stationary_n256");
  EXPECT_EQ(kernel(4096, 4096, 11265), "wgmma_m256n128");  // 4 stages
  EXPECT_EQ(kernel(4096, 4080, 4096), "wgmma_m256n128");   // no whole spans of 32 columns
  EXPECT_EQ(kernel(4096, 4096, 4096, 80), "m128n128");
  EXPECT_EQ(stationary_stages(256, 4096), 11);
  EXPECT_EQ(stationary_stages(128, 11008), 6);
  EXPECT_EQ(stationary_stages(128, 11265), 4);
  EXPECT_EQ(stationary_stages(256, 11008), 0);
  EXPECT_TRUE(is_stationary(plan_bits(4096, 4096, 11008, 90, 132)));
  EXPECT_FALSE(is_stationary(plan_bits(64, 4096, 4096, 90, 132)));
}

TEST(Plan, WgmmaOnHopperAlone) {
  for (const GemmFamily family : {GemmFamily::kInt8, GemmFamily::kInt4, GemmFamily::kPlanes, GemmFamily::kSparse}) {
    for (const int64_t m : {65, 4096}) {
      EXPECT_TRUE(plan_tile(family, m, 4096, 4096, 90, 132).wgmma);
      for (const int32_t capability : {80, 86, 89, 100, 120}) EXPECT_FALSE(plan_tile(family, m, 4096, 4096, capability, 132).wgmma);
    }
  }
  EXPECT_FALSE(plan_tile(GemmFamily::kWeightOnly, 16, 4096, 4096, 90, 132).wgmma);
}

TEST(Plan, NativeInt4WhereTensorCoresHaveIt) {
  const Grid int4{GridKind::kInt, 4}, int5{GridKind::kInt, 5}, fp4{GridKind::kFp4, 4}, gauss4{GridKind::kGauss, 4};
  for (const Layout layout : {Layout::kPacked, Layout::kCodes}) {
    for (const int32_t capability : {80, 86, 87, 89}) EXPECT_TRUE(plan_native_int4(layout, int4, int4, capability)) << capability;
    for (const int32_t capability : {90, 100, 103, 120}) EXPECT_FALSE(plan_native_int4(layout, int4, int4, capability)) << capability;
    for (const Grid grid : {Grid{GridKind::kInt, 1}, Grid{GridKind::kIntZero, 3}, Grid{GridKind::kTernary, 2}}) {
      EXPECT_TRUE(plan_native_int4(layout, grid, int4, 80)) << to_string(grid);
      EXPECT_TRUE(plan_native_int4(layout, int4, grid, 80)) << to_string(grid);
    }
    for (const Grid grid : {int5, fp4, gauss4}) {
      EXPECT_FALSE(plan_native_int4(layout, grid, int4, 80)) << to_string(grid);
      EXPECT_FALSE(plan_native_int4(layout, int4, grid, 80)) << to_string(grid);
    }
  }
  EXPECT_FALSE(plan_native_int4(Layout::kValues, int4, int4, 80));
}

TEST(Plan, Errors) {
  EXPECT_CONTAINS(error_text([] { plan_tile(GemmFamily::kInt8, 1, 1, 1, 75, 40); }), "compute capability 80 or higher, got 75");
  EXPECT_CONTAINS(error_text([] { plan_tile(GemmFamily::kInt8, -1, 1, 1, 90, 132); }), "m, n, k >= 0");
}

}  // namespace
}  // namespace quest
