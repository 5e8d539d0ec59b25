// The product kernels of Hopper without one (emulator.h), at the smallest shapes that reach every part of them.
#include <tuple>

#include "emulator.h"
#include "products.h"
#include "quest/plan.h"

namespace quest::testing {
namespace {

const Grid kInt1Grid{GridKind::kInt, 1}, kInt2Grid{GridKind::kInt, 2}, kInt4Grid{GridKind::kInt, 4}, kInt8Grid{GridKind::kInt, 8};
const Grid kFp4Grid{GridKind::kFp4, 4}, kIntZero3Grid{GridKind::kIntZero, 3}, kGauss4Grid{GridKind::kGauss, 4};

// The kernel for few rows: teams of 8 warps that make one tile, teams of 4 that make several; K of fewer and of more slices than a warp has
// on their way.
TEST(Emulated, FewRows) {
  emulated::multiprocessors = 2;
  Random random(1);
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{5, 48}, {150, 416}, {35, 4640}}) {
    const Matrix w8(random, kInt8Grid, Layout::kCodes, n, k), w4(random, kInt4Grid, Layout::kPacked, n, k);
    const Matrix w1(random, kInt1Grid, Layout::kPlanes, n, k), w_fp4(random, kFp4Grid, Layout::kPacked, n, k);
    for (const int64_t m : {1, 9, 17, 30}) {
      check_product(kInt4, Matrix(random, kInt4Grid, Layout::kPacked, m, k), w4, m, n, k);
      if (m > 16) continue;
      check_product(kInt4, Matrix(random, kIntZero3Grid, Layout::kCodes, m, k), w4, m, n, k, DType::kBFloat16);
      check_product(kInt4, Matrix(random, kInt4Grid, Layout::kValues, m, k), w_fp4, m, n, k);
      check_product(kInt8, Matrix(random, kInt8Grid, Layout::kValues, m, k), w8, m, n, k, DType::kFloat16);
      check_product(kPlanes, Matrix(random, kInt1Grid, Layout::kPlanes, m, k), w1, m, n, k);
    }
  }
}

// Few rows that stay in shared memory while w streams past them: K that ends within a unit, of one unit for two blocks, of more units than
// a ring has slots; tiles of all warpgroups, several each, and fewer than there are.
TEST(Emulated, StreamedWeight) {
  Random random(9);
  struct Case {
    int multiprocessors;
    int64_t n, k;
  };
  for (const auto& [multiprocessors, n, k] : {Case{2, 40, 200}, Case{2, 336, 1100}, Case{4, 190, 4640}, Case{3, 304, 512}}) {
    emulated::multiprocessors = multiprocessors;
    const Matrix w4(random, kInt4Grid, Layout::kPacked, n, k), w3(random, kIntZero3Grid, Layout::kPacked, n, k);
    for (const int64_t m : {1, 9, 16, 17, 30}) {
      ASSERT_EQ(plan_stream_split(m, n, k, multiprocessors).rows, m <= 16 ? 16 : 32);
      check_product(kInt4, Matrix(random, kInt4Grid, Layout::kEvenOdd, m, k), w4, m, n, k, DType::kFloat32, /*with_bias=*/m % 2 == 0);
      check_product(kInt4, Matrix(random, kInt8Grid, Layout::kEvenOdd, m, k), w3, m, n, k, DType::kBFloat16);
    }
  }
  emulated::multiprocessors = 4;
  for (const Fill fill : {Fill::kTop, Fill::kBottom}) {
    const Matrix w(random, kInt4Grid, Layout::kPacked, 70, 8200, fill);
    for (const int64_t m : {9, 17}) {
      ASSERT_GT(plan_stream_split(m, 70, 8200, emulated::multiprocessors).rows, 0);
      check_product(kInt4, Matrix(random, kInt8Grid, Layout::kEvenOdd, m, 8200, fill), w, m, 70, 8200, DType::kFloat16);
    }
  }
}

// Real activations as fixed-point numbers: units that are whole and that are not; one block and several that share K, equally and not;
// several tiles a block, and groups of rows.
TEST(Emulated, FixedPoint) {
  Random random(2);
  struct Case {
    int multiprocessors;
    Shape shape;
  };
  for (const auto& [multiprocessors, s] : {Case{1, {17, 150, 200}}, Case{1, {33, 112, 2600}}, Case{8, {17, 144, 8200}}}) {
    for (const int32_t bits : {1, 2, 3}) ASSERT_TRUE(plan_fixed({GridKind::kInt, bits}, Layout::kPlanes, s.m, s.n, s.k));
    emulated::multiprocessors = multiprocessors;
    for (const int32_t bits : {1, 2, 3})
      check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kBFloat16, s.m, s.n, s.k);
    for (const Grid grid : {kInt4Grid, kFp4Grid}) check_weight_only(random, grid, Layout::kPacked, DType::kFloat16, s.m, s.n, s.k);
    check_weight_only(random, kInt8Grid, Layout::kCodes, DType::kBFloat16, s.m, s.n, s.k / 16 * 16);
  }
  // One bit, of fewer rows than eight.
  for (const auto& [m, n, k] : {Shape{1, 144, 2056}, Shape{2, 70, 1000}, Shape{3, 208, 4104}, Shape{4, 64, 1024}, Shape{5, 100, 3080}}) {
    emulated::multiprocessors = static_cast<int>(m);
    check_weight_only(random, kInt1Grid, Layout::kPlanes, m % 2 == 0 ? DType::kFloat16 : DType::kBFloat16, m, n, k);
  }
  // Several tiles a warpgroup, and more than there are warps; warpgroups that share units, of which blocks have different numbers; clusters
  // of blocks of which some own more parts of a tile than others, or none.
  struct Divided {
    Shape shape;
    int cluster, k_groups, tiles;
  };
  emulated::multiprocessors = 1;
  for (const auto& [s, cluster, k_groups, tiles] : {Divided{{2, 1100, 1032}, 2, 1, 18}, Divided{{4, 64, 9000}, 4, 2, 1},
                                                    Divided{{17, 320, 2056}, 3, 1, 5}, Divided{{9, 300, 11008}, 6, 2, 5}}) {
    const FixedPlan plan = plan_fixed_split(kInt1Grid, Layout::kPlanes, s.m, s.n, s.k, emulated::multiprocessors);
    ASSERT_EQ(std::tuple(plan.cluster, plan.k_groups, (s.n + 63) / 64 / plan.ranges), std::tuple(cluster, k_groups, tiles));
    check_weight_only(random, kInt1Grid, Layout::kPlanes, DType::kBFloat16, s.m, s.n, s.k);
  }
}

TEST(Emulated, WidenedWeights) {
  Random random(31);
  // Every tile, beyond y's edges too.
  emulated::multiprocessors = 2;
  for (const auto& [block_m, block_n, s] :
       {std::tuple{256, 128, Shape{400, 250, 96}}, std::tuple{128, 192, Shape{270, 380, 96}}, std::tuple{128, 128, Shape{258, 128, 96}}}) {
    const GemmTile tile = plan_widened_tile(s.m, s.n, s.k, emulated::multiprocessors);
    ASSERT_EQ(std::tuple(tile.block_m, tile.block_n), std::tuple(block_m, block_n));
    ASSERT_TRUE(plan_widened(kInt4Grid, Layout::kPacked, s.m, s.n, s.k, emulated::multiprocessors));
    check_weight_only(random, kInt4Grid, Layout::kPacked, DType::kBFloat16, s.m, s.n, s.k);
    for (const int32_t bits : {1, 2}) {  // an odd number of steps too
      check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kFloat16, s.m, s.n, s.k + 40);
    }
    check_weight_only(random, kInt8Grid, Layout::kCodes, DType::kFloat16, s.m, s.n, s.k);
  }
  emulated::multiprocessors = 3;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const Shape& s : {Shape{300, 264, 96}, Shape{257, 70, 224}}) {
      check_weight_only(random, kInt4Grid, Layout::kPacked, dtype, s.m, s.n, s.k);
    }
  }
  for (const Grid grid : {Grid{GridKind::kIntZero, 4}, Grid{GridKind::kTernary, 2}}) {
    check_weight_only(random, grid, Layout::kPacked, DType::kBFloat16, 260, 65, 64);
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int32_t bits : {1, 2, 3}) check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, 260, 65, 200);
    for (const Grid grid : {Grid{GridKind::kInt, 7}, kInt8Grid, Grid{GridKind::kIntZero, 8}}) {
      check_weight_only(random, grid, Layout::kCodes, dtype, 260, 65, 176);
    }
  }
  check_rows_without_numbers(random, kInt4Grid, Layout::kPacked, DType::kBFloat16, 258, 66, 96);
}

TEST(Emulated, FixedPointExtremes) {
  emulated::multiprocessors = 4;
  Random random(8);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {  // (In float16 sums by wider weights are too large.)
    for (const int64_t m : {1, 2, 4, 17}) check_extremes(random, kInt1Grid, Layout::kPlanes, dtype, m, 66, 1024);
  }
  for (const int32_t bits : {2, 3}) check_extremes(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kBFloat16, 17, 66, 1024);
  for (const Grid grid : {kInt4Grid, kFp4Grid}) check_extremes(random, grid, Layout::kPacked, DType::kBFloat16, 17, 66, 512);
  for (const Grid grid : {Grid{GridKind::kInt, 7}, kInt8Grid}) check_extremes(random, grid, Layout::kCodes, DType::kBFloat16, 17, 66, 512);
  for (const int32_t bits : {1, 2, 3}) check_whole_numbers(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kBFloat16, 17, 66, 1160);
  for (const Grid grid : {kInt4Grid, kFp4Grid}) check_whole_numbers(random, grid, Layout::kPacked, DType::kBFloat16, 17, 66, 1160);
  check_whole_numbers(random, kInt8Grid, Layout::kCodes, DType::kBFloat16, 17, 66, 1168);
  check_rows_without_numbers(random, kInt1Grid, Layout::kPlanes, DType::kBFloat16, 18, 66, 1032);
  check_rows_without_numbers(random, kInt4Grid, Layout::kPacked, DType::kBFloat16, 18, 66, 1032);
  check_rows_without_numbers(random, kInt4Grid, Layout::kPacked, DType::kFloat16, 18, 66, 1032);
}

// Real activations in registers; by one bit on older GPUs alone.
TEST(Emulated, HeldRows) {
  emulated::multiprocessors = 2;
  Random random(6);
  for (const int capability : {90, 80}) {
    emulated::compute_capability = capability;
    for (const auto& [m, n, k] : {Shape{1, 150, 200}, Shape{3, 20, 4640}, Shape{16, 40, 1000}}) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        for (const int32_t bits : {1, 3}) check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, m, n, k);
        for (const Grid grid : {kInt4Grid, kGauss4Grid}) check_weight_only(random, grid, Layout::kPacked, dtype, m, n, k);
      }
    }
    // Codes of a byte; several passes over K.
    check_weight_only(random, kInt8Grid, Layout::kCodes, DType::kBFloat16, 3, 40, 528);
    check_weight_only(random, kGauss4Grid, Layout::kPacked, DType::kBFloat16, 16, 40, 4640);
  }
  emulated::compute_capability = 90;
}

// Whole numbers, whose sums every type holds.
TEST(Emulated, AddBias) {
  constexpr int64_t kM = 5, kN = 70;
  Random random(11);
  for (const DType dtype : kDTypes) {
    std::vector<float> y(kM * kN), bias(kN), sums(kM * kN);
    for (float& value : y) value = static_cast<float>(random.below(64));
    for (float& value : bias) value = static_cast<float>(random.below(64)) - 32.0f;
    for (int64_t i = 0; i < kM * kN; ++i) sums[i] = y[i] + bias[i % kN];
    const OnDevice<uint8_t> device_y(to_dtype(y, dtype));
    const OnDevice<float> device_bias(bias);
    cuda::add_bias(device_bias.data(), device_y.data(), dtype, kM, kN, nullptr);
    EXPECT_TRUE(bitwise_equal(to_dtype(sums, dtype), device_y.host(), kN * element_size(dtype)));
  }
}

// Tiles of 64 and 16 rows, of 64 and 128 columns, whose warpgroups share K, and of 192: as many steps for each, and fewer for some; more
// than the ring has stages; two thread blocks a tile. Columns stored two by two (multiples of 16) and one by one.
TEST(Emulated, SharedK) {
  Random random(3);
  struct Case {
    int multiprocessors;
    int64_t n, k;
    int block_n, cluster;
  };
  for (const auto& [multiprocessors, n, k, block_n, cluster] :
       {Case{4, 130, 2048, 64, 1}, Case{1, 48, 5136, 64, 1}, Case{2, 240, 1040, 128, 1}, Case{2, 250, 1040, 128, 1},
        Case{1, 176, 272, 192, 1}, Case{1, 190, 272, 192, 1}, Case{4, 112, 1040, 64, 2}, Case{4, 100, 1040, 64, 2}}) {
    emulated::multiprocessors = multiprocessors;
    const Matrix w8(random, kInt8Grid, Layout::kCodes, n, k), w4(random, kInt4Grid, Layout::kPacked, n, k);
    const Matrix w2(random, kInt2Grid, Layout::kPlanes, n, 8 * k);
    for (const int64_t m : {33, 64}) {
      const GemmTile tile = plan_wgmma(GemmFamily::kInt4, m, n, k, multiprocessors);
      ASSERT_EQ(std::tuple(tile.block_m, tile.block_n, tile.cluster), std::tuple(64, block_n, cluster));
      check_product(kInt4, Matrix(random, kInt4Grid, Layout::kEvenOdd, m, k), w4, m, n, k);
      check_product(kInt8, Matrix(random, kInt8Grid, Layout::kValues, m, k), w8, m, n, k, DType::kBFloat16);
    }
    if (cluster == 2) {
      const Matrix sparse(random, kInt4Grid, Layout::kPacked, n, k, Fill::kRandom, true);
      for (const int64_t m : {3, 20}) check_product(kSparse, Matrix(random, kInt4Grid, Layout::kEvenOdd, m, k), sparse, m, n, k);
    }
    for (const int64_t m : {3, 40}) {
      const GemmTile tile = plan_wgmma(GemmFamily::kPlanes, m, n, 8 * k, multiprocessors);
      ASSERT_EQ(std::tuple(tile.block_m, tile.cluster), std::tuple(m > 16 ? 64 : 16, cluster));
      check_product(kPlanes, Matrix(random, kInt2Grid, Layout::kPlanes, m, 8 * k), w2, m, n, 8 * k);
    }
  }
  // Several tiles of rows.
  emulated::multiprocessors = 2;
  ASSERT_EQ(plan_wgmma(GemmFamily::kInt4, 70, 112, 1040, 2).block_m, 64);
  check_product(kInt4, Matrix(random, kInt4Grid, Layout::kEvenOdd, 70, 1040), Matrix(random, kInt4Grid, Layout::kPacked, 112, 1040), 70,
                112, 1040);
}

// Tiles of 128 rows and 128 and 192 columns, and of 256 rows in clusters of two blocks, several a block; y by the copy engine and by single
// elements.
TEST(Emulated, LargeTiles) {
  Random random(4);
  struct Case {
    int multiprocessors;
    Shape shape;
    int block_m, block_n;
  };
  for (const auto& [multiprocessors, s, block_m, block_n] :
       {Case{2, {257, 250, 208}, 128, 128}, Case{2, {200, 376, 1040}, 128, 192}, Case{4, {500, 500, 208}, 256, 128}}) {
    emulated::multiprocessors = multiprocessors;
    const GemmTile tile = plan_wgmma(GemmFamily::kInt4, s.m, s.n, s.k, multiprocessors);
    ASSERT_EQ(std::pair(tile.block_m, tile.block_n), std::pair(block_m, block_n));
    const Matrix a(random, kInt4Grid, Layout::kEvenOdd, s.m, s.k), w(random, kInt4Grid, Layout::kPacked, s.n, s.k);
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) check_product(kInt4, a, w, s.m, s.n, s.k, dtype);
    check_product(kInt4, Matrix(random, kInt4Grid, Layout::kCodes, s.m, s.k), w, s.m, s.n, s.k, DType::kFloat16);
    const Matrix a2(random, kInt2Grid, Layout::kPlanes, s.m, s.k), w2(random, kInt2Grid, Layout::kPlanes, s.n, s.k);
    check_product(kPlanes, a2, w2, s.m, s.n, s.k, DType::kBFloat16);
    const Matrix even_odd(random, kInt4Grid, Layout::kEvenOdd, s.m, s.k);
    const Matrix sparse(random, kInt4Grid, Layout::kPacked, s.n, s.k, Fill::kRandom, true);
    check_product(kSparse, even_odd, sparse, s.m, s.n, s.k, DType::kFloat16);
  }
}

// GPUs before Hopper: few rows, small tiles and large ones; 4-bit operands as nibbles, on tensor cores for them, and as bytes. And what no
// GPU has tensor cores for.
TEST(Emulated, OlderGpus) {
  emulated::compute_capability = 80;
  Random random(10);
  struct Case {
    int multiprocessors;
    Shape shape;
  };
  for (const auto& [multiprocessors, s] : {Case{2, {3, 70, 1040}}, Case{16, {40, 70, 208}}, Case{1, {150, 140, 208}}}) {
    emulated::multiprocessors = multiprocessors;
    const Matrix w4(random, kInt4Grid, Layout::kPacked, s.n, s.k), w8(random, kInt8Grid, Layout::kCodes, s.n, s.k);
    const Matrix w2(random, kInt2Grid, Layout::kPlanes, s.n, s.k), w1(random, kInt1Grid, Layout::kPlanes, s.n, s.k);
    const Matrix sparse(random, kInt4Grid, Layout::kPacked, s.n, s.k, Fill::kRandom, true);
    check_product(kInt4, Matrix(random, kInt4Grid, Layout::kPacked, s.m, s.k), w4, s.m, s.n, s.k);
    check_product(kInt4, Matrix(random, kInt8Grid, Layout::kValues, s.m, s.k), w4, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt8, Matrix(random, kInt8Grid, Layout::kValues, s.m, s.k), w8, s.m, s.n, s.k, DType::kFloat16);
    check_product(kPlanes, Matrix(random, kInt2Grid, Layout::kPlanes, s.m, s.k), w2, s.m, s.n, s.k);
    check_product(kPlanes, Matrix(random, kInt1Grid, Layout::kPlanes, s.m, s.k), w1, s.m, s.n, s.k);
    check_product(kSparse, Matrix(random, kInt4Grid, Layout::kEvenOdd, s.m, s.k), sparse, s.m, s.n, s.k);
    check_weight_only(random, kInt4Grid, Layout::kPacked, DType::kFloat32, s.m, s.n, s.k);
    check_weight_only(random, kGauss4Grid, Layout::kPacked, DType::kBFloat16, s.m, s.n, s.k);
  }
  emulated::compute_capability = 90;
}

// Rows of w that stay in shared memory, and then the next; a ring of a with more stages than a row has chunks, and with fewer.
TEST(Emulated, BitsThatStay) {
  emulated::multiprocessors = 2;
  Random random(5);
  for (const Shape& s : {Shape{130, 544, 2064}, Shape{200, 288, 10000}}) {
    const Matrix a(random, kInt1Grid, Layout::kPlanes, s.m, s.k), w(random, kInt1Grid, Layout::kPlanes, s.n, s.k);
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) check_product(kPlanes, a, w, s.m, s.n, s.k, dtype);
  }
}

}  // namespace
}  // namespace quest::testing
