// The products on the GPU against the CPU's. Integer sums are exact and the epilogue rounds step by step as the CPU's does, so float32
// results are equal to the bit. gemm_weight_only adds floats in another order; its tolerance is derived where it is used.
#include <memory>

#include "products.h"
#include "quest/cuda/quantize.h"
#include "quest/plan.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::check_product;
using testing::check_weight_only;
using testing::error_text;
using testing::Fill;
using testing::GpuGemm;
using testing::kInt4;
using testing::kInt8;
using testing::kPlanes;
using testing::kSparse;
using testing::Matrix;
using testing::OnDevice;
using testing::Product;
using testing::Random;
using testing::Shape;

class Gemm : public testing::GpuTest {};
class GemmWeightOnly : public testing::GpuTest {};

// One row to several tiles of every size, ragged in each direction; k that 16, 8 and nothing divides.
const std::vector<Shape> kShapes = {{1, 1, 1},     {1, 32, 128}, {1, 65, 4096},  {2, 33, 40},     {7, 40, 1000},
                                    {8, 64, 256},  {9, 31, 129}, {16, 96, 512},  {17, 63, 96},    {33, 70, 257},
                                    {50, 70, 320}, {64, 64, 64}, {65, 130, 192}, {129, 200, 320}, {257, 129, 64}};

TEST_F(Gemm, Int8OfEveryPairOfLayouts) {
  Random random(1);
  const std::vector<Grid> grids = {{GridKind::kInt, 1}, {GridKind::kInt, 4},     {GridKind::kInt, 7},     {GridKind::kInt, 8},
                                   {GridKind::kFp4, 4}, {GridKind::kIntZero, 5}, {GridKind::kIntZero, 8}, {GridKind::kTernary, 2}};
  for (const Grid grid_a : grids) {
    for (const Grid grid_w : grids) {
      for (const Layout layout_a : {Layout::kValues, Layout::kCodes}) {
        for (const Layout layout_w : {Layout::kValues, Layout::kCodes}) {
          for (const Shape shape : {Shape{3, 35, 144}, Shape{20, 35, 144}}) {
            const Matrix a(random, grid_a, layout_a, shape.m, shape.k), w(random, grid_w, layout_w, shape.n, shape.k);
            check_product(kInt8, a, w, shape.m, shape.n, shape.k);
          }
        }
      }
    }
  }
}

TEST_F(Gemm, Int8OfEveryShape) {
  Random random(2);
  for (const Shape& s : kShapes) {
    const Matrix a(random, {GridKind::kInt, 6}, Layout::kValues, s.m, s.k), w(random, {GridKind::kInt, 8}, Layout::kCodes, s.n, s.k);
    check_product(kInt8, a, w, s.m, s.n, s.k);
    const Matrix v(random, {GridKind::kInt, 7}, Layout::kValues, s.n, s.k);
    check_product(kInt8, a, v, s.m, s.n, s.k);
  }
}

TEST_F(Gemm, Int4OfEveryShapeAndGrid) {
  Random random(3);
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8}, fp4{GridKind::kFp4, 4};
  for (const Shape& s : kShapes) {
    const Matrix w(random, int4, Layout::kPacked, s.n, s.k), fp4_w(random, fp4, Layout::kPacked, s.n, s.k);
    const Matrix packed(random, int4, Layout::kPacked, s.m, s.k), values(random, int8, Layout::kValues, s.m, s.k),
        codes(random, int4, Layout::kCodes, s.m, s.k), even_odd(random, int4, Layout::kEvenOdd, s.m, s.k),
        even_odd8(random, int8, Layout::kEvenOdd, s.m, s.k);
    check_product(kInt4, packed, w, s.m, s.n, s.k);
    check_product(kInt4, even_odd, w, s.m, s.n, s.k);
    check_product(kInt4, even_odd8, w, s.m, s.n, s.k);
    check_product(kInt4, even_odd, fp4_w, s.m, s.n, s.k);
    check_product(kInt4, values, w, s.m, s.n, s.k);
    check_product(kInt4, codes, w, s.m, s.n, s.k);
    check_product(kInt4, packed, fp4_w, s.m, s.n, s.k);
    check_product(kInt4, values, fp4_w, s.m, s.n, s.k);
  }
  for (const Grid grid :
       {Grid{GridKind::kInt, 1}, Grid{GridKind::kInt, 3}, Grid{GridKind::kIntZero, 4}, Grid{GridKind::kTernary, 2}, fp4}) {
    for (const int64_t m : {5, 21}) {
      const Matrix w(random, grid, Layout::kPacked, 50, 200), a(random, grid, Layout::kPacked, m, 200),
          b(random, fp4, Layout::kPacked, m, 200);
      check_product(kInt4, a, w, m, 50, 200);
      check_product(kInt4, b, w, m, 50, 200);
    }
  }
}

// Codes that GPUs of compute capability 8.x multiply as nibbles, others as bytes: rows that can be copied 16 bytes at a time, rows that
// cannot, and an odd number of codes, in both tiles.
TEST_F(Gemm, Int4OfEveryPairOfNarrowGrids) {
  Random random(36);
  std::vector<Grid> grids;
  for (const Grid grid : testing::all_grids()) {
    if (has_values(grid) && grid.bits <= 4) grids.push_back(grid);
  }
  for (const Grid w_grid : grids) {
    for (const Shape& s : {Shape{17, 40, 272}, Shape{33, 70, 129}, Shape{70, 131, 520}}) {
      const Matrix w(random, w_grid, Layout::kPacked, s.n, s.k);
      for (const Grid a_grid : grids) {
        for (const Layout layout : {Layout::kPacked, Layout::kCodes, Layout::kEvenOdd}) {
          check_product(kInt4, Matrix(random, a_grid, layout, s.m, s.k), w, s.m, s.n, s.k);
        }
      }
    }
  }
  const Grid int3{GridKind::kInt, 3}, int4{GridKind::kInt, 4};
  for (const Shape& s : {Shape{1500, 1700, 144}, Shape{2100, 2000, 1037}}) {
    EXPECT_EQ(plan_mma_sync(GemmFamily::kInt4, s.m, s.n, 132).block_m, 128);
    const Matrix w(random, int4, Layout::kPacked, s.n, s.k);
    for (const Layout layout : {Layout::kPacked, Layout::kCodes, Layout::kEvenOdd}) {
      check_product(kInt4, Matrix(random, int3, layout, s.m, s.k), w, s.m, s.n, s.k, DType::kBFloat16);
    }
  }
}

// The kernel for few rows: rows of every number of tiles, and as many columns and as large a K as give a team one tile and several, and a
// warp fewer slices of a tile than it has on their way, as many, and more.
TEST_F(Gemm, FewRows) {
  Random random(31);
  const Grid int8{GridKind::kInt, 8}, int4{GridKind::kInt, 4}, int3{GridKind::kIntZero, 3}, int1{GridKind::kInt, 1}, fp4{GridKind::kFp4, 4};
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{5, 48}, {1403, 4096}, {700, 11008}, {6007, 1040}, {9001, 160}, {17003, 96}}) {
    const Matrix w8(random, int8, Layout::kCodes, n, k), w4(random, int4, Layout::kPacked, n, k), w1(random, int1, Layout::kPlanes, n, k),
        w_fp4(random, fp4, Layout::kPacked, n, k);
    for (const int64_t m : {1, 8, 9, 16, 17, 32, 33, 64}) {
      check_product(kInt4, Matrix(random, int4, Layout::kPacked, m, k), w4, m, n, k);
      if (m > 16) continue;
      check_product(kInt4, Matrix(random, int3, Layout::kCodes, m, k), w4, m, n, k, DType::kBFloat16);
      check_product(kInt4, Matrix(random, int8, Layout::kValues, m, k), w4, m, n, k);
      check_product(kInt4, Matrix(random, int4, Layout::kValues, m, k), w_fp4, m, n, k);
      check_product(kInt8, Matrix(random, int8, Layout::kValues, m, k), w8, m, n, k, DType::kFloat16);
      check_product(kPlanes, Matrix(random, int1, Layout::kPlanes, m, k), w1, m, n, k);
    }
  }
  // Packed rows need no K that 16 divides.
  for (const int64_t k : {1, 33, 1001}) {
    check_product(kInt4, Matrix(random, int4, Layout::kPacked, 20, k), Matrix(random, int3, Layout::kPacked, 700, k), 20, 700, k);
  }
}

// On Hopper few rows in the order of kEvenOdd stay in shared memory while w streams past them: one tile a pair of thread blocks, and
// several; K of one unit, and of more than a ring has slots; on 132 multiprocessors the most tiles that there is room for.
TEST_F(Gemm, StreamedWeight) {
  Random random(41);
  const Grid int8{GridKind::kInt, 8}, int4{GridKind::kInt, 4}, int3{GridKind::kIntZero, 3};
  auto expect_streamed = [](int64_t m, int64_t n, int64_t k) { EXPECT_EQ(plan_stream_split(m, n, k, 132).rows, m <= 16 ? 16 : 32); };
  struct Case {
    int64_t n, k, most_rows;
  };
  for (const auto& [n, k, most_rows] : {Case{5, 48, 32}, Case{1403, 4096, 32}, Case{704, 11008, 16}, Case{700, 8192, 32},
                                        Case{6007, 1040, 32}, Case{17003, 96, 32}, Case{67501, 64, 16}}) {
    const Matrix w4(random, int4, Layout::kPacked, n, k), w3(random, int3, Layout::kPacked, n, k);
    for (const int64_t m : {1, 8, 9, 16, 17, 32}) {
      if (m > most_rows) continue;
      expect_streamed(m, n, k);
      check_product(kInt4, Matrix(random, int4, Layout::kEvenOdd, m, k), w4, m, n, k);
      check_product(kInt4, Matrix(random, int3, Layout::kEvenOdd, m, k), w3, m, n, k, DType::kBFloat16);
      check_product(kInt4, Matrix(random, int8, Layout::kEvenOdd, m, k), w4, m, n, k, DType::kFloat16);
    }
  }
  for (const Fill fill : {Fill::kTop, Fill::kBottom}) {
    for (const auto& [m, k] : {std::pair<int64_t, int64_t>{3, 16384}, {16, 16384}, {30, 8192}}) {
      expect_streamed(m, 150, k);
      check_product(kInt4, Matrix(random, int8, Layout::kEvenOdd, m, k, fill), Matrix(random, int4, Layout::kPacked, 150, k, fill), m, 150,
                    k);
    }
  }
}

// Products by one kernel, each with shared memory of its own size, in one graph.
TEST_F(Gemm, StreamedWeightsInAGraph) {
  Random random(42);
  const Grid int4{GridKind::kInt, 4};
  constexpr int64_t m = 16, n = 150, large_k = 8192, small_k = 512;
  EXPECT_NE(plan_stream_split(m, n, large_k, 132).shared_bytes, plan_stream_split(m, n, small_k, 132).shared_bytes);
  const Matrix large_a(random, int4, Layout::kEvenOdd, m, large_k), large_w(random, int4, Layout::kPacked, n, large_k);
  const Matrix small_a(random, int4, Layout::kEvenOdd, m, small_k), small_w(random, int4, Layout::kPacked, n, small_k);
  const OnDevice<float> large(m * n), small(m * n), captured_large(m * n), captured_small(m * n);
  auto multiply = [&](const OnDevice<float>& large_y, const OnDevice<float>& small_y, cudaStream_t stream) {
    cuda::gemm_int4(large_a.device(), large_w.device(), nullptr, large_y.data(), DType::kFloat32, m, n, large_k, stream);
    cuda::gemm_int4(small_a.device(), small_w.device(), nullptr, small_y.data(), DType::kFloat32, m, n, small_k, stream);
  };
  multiply(large, small, nullptr);
  testing::run_captured([&](cudaStream_t capturing) { multiply(captured_large, captured_small, capturing); });
  EXPECT_TRUE(bitwise_equal(large.host(), captured_large.host(), n));
  EXPECT_TRUE(bitwise_equal(small.host(), captured_small.host(), n));
}

TEST_F(Gemm, PlanesOfEveryPairOfBits) {
  Random random(4);
  for (int32_t bits_a = 1; bits_a <= 4; ++bits_a) {
    for (int32_t bits_w = 1; bits_w <= 4; ++bits_w) {
      for (const Shape& s : {Shape{3, 40, 100}, Shape{70, 66, 1100}}) {
        const Matrix a(random, {GridKind::kInt, bits_a}, Layout::kPlanes, s.m, s.k),
            w(random, {GridKind::kInt, bits_w}, Layout::kPlanes, s.n, s.k);
        check_product(kPlanes, a, w, s.m, s.n, s.k);
      }
    }
  }
  for (const Shape& s : kShapes) {
    const Matrix a(random, {GridKind::kInt, 2}, Layout::kPlanes, s.m, s.k), w(random, {GridKind::kInt, 1}, Layout::kPlanes, s.n, s.k);
    check_product(kPlanes, a, w, s.m, s.n, s.k);
  }
}

TEST_F(Gemm, SparseOfEveryShapeAndGrid) {
  Random random(5);
  for (const Shape& s : kShapes) {
    const int64_t k = round_up(s.k, 8);
    const Matrix w(random, {GridKind::kInt, 4}, Layout::kPacked, s.n, k, Fill::kRandom, true);
    const Matrix packed(random, {GridKind::kInt, 4}, Layout::kPacked, s.m, k), values(random, {GridKind::kInt, 8}, Layout::kValues, s.m, k);
    const Matrix even_odd(random, {GridKind::kInt, 4}, Layout::kEvenOdd, s.m, k);
    check_product(kSparse, packed, w, s.m, s.n, k);
    check_product(kSparse, values, w, s.m, s.n, k);
    check_product(kSparse, even_odd, w, s.m, s.n, k);
  }
  const std::vector<Grid> grids = {{GridKind::kInt, 2}, {GridKind::kFp4, 4}, {GridKind::kTernary, 2}, {GridKind::kIntZero, 3}};
  for (const Grid grid_a : grids) {
    for (const Grid grid_w : grids) {
      const Matrix w(random, grid_w, Layout::kPacked, 30, 176, Fill::kRandom, true), a(random, grid_a, Layout::kPacked, 19, 176);
      const Matrix values(random, {GridKind::kInt, 8}, Layout::kValues, 19, 176);
      check_product(kSparse, a, w, 19, 30, 176);
      check_product(kSparse, values, w, 19, 30, 176);
      const Matrix even_odd(random, grid_a, Layout::kEvenOdd, 19, 176), even_odd8(random, {GridKind::kInt, 8}, Layout::kEvenOdd, 19, 176);
      check_product(kSparse, even_odd, w, 19, 30, 176);
      check_product(kSparse, even_odd8, w, 19, 30, 176);
    }
  }
}

// The largest sums that int32 holds, and rows as long as they may be.
TEST_F(Gemm, ExtremeCodes) {
  Random random(6);
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8};
  for (const int64_t m : {2, 18}) {
    for (const Fill fill_a : {Fill::kTop, Fill::kBottom}) {
      for (const Fill fill_w : {Fill::kTop, Fill::kBottom}) {
        const int64_t deepest = max_gemm_depth(int8, int8);
        for (const Layout layout : {Layout::kValues, Layout::kCodes}) {
          const Matrix a(random, int8, layout, m, deepest, fill_a), w(random, int8, layout, 3, deepest, fill_w);
          check_product(kInt8, a, w, m, 3, deepest);
        }
        const Matrix a(random, int4, Layout::kPacked, m, 32768, fill_a), w(random, int4, Layout::kPacked, 3, 32768, fill_w);
        check_product(kInt4, a, w, m, 3, 32768);
        for (const Layout layout : {Layout::kCodes, Layout::kEvenOdd}) {
          check_product(kInt4, Matrix(random, int4, layout, m, 32768, fill_a), w, m, 3, 32768);
        }
      }
    }
    const Matrix a(random, int4, Layout::kPlanes, m, 32768, Fill::kTop), w(random, int4, Layout::kPlanes, 3, 32768, Fill::kBottom);
    check_product(kPlanes, a, w, m, 3, 32768);
    const Matrix v(random, int8, Layout::kValues, m, 8192, Fill::kBottom), s(random, int4, Layout::kPacked, 3, 8192, Fill::kTop, true);
    check_product(kSparse, v, s, m, 3, 8192);
    for (const Fill fill_a : {Fill::kTop, Fill::kBottom}) {
      for (const Fill fill_w : {Fill::kTop, Fill::kBottom}) {
        const Matrix a8(random, int8, Layout::kEvenOdd, m, 32768, fill_a), a4(random, int4, Layout::kEvenOdd, m, 32768, fill_a);
        const Matrix w4(random, int4, Layout::kPacked, 3, 32768, fill_w, true);
        check_product(kSparse, a8, w4, m, 3, 32768);
        check_product(kSparse, a4, w4, m, 3, 32768);
      }
    }
  }
}

TEST_F(Gemm, EveryOutputType) {
  Random random(7);
  const Grid int4{GridKind::kInt, 4};
  for (const DType dtype : testing::kDTypes) {
    for (const int64_t m : {4, 30, 130}) {
      for (const int64_t n : {72, 75, 80}) {
        const Matrix a(random, int4, Layout::kValues, m, 128), w(random, int4, Layout::kPacked, n, 128);
        check_product(kInt4, a, w, m, n, 128, dtype, true);
        check_product(kInt4, a, w, m, n, 128, dtype, false);
        check_product(kInt4, a, w, m, n, 128, dtype, true, 4);
      }
    }
  }
}

// Rows that the copy engine can read, so that GPUs that have one use it: every tile of the plan, whole and cut off in each direction, one
// tile a thread block and many, K of one stage, of fewer stages than the ring has and of several rounds.
TEST_F(Gemm, TensorCopiesOfEveryTile) {
  Random random(30);
  const Grid int4{GridKind::kInt, 4}, int7{GridKind::kInt, 7}, int8{GridKind::kInt, 8}, fp4{GridKind::kFp4, 4},
      ternary{GridKind::kTernary, 2};
  const std::vector<Shape> shapes = {{1, 1, 16},        {3, 300, 4096},   {16, 129, 2064},  {17, 640, 1040},
                                     {64, 1000, 32768}, {100, 4000, 512}, {128, 128, 128},  {200, 257, 80},
                                     {300, 520, 3088},  {700, 3000, 144}, {2600, 4100, 208}};
  for (const Shape& s : shapes) {
    const Matrix codes4(random, int4, Layout::kCodes, s.m, s.k), values4(random, int4, Layout::kValues, s.m, s.k),
        values8(random, int8, Layout::kValues, s.m, s.k), values_fp4(random, fp4, Layout::kValues, s.m, s.k),
        even_odd4(random, int4, Layout::kEvenOdd, s.m, s.k), even_odd8(random, int8, Layout::kEvenOdd, s.m, s.k);
    const Matrix packed4(random, int4, Layout::kPacked, s.n, s.k), packed_fp4(random, fp4, Layout::kPacked, s.n, s.k),
        packed_ternary(random, ternary, Layout::kPacked, s.n, s.k);
    const Matrix codes7(random, int7, Layout::kCodes, s.n, s.k), codes8(random, int8, Layout::kCodes, s.n, s.k),
        own4(random, int4, Layout::kValues, s.n, s.k);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      check_product(kInt4, even_odd4, packed4, s.m, s.n, s.k, dtype);
    check_product(kInt4, even_odd8, packed4, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt4, even_odd4, packed_ternary, s.m, s.n, s.k, DType::kFloat16, false);
    check_product(kInt4, codes4, packed4, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt4, values8, packed4, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt4, values_fp4, packed_fp4, s.m, s.n, s.k, DType::kBFloat16, false);
    check_product(kInt4, values4, packed_ternary, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt4, values_fp4, packed4, s.m, s.n, s.k, DType::kFloat16);
    check_product(kInt4, values8, packed_fp4, s.m, s.n, s.k, DType::kFloat16);
    check_product(kInt8, values8, codes8, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt8, codes4, codes7, s.m, s.n, s.k, DType::kBFloat16, false);
    check_product(kInt8, values_fp4, own4, s.m, s.n, s.k, DType::kBFloat16);
    {
      const Matrix a4(random, int4, Layout::kEvenOdd, s.m, s.k), a8(random, int8, Layout::kEvenOdd, s.m, s.k),
          zero3(random, {GridKind::kIntZero, 3}, Layout::kEvenOdd, s.m, s.k);
      const Matrix w4(random, int4, Layout::kPacked, s.n, s.k, Fill::kRandom, true),
          w_ternary(random, ternary, Layout::kPacked, s.n, s.k, Fill::kRandom, true);
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) check_product(kSparse, a4, w4, s.m, s.n, s.k, dtype);
      check_product(kSparse, a8, w4, s.m, s.n, s.k, DType::kBFloat16, false);
      check_product(kSparse, zero3, w_ternary, s.m, s.n, s.k, DType::kFloat32);
    }
    for (const auto& [bits_a, bits_w] : {std::pair{1, 1}, std::pair{1, 2}, std::pair{2, 2}, std::pair{3, 2}, std::pair{4, 4}}) {
      const Matrix a(random, {GridKind::kInt, bits_a}, Layout::kPlanes, s.m, s.k),
          w(random, {GridKind::kInt, bits_w}, Layout::kPlanes, s.n, s.k);
      check_product(kPlanes, a, w, s.m, s.n, s.k, DType::kBFloat16);
    }
  }
}

// What a GPU of 132 multiprocessors does with these: several tiles a thread block, more stages than the ring has, a last tile cut off in
// both directions, and rows of y that the copy engine writes.
TEST_F(Gemm, TensorCopiesOfManyTiles) {
  Random random(32);
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8};
  struct Case {
    int32_t block_m, block_n;
    Shape shape;
  };
  for (const auto& [block_m, block_n, s] :
       {Case{256, 128, {1025, 6152, 1040}}, Case{128, 192, {1100, 5512, 1040}}, Case{128, 128, {1400, 6016, 640}}}) {
    const GemmTile tile = plan_tile(GemmFamily::kInt4, s.m, s.n, s.k, 90, 132);
    EXPECT_EQ(std::pair(tile.block_m, tile.block_n), std::pair(block_m, block_n));
    const Matrix a(random, int4, Layout::kEvenOdd, s.m, s.k), a8(random, int8, Layout::kValues, s.m, s.k);
    const Matrix w(random, int4, Layout::kPacked, s.n, s.k), w8(random, int8, Layout::kCodes, s.n, s.k);
    check_product(kInt4, a, w, s.m, s.n, s.k, DType::kBFloat16);
    check_product(kInt4, a8, w, s.m, s.n, s.k, DType::kFloat16);
    check_product(kInt8, a8, w8, s.m, s.n, s.k, DType::kBFloat16);
    const Matrix kept(random, int4, Layout::kPacked, s.n, s.k, Fill::kRandom, true);
    check_product(kSparse, a, kept, s.m, s.n, s.k, DType::kBFloat16);
  }
  for (const auto& [bits, s] : {std::pair{1, Shape{1025, 9608, 8200}}, std::pair{2, Shape{1025, 9608, 2056}}}) {
    EXPECT_EQ(plan_tile(GemmFamily::kPlanes, s.m, s.n, s.k, 90, 132).block_m, 256);
    const Matrix a(random, {GridKind::kInt, bits}, Layout::kPlanes, s.m, s.k), w(random, {GridKind::kInt, bits}, Layout::kPlanes, s.n, s.k);
    check_product(kPlanes, a, w, s.m, s.n, s.k, DType::kBFloat16);
  }
}

// Rows of w that stay in shared memory while the tiles of a thread block cross from one block of them to the next: never, once, at every
// other tile; K of one chunk, of as many as fit, and of more.
TEST_F(Gemm, TensorCopiesOfBitsThatStay) {
  Random random(35);
  const Grid int1{GridKind::kInt, 1};
  for (const Shape& s :
       {Shape{65, 32, 144}, Shape{1025, 9632, 4096}, Shape{2600, 4128, 2064}, Shape{66, 70016, 1024}, Shape{130, 20000, 6160},
        Shape{4000, 288, 3088}, Shape{300, 544, 16400}, Shape{300, 520, 2064}, Shape{1025, 2112, 11008}, Shape{700, 4128, 10000}}) {
    const Matrix a(random, int1, Layout::kPlanes, s.m, s.k), w(random, int1, Layout::kPlanes, s.n, s.k);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      check_product(kPlanes, a, w, s.m, s.n, s.k, dtype, dtype != DType::kFloat16);
    }
  }
}

TEST_F(Gemm, TensorCopiesOfEveryPairOfGrids) {
  Random random(33);
  const Shape s{33, 72, 144};
  const Grid int8{GridKind::kInt, 8}, int_zero8{GridKind::kIntZero, 8}, int4{GridKind::kInt, 4}, fp4{GridKind::kFp4, 4};
  for (const Grid a_grid : {int8, int_zero8, int4, fp4}) {
    const Matrix values(random, a_grid, Layout::kValues, s.m, s.k), codes(random, a_grid, Layout::kCodes, s.m, s.k),
        even_odd(random, a_grid, Layout::kEvenOdd, s.m, s.k);
    for (const Grid w_grid : testing::all_grids()) {
      if (!has_values(w_grid)) continue;
      for (const Layout layout : {Layout::kPacked, Layout::kCodes, Layout::kValues}) {
        if (layout == Layout::kPacked && w_grid.bits > 4) continue;
        const Matrix w(random, w_grid, layout, s.n, s.k);
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
          for (const Matrix* a : {&values, &codes}) check_product(layout == Layout::kPacked ? kInt4 : kInt8, *a, w, s.m, s.n, s.k, dtype);
          if (layout == Layout::kPacked) check_product(kInt4, even_odd, w, s.m, s.n, s.k, dtype);
        }
      }
    }
  }
}

// Kernels that start before their predecessor in the stream has ended must wait for what it writes, and not overwrite what it reads: codes
// that one writes and the next reads, in the same memory each time.
TEST_F(Gemm, LaunchesThatOverlap) {
  Random random(35);
  const int64_t n = 520, k = 2048;
  constexpr int kRounds = 40;
  const Quantizer quantizer = parse_quantizer("int4-hadamard-ste");
  const Matrix w(random, quantizer.grid, Layout::kPacked, n, k);
  for (const auto& [m, layout] : {std::pair<int64_t, Layout>{16, Layout::kPacked}, {40, Layout::kPacked}, {300, Layout::kEvenOdd}}) {
    SCOPED_TRACE(concat(m, " rows"));
    std::vector<std::unique_ptr<OnDevice<uint8_t>>> x, expected, streamed, captured;
    for (int i = 0; i < kRounds; ++i) {
      x.push_back(std::make_unique<OnDevice<uint8_t>>(testing::to_dtype(random.normals(m * k), DType::kBFloat16)));
      for (auto* y : {&expected, &streamed, &captured}) y->push_back(std::make_unique<OnDevice<uint8_t>>(2 * m * n));
    }
    const OnDevice<uint8_t> codes(m * row_bytes(layout, k));
    const OnDevice<float> scale(m);
    const OnDevice<int32_t> code_sum(m);
    auto round = [&, m = m, layout = layout](int i, const OnDevice<uint8_t>& y, cudaStream_t stream) {
      cuda::quantize(quantizer, layout, x[i]->data(), DType::kBFloat16, m, k,
                     {codes.data(), scale.data(), code_sum.data(), nullptr, nullptr}, stream);
      const Operand a{quantizer.grid, layout, codes.data(), scale.data(), code_sum.data()};
      cuda::gemm_int4(a, w.device(), nullptr, y.data(), DType::kBFloat16, m, n, k, stream);
    };
    for (int i = 0; i < kRounds; ++i) {
      round(i, *expected[i], nullptr);
      testing::cuda_ok(cudaDeviceSynchronize());
    }
    const testing::Stream stream;
    for (int i = 0; i < kRounds; ++i) round(i, *streamed[i], stream);
    testing::cuda_ok(cudaStreamSynchronize(stream));
    testing::run_captured([&](cudaStream_t capturing) {
      for (int i = 0; i < kRounds; ++i) round(i, *captured[i], capturing);
    });
    for (int i = 0; i < kRounds; ++i) {
      EXPECT_TRUE(bitwise_equal(expected[i]->host(), streamed[i]->host(), 2 * n)) << "round " << i;
      EXPECT_TRUE(bitwise_equal(expected[i]->host(), captured[i]->host(), 2 * n)) << "round " << i;
    }
  }
}

TEST_F(Gemm, TensorCopiesOfExtremeCodes) {
  Random random(31);
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8}, int2{GridKind::kInt, 2};
  const int64_t n = 200, k = 32768;
  for (const int64_t m : {9, 50, 130, 300}) {
    for (const Fill fill_a : {Fill::kTop, Fill::kBottom}) {
      for (const Fill fill_w : {Fill::kTop, Fill::kBottom}) {
        const Matrix a8(random, int8, Layout::kValues, m, k, fill_a), w8(random, int8, Layout::kCodes, n, k, fill_w);
        check_product(kInt8, a8, w8, m, n, k);
        const Matrix w4(random, int4, Layout::kPacked, n, k, fill_w);
        check_product(kInt4, a8, w4, m, n, k);
        check_product(kInt4, Matrix(random, int8, Layout::kEvenOdd, m, k, fill_a), w4, m, n, k);
        check_product(kPlanes, Matrix(random, int2, Layout::kPlanes, m, k, fill_a), Matrix(random, int2, Layout::kPlanes, n, k, fill_w), m,
                      n, k);
      }
    }
  }
}

TEST_F(Gemm, AnyAddressOfUnpaddedRows) {
  Random random(8);
  const Grid int7{GridKind::kInt, 7}, int4{GridKind::kInt, 4};
  for (const int64_t m : {4, 30}) {
    const Matrix a(random, int7, Layout::kValues, m, 128, Fill::kRandom, false, 3),
        w(random, int7, Layout::kCodes, 40, 128, Fill::kRandom, false, 5);
    check_product(kInt8, a, w, m, 40, 128);
    const Matrix codes(random, int4, Layout::kCodes, m, 128, Fill::kRandom, false, 3), packed(random, int4, Layout::kPacked, 40, 128);
    check_product(kInt4, codes, packed, m, 40, 128);
  }
}

TEST_F(Gemm, RowsWithoutNumbersAreNan) {
  const int64_t m = 20, n = 40, k = 64;
  Random random(9);
  const Grid int4{GridKind::kInt, 4};
  const Matrix w(random, int4, Layout::kPacked, n, k);
  const OnDevice<uint8_t> codes(std::vector<uint8_t>(m * packed_row_bytes(k), 0));
  std::vector<float> scale(m, 1.0f);
  scale[3] = NAN;
  const OnDevice<float> device_scale(scale), y(m * n);
  const OnDevice<int32_t> code_sum(std::vector<int32_t>(m, 0));
  cuda::gemm_int4({int4, Layout::kPacked, codes.data(), device_scale.data(), code_sum.data()}, w.device(), nullptr, y.data(),
                  DType::kFloat32, m, n, k, nullptr);
  const std::vector<float> got = y.host();
  for (int64_t i = 0; i < m * n; ++i) EXPECT_EQ(std::isnan(got[i]), i / n == 3) << "row " << i / n << ", column " << i % n;
}

TEST_F(Gemm, EmptyProducts) {
  Random random(10);
  const Grid int4{GridKind::kInt, 4}, int2{GridKind::kInt, 2};
  for (const int64_t m : {3, 18}) {
    const Matrix a(random, int4, Layout::kPacked, m, 0), w(random, int4, Layout::kPacked, 20, 0);
    check_product(kInt4, a, w, m, 20, 0);
    const Matrix b(random, int2, Layout::kPlanes, m, 0), v(random, int2, Layout::kPlanes, 20, 0);
    check_product(kPlanes, b, v, m, 20, 0);
  }
  const Operand none{int4, Layout::kPacked, nullptr, nullptr, nullptr};
  cuda::gemm_int4(none, none, nullptr, nullptr, DType::kFloat32, 0, 5, 64, nullptr);
  cuda::gemm_int4(none, none, nullptr, nullptr, DType::kFloat32, 5, 0, 64, nullptr);
}

TEST_F(Gemm, SameBitsOnAnyStreamAndInAGraph) {
  Random random(11);
  const Grid int4{GridKind::kInt, 4};
  for (const int64_t m : {6, 50, 100, 300}) {
    const int64_t n = 90, k = 2048;
    const Matrix a(random, int4, Layout::kValues, m, k), w(random, int4, Layout::kPacked, n, k);
    const OnDevice<float> expected(m * n), streamed(m * n), captured(m * n);
    auto multiply = [&](const OnDevice<float>& y, cudaStream_t stream) {
      cuda::gemm_int4(a.device(), w.device(), nullptr, y.data(), DType::kFloat32, m, n, k, stream);
    };
    multiply(expected, nullptr);
    const testing::Stream stream;
    multiply(streamed, stream);
    testing::run_captured([&](cudaStream_t capturing) { multiply(captured, capturing); });
    EXPECT_TRUE(bitwise_equal(expected.host(), streamed.host(), n));
    EXPECT_TRUE(bitwise_equal(expected.host(), captured.host(), n));
  }
}

TEST_F(Gemm, RejectsWhatItCannotMultiply) {
  const Grid int4{GridKind::kInt, 4}, int8{GridKind::kInt, 8}, gauss{GridKind::kGauss, 4};
  auto text = [](GpuGemm gemm, Grid a, Layout layout_a, Grid w, Layout layout_w, int64_t k, uintptr_t address = 0) {
    return error_text([&] {
      const void* data = reinterpret_cast<const void*>(address);
      gemm({a, layout_a, data, nullptr, nullptr}, {w, layout_w, data, nullptr, nullptr}, nullptr, nullptr, DType::kFloat32, 1, 1, k,
           nullptr);
    });
  };
  EXPECT_CONTAINS(text(cuda::gemm_int8, int4, Layout::kPacked, int4, Layout::kValues, 64),
                  "gemm_int8: expected a in layout values or codes, got packed");
  EXPECT_CONTAINS(text(cuda::gemm_int8, gauss, Layout::kCodes, int4, Layout::kValues, 64), "grid with integer values, got gauss4");
  EXPECT_CONTAINS(text(cuda::gemm_int8, int8, Layout::kCodes, int8, Layout::kCodes, 33026), "expected k <= 33025");
  EXPECT_CONTAINS(text(cuda::gemm_int4, int4, Layout::kPacked, int4, Layout::kValues, 64), "expected w in layout packed");
  EXPECT_CONTAINS(text(cuda::gemm_int4, int4, Layout::kPacked, int4, Layout::kPacked, 64, 8), "multiple of 16 bytes");
  EXPECT_CONTAINS(text(cuda::gemm_planes, {GridKind::kInt, 5}, Layout::kPlanes, int4, Layout::kPlanes, 64), "1 to 4 bits");
  EXPECT_CONTAINS(text(cuda::gemm_sparse, int4, Layout::kPacked, int4, Layout::kPacked, 64), "4:8 index");
}

TEST_F(GemmWeightOnly, EveryGridAndLayout) {
  Random random(20);
  for (const Grid grid : testing::all_grids()) {
    for (const Layout layout : {Layout::kCodes, Layout::kPacked, Layout::kPlanes}) {
      if (layout == Layout::kPacked && grid.bits > 4) continue;
      for (const DType dtype : testing::kDTypes) {
        check_weight_only(random, grid, layout, dtype, 5, 40, 136);
        check_weight_only(random, grid, layout, dtype, 20, 40, 136);
      }
    }
  }
}

TEST_F(GemmWeightOnly, EveryShape) {
  Random random(21);
  for (const Shape& s : kShapes) {
    for (const DType dtype : testing::kDTypes) {
      check_weight_only(random, {GridKind::kInt, 4}, Layout::kPacked, dtype, s.m, s.n, s.k);
      check_weight_only(random, {GridKind::kInt, 5}, Layout::kCodes, dtype, s.m, s.n, s.k, 4);
    }
  }
  check_weight_only(random, {GridKind::kInt, 2}, Layout::kPlanes, DType::kBFloat16, 3, 32, 32768);
  for (const int64_t m : {3, 17}) check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, DType::kBFloat16, m, 40, 32776);
  // One pass over K and several, of slices that are whole and are not; several units a team.
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 8, 9, 16}) {
      for (const int64_t k : {1000, 4096, 11008}) {
        check_weight_only(random, {GridKind::kInt, 4}, Layout::kPacked, dtype, m, k == 1000 ? 5000 : 72, k);
        check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, m, 72, k);
        check_weight_only(random, {GridKind::kInt, 3}, Layout::kPlanes, dtype, m, 72, k);
        check_weight_only(random, {GridKind::kGauss, 4}, Layout::kPacked, dtype, m, 72, k);
        // Sums of int8, of twice the values, reach float16's infinity.
        const GridKind bytes = dtype == DType::kFloat16 ? GridKind::kIntZero : GridKind::kInt;
        check_weight_only(random, {bytes, 8}, Layout::kCodes, dtype, m, 72, k);
      }
      // Of rows in registers (2 bits): teams of four and of two warps, and some of them without rows of w.
      for (const int32_t bits : {1, 2}) {
        check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, m, 5000, 1000);
        check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, m, 20011, 200);
      }
    }
  }
  check_weight_only(random, {GridKind::kInt, 4}, Layout::kPacked, DType::kFloat32, 3, 32, 0);
  check_weight_only(random, {GridKind::kInt, 4}, Layout::kPacked, DType::kBFloat16, 30, 32, 0);
}

// x in registers: every way of sharing K and the rows of w.
TEST_F(GemmWeightOnly, HeldRows) {
  Random random(26);
  const Grid int4{GridKind::kInt, 4}, ternary{GridKind::kTernary, 2}, int8{GridKind::kIntZero, 8};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 7, 8, 9, 16, 17}) {
      for (const int64_t k : {16, 136, 512, 520, 1040, 2056, 4104, 5632}) {
        check_weight_only(random, {GridKind::kInt, 2}, Layout::kPlanes, dtype, m, 67, k);
        check_weight_only(random, ternary, Layout::kPacked, dtype, m, 33, k);
        check_weight_only(random, int4, Layout::kPacked, dtype, m, 1, k);
        if (k % 16 == 0) check_weight_only(random, int8, Layout::kCodes, dtype, m, 50, k);
      }
    }
    check_weight_only(random, int4, Layout::kPacked, dtype, 5, 12001, 520);   // two blocks a multiprocessor
    check_weight_only(random, int4, Layout::kPacked, dtype, 9, 17001, 4104);  // sums between passes: more blocks than multiprocessors
    check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, 64, 200, 1024);
  }
}

// x as fixed-point numbers on wgmma: one block and several that share K, one tile a block and several, groups of rows.
TEST_F(GemmWeightOnly, FixedPoint) {
  Random random(27);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const auto& [m, n, k] : {Shape{17, 70, 40},
                                  {33, 300, 520},
                                  {70, 130, 2056},
                                  {250, 70, 1032},
                                  {5, 4100, 2056},
                                  {8, 800, 11000},
                                  {9, 600, 16384},
                                  {12, 17001, 520}}) {
      for (const int32_t bits : {1, 2, 3}) check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, m, n, k);
      for (const Grid grid : {Grid{GridKind::kInt, 4}, Grid{GridKind::kFp4, 4}})
        check_weight_only(random, grid, Layout::kPacked, dtype, m, n, k);
      const GridKind bytes = dtype == DType::kFloat16 ? GridKind::kIntZero : GridKind::kInt;  // or sums reach float16's infinity
      check_weight_only(random, {bytes, 8}, Layout::kCodes, dtype, m, n, k / 16 * 16);
    }
  }
}

// x as fixed-point bits of fewer than 8 rows: every number of them, row lengths that end anywhere in a unit, and as long as they fit; more
// tiles of w in a thread block than it has warps.
TEST_F(GemmWeightOnly, FewRowsByOnePlane) {
  Random random(23);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 2, 3, 4}) {
      for (const int64_t k : {8, 136, 1024, 4096, 11008}) {
        for (const int64_t n : {1, 17, 4000}) check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, m, n, k);
      }
      check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, m, 40, 32768);
    }
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 2, 4}) check_extremes(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, m, 70, 1032);
  }
  check_weight_only(random, {GridKind::kInt, 1}, Layout::kPlanes, DType::kBFloat16, 3, 160000, 1032);
  // Clusters of 3, 5 and 6 blocks, on 132 multiprocessors.
  for (const int64_t m : {8, 16, 27}) {
    for (const auto& [k, cluster] : {std::pair<int64_t, int32_t>{2056, 3}, {4104, 5}, {5632, 6}, {11008, 6}}) {
      const Grid bit{GridKind::kInt, 1};
      EXPECT_EQ(plan_fixed_split(bit, Layout::kPlanes, m, 700, k, 132).cluster, cluster);
      check_weight_only(random, bit, Layout::kPlanes, DType::kBFloat16, m, 700, k);
    }
  }
}

// Numbers of at least 2^-7 of the largest are exact: sums of them are those of integers.
TEST_F(GemmWeightOnly, FixedPointIsExactForLargeNumbers) {
  Random random(24);
  const Grid grid{GridKind::kInt, 1};
  const int64_t m = 3, n = 64, k = 2048;
  const Matrix w(random, grid, Layout::kPlanes, n, k);
  std::vector<uint8_t> codes(n * k);
  unpack(grid, Layout::kPlanes, static_cast<const uint8_t*>(w.host().data), codes.data(), n, k, serial_for);
  std::vector<float> x(m * k, 0.0f);
  for (int64_t i = 0; i < 2 * k; ++i) x[i] = (i < k ? 0.25f : 1.0f) * static_cast<float>(i * 37 % 256 - 128);  // the last row: zeros
  const OnDevice<uint8_t> device_x(testing::to_dtype(x, DType::kBFloat16)), y(m * n * 2);
  cuda::gemm_weight_only(device_x.data(), w.device(), nullptr, y.data(), DType::kBFloat16, m, n, k, nullptr);
  const std::vector<uint8_t> got = y.host();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += static_cast<double>(x[i * k + l]) * (2 * codes[j * k + l] - 1);
      const float expected = static_cast<float>(sum) * w.host().scale[j];
      // One rounding to bfloat16, 2^-8, and two of float32.
      const float tolerance = std::abs(expected) * (0x1p-8f + 0x1p-22f);
      EXPECT_NEAR(testing::element(got, DType::kBFloat16, i * n + j), expected, tolerance) << i << ", " << j;
    }
  }
}

TEST_F(GemmWeightOnly, RowsWithoutNumbersStayAlone) {
  Random random(25);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {4, 20}) {
      check_rows_without_numbers(random, {GridKind::kInt, 1}, Layout::kPlanes, dtype, m, 40, 512);
      check_rows_without_numbers(random, {GridKind::kInt, 4}, Layout::kPacked, dtype, m, 40, 1544);
    }
  }
}

TEST_F(GemmWeightOnly, WholeNumbersAreExact) {
  Random random(29);
  for (const auto& [m, n, k] : {Shape{20, 200, 2056}, Shape{5, 4100, 2056}}) {
    ASSERT_TRUE(plan_fixed({GridKind::kInt, 1}, Layout::kPlanes, m, n, k));
    for (const int32_t bits : {1, 2, 3}) check_whole_numbers(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kBFloat16, m, n, k);
    for (const Grid grid : {Grid{GridKind::kInt, 4}, Grid{GridKind::kFp4, 4}}) {
      check_whole_numbers(random, grid, Layout::kPacked, DType::kBFloat16, m, n, k);
    }
    check_whole_numbers(random, {GridKind::kInt, 8}, Layout::kCodes, DType::kBFloat16, m, n, 2048);
  }
}

// More rows than become fixed-point numbers: weights are widened on their way to the tensor cores. Every tile, and several a block.
TEST_F(GemmWeightOnly, ManyRows) {
  Random random(32);
  struct Case {
    Shape shape;
    int32_t block_m, block_n;  // on 132 multiprocessors
  };
  for (const auto& [s, block_m, block_n] :
       {Case{{257, 70, 224}, 128, 128}, Case{{300, 264, 136}, 128, 128}, Case{{520, 200, 1152}, 128, 128}, Case{{70, 24600, 64}, 128, 192},
        Case{{2050, 2050, 72}, 128, 192}, Case{{2040, 2030, 72}, 256, 128}}) {
    const cuda::Device device = cuda::current_device("ManyRows");
    if (device.hopper_code && device.sm_count == 132) {
      const GemmTile tile = plan_widened_tile(s.m, s.n, s.k, device.sm_count);
      EXPECT_EQ(std::pair(tile.block_m, tile.block_n), std::pair(block_m, block_n));
      EXPECT_TRUE(plan_widened({GridKind::kInt, 4}, Layout::kPacked, s.m, s.n, s.k / 32 * 32, device.sm_count));
    }
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (const int32_t bits : {1, 2, 3}) check_weight_only(random, {GridKind::kInt, bits}, Layout::kPlanes, dtype, s.m, s.n, s.k);
      check_weight_only(random, {GridKind::kInt, 4}, Layout::kPacked, dtype, s.m, s.n, s.k / 32 * 32);
      check_weight_only(random, {GridKind::kInt, 8}, Layout::kCodes, dtype, s.m, s.n, s.k / 16 * 16);
    }
  }
  for (const Grid grid : {Grid{GridKind::kIntZero, 4}, Grid{GridKind::kTernary, 2}}) {
    check_weight_only(random, grid, Layout::kPacked, DType::kBFloat16, 300, 264, 96);
  }
  for (const Grid grid : {Grid{GridKind::kInt, 7}, Grid{GridKind::kIntZero, 8}}) {
    check_weight_only(random, grid, Layout::kCodes, DType::kFloat16, 300, 264, 96);
  }
}

TEST_F(GemmWeightOnly, Extremes) {
  Random random(28);
  for (const int64_t m : {8, 24}) {
    check_extremes(random, {GridKind::kInt, 1}, Layout::kPlanes, DType::kFloat16, m, 70, 2048);  // of wider weights sums are too large
    for (const int32_t bits : {1, 2, 3}) check_extremes(random, {GridKind::kInt, bits}, Layout::kPlanes, DType::kBFloat16, m, 70, 2048);
    for (const Grid grid : {Grid{GridKind::kInt, 4}, Grid{GridKind::kFp4, 4}}) {
      check_extremes(random, grid, Layout::kPacked, DType::kBFloat16, m, 70, 2048);
    }
    for (const Grid grid : {Grid{GridKind::kInt, 7}, Grid{GridKind::kInt, 8}, Grid{GridKind::kIntZero, 8}}) {
      check_extremes(random, grid, Layout::kCodes, DType::kBFloat16, m, 70, 2048);
    }
  }
}

TEST_F(GemmWeightOnly, RunsInAGraph) {
  Random random(22);
  const int64_t n = 70, k = 512;
  const Matrix w(random, {GridKind::kGauss, 4}, Layout::kPacked, n, k);
  for (const int64_t m : {2, 40}) {
    const OnDevice<uint8_t> x(testing::to_dtype(random.normals(m * k), DType::kBFloat16)), direct(2 * m * n), captured(2 * m * n);
    cuda::gemm_weight_only(x.data(), w.device(), nullptr, direct.data(), DType::kBFloat16, m, n, k, nullptr);
    testing::run_captured([&](cudaStream_t stream) {
      cuda::gemm_weight_only(x.data(), w.device(), nullptr, captured.data(), DType::kBFloat16, m, n, k, stream);
    });
    EXPECT_TRUE(bitwise_equal(direct.host(), captured.host(), 2 * n));
  }
}

}  // namespace
}  // namespace quest
