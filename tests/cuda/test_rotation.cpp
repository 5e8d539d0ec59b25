// The GPU rotation against the CPU's. Both add in the same order and round alike, so the bits are equal.
#include "gpu.h"
#include "quest/cuda/rotation.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::error_text;
using testing::OnDevice;
using testing::Random;

class Rotation : public testing::GpuTest {};

std::vector<uint8_t> reference(const std::vector<uint8_t>& x, DType dtype, int64_t rows, int64_t k, int64_t block) {
  std::vector<uint8_t> y(x.size());
  hadamard(x.data(), y.data(), dtype, rows, k, block, serial_for);
  return y;
}

TEST_F(Rotation, EqualsTheCpuForEveryBlock) {
  Random random(1);
  for (const DType dtype : testing::kDTypes) {
    for (int64_t block = 1; block <= kMaxHadamardBlock; block *= 2) {
      const int64_t k = block >= 1024 ? block : block * 3;
      const int64_t rows = block >= 8192 ? 2 : 7;
      const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * k), dtype);
      for (const int64_t offset : {0, 4}) {
        const OnDevice<uint8_t> in(x, offset), out(static_cast<int64_t>(x.size()), offset);
        cuda::hadamard(in.data(), out.data(), dtype, rows, k, block, nullptr);
        EXPECT_TRUE(bitwise_equal(reference(x, dtype, rows, k, block), out.host(), k * element_size(dtype)))
            << "block " << block << ", offset " << offset << ", dtype " << static_cast<int>(dtype);
      }
    }
  }
}

TEST_F(Rotation, WorksInPlaceOnAnyStreamAndInAGraph) {
  Random random(2);
  const int64_t rows = 5, k = 4096;
  const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * k), DType::kBFloat16);
  const std::vector<uint8_t> expected = reference(x, DType::kBFloat16, rows, k, 4096);
  {
    const testing::Stream stream;
    const OnDevice<uint8_t> both(x);
    cuda::hadamard(both.data(), both.data(), DType::kBFloat16, rows, k, 4096, stream);
    EXPECT_TRUE(bitwise_equal(expected, both.host(), 2 * k));
  }
  const OnDevice<uint8_t> in(x), out(static_cast<int64_t>(x.size()));
  testing::run_captured([&](cudaStream_t stream) { cuda::hadamard(in.data(), out.data(), DType::kBFloat16, rows, k, 4096, stream); });
  EXPECT_TRUE(bitwise_equal(expected, out.host(), 2 * k));
}

TEST_F(Rotation, ManyRowsAndNone) {
  Random random(3);
  const int64_t rows = 300, k = 384;
  const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * k), DType::kFloat16);
  const OnDevice<uint8_t> in(x), out(static_cast<int64_t>(x.size()));
  cuda::hadamard(in.data(), out.data(), DType::kFloat16, rows, k, 128, nullptr);
  EXPECT_TRUE(bitwise_equal(reference(x, DType::kFloat16, rows, k, 128), out.host(), 2 * k));
  cuda::hadamard(nullptr, nullptr, DType::kFloat32, 0, 128, 128, nullptr);
}

// More blocks than thread blocks that fit the GPU at once, and a number that no thread block's share divides.
TEST_F(Rotation, ManyBlocksOfEverySize) {
  Random random(4);
  for (int64_t block = 128; block <= kMaxHadamardBlock; block *= 2) {
    const int64_t rows = block >= 16384 ? 301 : 37;
    const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * block), DType::kBFloat16);
    const OnDevice<uint8_t> both(x);
    cuda::hadamard(both.data(), both.data(), DType::kBFloat16, rows, block, block, nullptr);
    EXPECT_TRUE(bitwise_equal(reference(x, DType::kBFloat16, rows, block, block), both.host(), 2 * block)) << "block " << block;
  }
}

TEST_F(Rotation, RejectsBlocksThatDoNotFit) {
  EXPECT_CONTAINS(
      error_text([] { cuda::hadamard(nullptr, nullptr, DType::kFloat32, 1, 96, 64, nullptr); }),
      "hadamard: expected block to divide the last dimension, got block 64 and last dimension 96; use a divisor, at most 32, or "
      "leave it out for the default");
  EXPECT_CONTAINS(error_text([] { cuda::hadamard(nullptr, nullptr, DType::kFloat32, 1, 96, 3, nullptr); }), "power of two");
}

}  // namespace
}  // namespace quest
