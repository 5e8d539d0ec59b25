#include "quest/rotation.h"

#include "buffer.h"
#include "kernels.h"
#include "quest/check.h"

namespace quest {

void check_block(int64_t k, int64_t block) {
  check(block >= 1 && block <= kMaxHadamardBlock && (block & (block - 1)) == 0, "hadamard: expected block to be a power of two from 1 to ",
        kMaxHadamardBlock, ", got ", block, "; leave it out for the default");
  check(k % block == 0, "hadamard: expected block to divide the last dimension, got block ", block, " and last dimension ", k,
        "; use a divisor, at most ", k & -k, ", or leave it out for the default");
}

void hadamard(const void* x, void* y, DType dtype, int64_t rows, int64_t k, int64_t block, const ParallelFor& parallel_for) {
  check(rows >= 0 && k >= 0, "hadamard: expected a shape of sizes >= 0, got [", rows, ", ", k, "]");
  check_block(k, block);
  if (rows == 0 || k == 0) return;
  RotateTask task{};
  task.x = x;
  task.y = y;
  task.dtype = dtype;
  task.k = k;
  task.block = block;
  task.rotate_first = true;
  const Kernels& kernel = kernels();
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(round_up(k, kRowChunk));
    kernel.rotate_rows(task, begin, end, row.data());
  });
}

}  // namespace quest
