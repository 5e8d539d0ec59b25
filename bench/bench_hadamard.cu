// hadamard on the GPU against a plain copy of the same bytes. Prints CSV (bench.h). Results are compared with the CPU backend's, bit for
// bit, before anything is timed.
//
// bench_hadamard [DIM]: blocks of DIM values alone.
#include <cuda_bf16.h>

#include "bench.h"
#include "quest/cuda/rotation.h"
#include "quest/types.h"

namespace quest::bench {
namespace {

constexpr int64_t kValues = int64_t{16384} * 4096;
constexpr int64_t kCheckedBlocks = 4;

void serial(int64_t begin, int64_t end, int64_t, const RangeBody& body) { body(begin, end); }

void bench_dim(const Arena& arena, DType dtype, int64_t dim) {
  const int64_t rows = kValues / dim;
  const int64_t bytes = kValues * element_size(dtype);
  const int buffers = buffer_count(static_cast<double>(bytes));
  cuda::hadamard(arena.source, arena.target, dtype, kCheckedBlocks, dim, dim, nullptr);
  const std::vector<uint8_t> x = to_host(arena.source, kCheckedBlocks * dim * element_size(dtype));
  std::vector<uint8_t> expected(x.size());
  hadamard(x.data(), expected.data(), dtype, kCheckedBlocks, dim, dim, serial);
  expect(to_host(arena.target, static_cast<int64_t>(x.size())) == expected,
         "hadamard of " + std::to_string(dim) + ": other bits than the CPU's");
  const double moved = 2.0 * static_cast<double>(bytes);
  const Times copy = time_copy(arena, moved);
  const Times times = time_launches(
      [&](cudaStream_t stream, int i) {
        const int64_t offset = i % buffers * bytes;
        cuda::hadamard(arena.source + offset, arena.target + offset, dtype, rows, dim, dim, stream);
      },
      copy.us);
  print_row("hadamard", "quest", std::to_string(rows) + "x" + std::to_string(dim), dtype_name(dtype), times, moved, copy.us);
}

void run(int64_t only) {
  const Arena arena;
  print_header();
  fill_normal<__nv_bfloat16>(arena);
  for (int64_t dim = 128; dim <= kMaxHadamardBlock; dim *= 2) {
    if (only == 0 || only == dim) bench_dim(arena, DType::kBFloat16, dim);
  }
  fill_normal<float>(arena);
  for (const int64_t dim : {128, 4096, 32768}) {
    if (only == 0 || only == dim) bench_dim(arena, DType::kFloat32, dim);
  }
}

}  // namespace
}  // namespace quest::bench

int main(int argc, char** argv) {
  quest::bench::run(argc > 1 ? std::atoll(argv[1]) : 0);
  return 0;
}
