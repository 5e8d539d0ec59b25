#include "quest/grid.h"
#include "quest/packing.h"
#include "testing.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::error_text;

int64_t packed_bytes(Grid grid, Layout layout, int64_t rows, int64_t k) {
  return rows * row_bytes(layout, k) * (layout == Layout::kPlanes ? grid.bits : 1);
}

// By the definition, a bit at a time.
std::vector<uint8_t> pack_ref(Grid grid, Layout layout, const std::vector<uint8_t>& codes, int64_t rows, int64_t k) {
  std::vector<uint8_t> packed(packed_bytes(grid, layout, rows, k));
  const int64_t bytes = row_bytes(layout, k);
  for (int64_t i = 0; i < rows * k; ++i) {
    const int64_t row = i / k, column = i % k;
    if (layout == Layout::kPacked) packed[row * bytes + column / 2] |= codes[i] << (column % 2 * 4);
    if (layout == Layout::kPacked) continue;
    for (int32_t j = 0; j < grid.bits; ++j) packed[(j * rows + row) * bytes + column / 8] |= (codes[i] >> j & 1) << (column % 8);
  }
  return packed;
}

TEST(Packing, FollowsTheDefinitionAndComesBack) {
  testing::for_each_isa([](Isa) {
    for (const Grid grid : testing::all_grids()) {
      for (const Layout layout : {Layout::kPacked, Layout::kPlanes}) {
        if (layout == Layout::kPacked && grid.bits > 4) continue;
        for (const int64_t k : {1, 2, 31, 64, 65, 127, 128, 129, 255, 1000}) {
          const int64_t rows = 5;
          const std::vector<uint8_t> codes = testing::Random(k).codes(rows * k, level_count(grid));
          std::vector<uint8_t> packed(packed_bytes(grid, layout, rows, k), 0xAA);
          pack(grid, layout, codes.data(), packed.data(), rows, k, testing::threads_for(3));
          ASSERT_TRUE(bitwise_equal(pack_ref(grid, layout, codes, rows, k), packed, row_bytes(layout, k))) << to_string(grid) << " k " << k;
          std::vector<uint8_t> back(codes.size());
          unpack(grid, layout, packed.data(), back.data(), rows, k, testing::threads_for(3));
          ASSERT_TRUE(bitwise_equal(codes, back, k)) << to_string(grid) << " k " << k;
        }
      }
    }
  });
}

TEST(Packing, NamesTheFirstCodeOutOfRange) {
  testing::for_each_isa([](Isa) {
    const int64_t rows = 7, k = 5000;
    std::vector<uint8_t> codes(rows * k, 2);
    std::vector<uint8_t> packed(rows * packed_row_bytes(k));
    const auto error = [&] {
      return error_text(
          [&] { pack({GridKind::kTernary, 2}, Layout::kPacked, codes.data(), packed.data(), rows, k, testing::threads_for(3)); });
    };
    EXPECT_EQ(error(), "");
    codes[6 * k + 1] = 255;
    codes[4 * k + 4999] = 3;
    EXPECT_CONTAINS(error(), "pack: expected codes from 0 to 2 for grid ternary, got 3 at row 4, column 4999");
  });
}

TEST(Packing, Errors) {
  uint8_t byte[64] = {};
  EXPECT_CONTAINS(error_text([&] { pack({GridKind::kInt, 5}, Layout::kPacked, byte, byte, 1, 1, serial_for); }), "at most 4 bits");
  EXPECT_CONTAINS(error_text([&] { unpack({GridKind::kInt, 4}, Layout::kCodes, byte, byte, 1, 1, serial_for); }),
                  "unpack: expected layout packed or planes, got codes");
  EXPECT_EQ(error_text([&] { pack({GridKind::kInt, 4}, Layout::kPacked, nullptr, nullptr, 0, 4, serial_for); }), "");
  EXPECT_EQ(error_text([&] { pack({GridKind::kInt, 4}, Layout::kPacked, nullptr, nullptr, 4, 0, serial_for); }), "");
}

TEST(Packing, RowsArePaddedToSixteenBytes) {
  EXPECT_EQ(packed_row_bytes(33), 32);
  EXPECT_EQ(plane_row_bytes(129), 32);
  EXPECT_EQ(index_row_bytes(256), 16);
  EXPECT_EQ(row_bytes(Layout::kCodes, 33), 33);
  EXPECT_EQ(row_bytes(Layout::kEvenOdd, 64), 64);
  EXPECT_EQ(row_bytes(Layout::kEvenOdd, 65), 128);
}

}  // namespace
}  // namespace quest
