// pack and unpack on the GPU against the CPU's.
#include "rows.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::check_packing;
using testing::error_text;
using testing::OnDevice;
using testing::Random;

class Packing : public testing::GpuTest {};

TEST_F(Packing, EqualsTheCpuAndReturns) {
  Random random(1);
  for (const Grid grid : testing::all_grids()) {
    for (const Layout layout : {Layout::kPacked, Layout::kPlanes}) {
      if (layout == Layout::kPacked && grid.bits > 4) continue;
      for (const int64_t k : {1, 7, 8, 31, 128, 257, 1000}) {
        for (const int64_t offset : {0, 1}) check_packing(random, grid, layout, 5, k, offset);
      }
    }
  }
}

TEST_F(Packing, ReportsACodeThatDoesNotFit) {
  std::vector<uint8_t> codes(3 * 50, 2);
  codes[77] = 3;
  const OnDevice<uint8_t> in(codes), packed(3 * packed_row_bytes(50));
  const Grid ternary{GridKind::kTernary, 2};
  EXPECT_CONTAINS(error_text([&] { cuda::pack(ternary, Layout::kPacked, in.data(), packed.data(), 3, 50, nullptr); }),
                  "pack: expected codes from 0 to 2 for grid ternary, got 3 at row 1, column 27");
  EXPECT_CONTAINS(error_text([&] { cuda::pack({GridKind::kInt, 8}, Layout::kPacked, in.data(), packed.data(), 3, 50, nullptr); }),
                  "at most 4 bits");
  EXPECT_CONTAINS(error_text([&] { cuda::pack(ternary, Layout::kPacked, in.data(), packed.data() + 1, 3, 50, nullptr); }),
                  "multiple of 16 bytes");
}

TEST_F(Packing, UnpackRunsInAGraph) {
  Random random(2);
  const Grid grid{GridKind::kInt, 3};
  const int64_t rows = 4, k = 300;
  const std::vector<uint8_t> codes = random.codes(rows * k, 8);
  const OnDevice<uint8_t> in(codes), packed(3 * rows * plane_row_bytes(k)), back(rows * k);
  cuda::pack(grid, Layout::kPlanes, in.data(), packed.data(), rows, k, nullptr);
  testing::run_captured([&](cudaStream_t stream) { cuda::unpack(grid, Layout::kPlanes, packed.data(), back.data(), rows, k, stream); });
  EXPECT_TRUE(bitwise_equal(codes, back.host(), k));
}

}  // namespace
}  // namespace quest
