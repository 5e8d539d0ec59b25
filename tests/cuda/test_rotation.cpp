// The GPU rotation against the CPU's.
#include "rows.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::check_hadamard;
using testing::error_text;
using testing::hadamard_cpu;
using testing::OnDevice;
using testing::Random;

class Rotation : public testing::GpuTest {};

TEST_F(Rotation, EqualsTheCpuForEveryBlock) {
  Random random(1);
  for (const DType dtype : testing::kDTypes) {
    for (int64_t block = 1; block <= kMaxHadamardBlock; block *= 2) {
      const int64_t k = block >= 1024 ? block : block * 3;
      const int64_t rows = block >= 8192 ? 2 : 7;
      for (const int64_t offset : {0, 4}) check_hadamard(random, dtype, rows, k, block, offset);
    }
  }
}

TEST_F(Rotation, WorksInPlaceOnAnyStreamAndInAGraph) {
  Random random(2);
  const int64_t rows = 5, k = 4096;
  const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * k), DType::kBFloat16);
  const std::vector<uint8_t> expected = hadamard_cpu(x, DType::kBFloat16, rows, k, 4096);
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
  check_hadamard(random, DType::kFloat16, 300, 384, 128);
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
    EXPECT_TRUE(bitwise_equal(hadamard_cpu(x, DType::kBFloat16, rows, block, block), both.host(), 2 * block)) << "block " << block;
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
