#include "quest/rotation.h"
#include "testing.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::error_text;

// Entry of the Sylvester matrix over sqrt(block).
double entry(int64_t i, int64_t j, int64_t block) {
  return (__builtin_popcountll(static_cast<uint64_t>(i & j)) & 1 ? -1 : 1) / std::sqrt(static_cast<double>(block));
}

std::vector<float> rotated(const std::vector<float>& x, int64_t rows, int64_t block) {
  std::vector<float> y(x.size());
  hadamard(x.data(), y.data(), DType::kFloat32, rows, static_cast<int64_t>(x.size()) / rows, block, serial_for);
  return y;
}

TEST(Rotation, IsTheDenseProduct) {
  testing::for_each_isa([](Isa) {
    for (int64_t block = 1; block <= kMaxHadamardBlock; block *= 2) {
      const int64_t k = block * (block < 64 ? 7 : 1);
      const std::vector<float> x = testing::Random(block).normals(2 * k);
      const std::vector<float> y = rotated(x, 2, block);
      double norm = 0;
      for (int64_t i = 0; i < 2 * k; ++i) norm = std::max(norm, std::abs(static_cast<double>(x[i])));
      // log2(B) additions, each with half a unit of rounding relative to the running sums, which grow like sqrt of their length.
      const double tolerance = (std::log2(static_cast<double>(block)) + 2) * 0x1p-24 * norm * 2;
      const int64_t stride = block > 2048 ? 331 : 1;  // some columns of the large ones
      for (int64_t i = 0; i < 2 * k; i += stride) {
        const int64_t base = i / block * block;
        double sum = 0;
        for (int64_t j = 0; j < block; ++j) sum += x[base + j] * entry(j, i - base, block);
        ASSERT_NEAR(y[i], sum, tolerance) << "block " << block << ", element " << i;
      }
    }
  });
}

TEST(Rotation, IsItsOwnInverseAndKeepsTheNorm) {
  testing::for_each_isa([](Isa) {
    for (int64_t block = 1; block <= kMaxHadamardBlock; block *= 2) {
      const std::vector<float> x = testing::Random(block).normals(3 * block);
      const std::vector<float> y = rotated(x, 3, block);
      const std::vector<float> z = rotated(y, 3, block);
      double before = 0, after = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        before += static_cast<double>(x[i]) * x[i];
        after += static_cast<double>(y[i]) * y[i];
        ASSERT_NEAR(z[i], x[i], 4e-6) << "block " << block;
      }
      EXPECT_NEAR(after / before, 1, 1e-6);
    }
  });
}

TEST(Rotation, EveryInstructionSetAndThreadCountRoundsAlike) {
  const int64_t rows = 13, k = 3 * 512;
  const std::vector<float> x = testing::Random(3).normals(rows * k);
  for (const int64_t block : {1, 2, 8, 64, 128, 256, 512}) {
    std::vector<float> expected;
    testing::for_each_isa([&](Isa) {
      const std::vector<float> y = rotated(x, rows, block);
      if (expected.empty()) expected = y;
      EXPECT_TRUE(bitwise_equal(expected, y, k));
      std::vector<float> threaded = x;  // in place
      hadamard(threaded.data(), threaded.data(), DType::kFloat32, rows, k, block, testing::threads_for(4));
      EXPECT_TRUE(bitwise_equal(expected, threaded, k));
    });
  }
}

TEST(Rotation, SixteenBitTypesRoundOnce) {
  const int64_t rows = 3, k = 384;
  const std::vector<float> x = testing::Random(4).normals(rows * k);
  testing::for_each_isa([&](Isa) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const std::vector<uint8_t> data = testing::to_dtype(x, dtype);
      std::vector<float> wide(x.size());
      for (size_t i = 0; i < wide.size(); ++i) wide[i] = testing::element(data, dtype, i);
      const std::vector<float> expected = rotated(wide, rows, 128);
      std::vector<uint8_t> y(data.size());
      hadamard(data.data(), y.data(), dtype, rows, k, 128, serial_for);
      for (size_t i = 0; i < wide.size(); ++i) {
        ASSERT_NEAR(testing::element(y, dtype, i), expected[i], std::abs(expected[i]) * testing::rounding(dtype) + 1e-7);
      }
    }
  });
}

// Halfway cases, subnormals, overflow and NaN, which a copy (block 1) shows.
TEST(Rotation, ConversionsRoundToNearestEven) {
  testing::for_each_isa([](Isa) {
    std::vector<uint16_t> all(65536), back(65536);
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      hadamard(all.data(), back.data(), dtype, 1, 65536, 1, serial_for);
      const int infinity = dtype == DType::kFloat16 ? 0x7C00 : 0x7F80;
      for (int i = 0; i < 65536; ++i) {
        if ((i & 0x7FFF) > infinity) {
          ASSERT_GT(back[i] & 0x7FFF, infinity) << i;
        } else {
          ASSERT_EQ(back[i], i);
        }
      }
    }
  });
}

TEST(Rotation, Errors) {
  float x[12] = {};
  const auto error = [&](int64_t k, int64_t block) {
    return error_text([&] { hadamard(x, x, DType::kFloat32, 1, k, block, serial_for); });
  };
  EXPECT_CONTAINS(error(12, 8), "expected block to divide the last dimension, got block 8 and last dimension 12; use a divisor, at most 4");
  EXPECT_CONTAINS(error(12, 3), "power of two from 1 to 32768, got 3");
  EXPECT_CONTAINS(error(12, 0), "got 0");
  EXPECT_CONTAINS(error(65536, 65536), "got 65536");
  EXPECT_EQ(error(0, 4), "");
}

}  // namespace
}  // namespace quest
