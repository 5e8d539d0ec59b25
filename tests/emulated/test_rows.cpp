// The kernels of operations on rows without a GPU (emulator.h), at short rows that reach their parts.
#include "emulator.h"
#include "rows.h"

namespace quest::testing {
namespace {

const Quantizer kInt4 = parse_quantizer("int4-hadamard-trust");

// Rows of whole blocks of 128 values: of as many warps as there can be, of several, and of one, several a thread block, which may not be
// full. (Long rows come first: shared memory that is not written then holds no zeros.)
TEST(EmulatedQuantize, WholeBlocks) {
  emulated::multiprocessors = 1;
  Random random(1);
  check_all_layouts(kInt4, random.normals(32768), DType::kBFloat16, 1, 32768, 0);
  for (const int64_t k : {5632, 1152}) check_all_layouts(kInt4, random.normals(2 * k), DType::kBFloat16, 2, k, 0);
  for (const PrologueKind kind : kPrologueKinds) {
    for (const int64_t k : {32768, 5632}) check_prologue_of_normals(kind, kInt4, DType::kBFloat16, 1, k, random);
    for (const int64_t k : {1152, 256}) {
      for (const DType dtype : kDTypes) check_prologue_of_normals(kind, kInt4, dtype, 2, k, random);
    }
  }
  for (const char* text : {"int4-hadamard-trust", "int1-hadamard-clip", "int2-none-trust", "int8-hadamard-trust0.1", "int1-none-trust"}) {
    for (const DType dtype : kDTypes) check_all_layouts(parse_quantizer(text), random.normals(11 * 384), dtype, 11, 384, 0);
  }
}

// More than two waves of thread blocks have kernels that do not prefetch.
TEST(EmulatedQuantize, ManyRowsAsFew) {
  emulated::multiprocessors = 1;
  Random random(2);
  auto check = [&](const char* text, DType dtype, PrologueKind kind) {
    check_many_rows_as_few(random, parse_quantizer(text), dtype, kind, 75, 3, 128);
  };
  for (const DType dtype : kDTypes) check("int4-hadamard-trust", dtype, PrologueKind::kNone);
  check("int4-none-trust", DType::kBFloat16, PrologueKind::kNone);
  for (const PrologueKind kind : kPrologueKinds) check("int4-hadamard-trust", DType::kBFloat16, kind);
}

// Ragged rows, sparsity, grids without equal steps, addresses that no vector may use; rows of one chunk a thread to eight, and such as are
// walked twice and three times.
TEST(EmulatedQuantize, AnyRow) {
  emulated::multiprocessors = 2;
  Random random(3);
  for (const int64_t k : {1, 6, 100, 264}) check_all_layouts(kInt4, random.normals(3 * k), DType::kFloat16, 3, k, 0);
  for (const char* text : {"int4-hadamard-4:8-trust", "fp4-hadamard-trust", "gauss3-none-trust0.4", "int_zero3-hadamard-4:8-clip"}) {
    check_all_layouts(parse_quantizer(text), random.normals(2 * 384), DType::kBFloat16, 2, 384, 0);
  }
  check_all_layouts(kInt4, random.normals(2 * 256), DType::kFloat32, 2, 256, 4);
  for (const int64_t k : {2056, 8200, 16392, 40000}) check_all_layouts(kInt4, random.normals(k), DType::kBFloat16, 1, k, 0);
  for (const PrologueKind kind : kPrologueKinds) {
    for (const int64_t k : {136, 8200}) check_prologue_of_normals(kind, kInt4, DType::kBFloat16, 1, k, random);
  }
}

TEST(EmulatedQuantize, RowsWithoutNumbers) {
  emulated::multiprocessors = 1;
  Random random(4);
  constexpr int64_t kK = 256;
  std::vector<float> values = random.normals(4 * kK);
  values[17] = NAN;
  values[1 * kK + 255] = INFINITY;
  for (int64_t j = 0; j < kK; ++j) values[2 * kK + j] = 0;
  for (const char* text : {"int4-hadamard-trust", "int1-hadamard-clip", "int2-hadamard-trust", "fp4-none-trust"}) {
    for (const DType dtype : kDTypes) check_all_layouts(parse_quantizer(text), values, dtype, 4, kK, 0);
  }
}

TEST(EmulatedRows, DequantizeAndBackward) {
  emulated::multiprocessors = 1;
  Random random(5);
  for (const char* text : {"int4-none-ste", "int1-hadamard-ste-original", "fp4-none-4:8-ste", "gauss3-none-ste"}) {
    const Quantizer quantizer = parse_quantizer(text);
    for (const Layout layout : layouts_of(quantizer)) {
      for (const int64_t k : {136, 512}) check_dequantize(random, quantizer, layout, DType::kBFloat16, 3, k);
    }
  }
  for (const char* text : {"int4-none-trust", "int4-hadamard-trust", "int4-hadamard-trust-original"}) {
    for (const int64_t k : {6, 384, 777}) {
      for (const DType dtype : kDTypes) {
        check_quantize_backward(random, parse_quantizer(text), dtype, 3, k, [](const auto& body) { body(nullptr); });
      }
    }
  }
}

TEST(EmulatedRows, Hadamard) {
  emulated::multiprocessors = 1;
  Random random(6);
  for (int64_t block = 1; block <= kMaxHadamardBlock; block *= 2) {
    const int64_t k = block >= 1024 ? block : block * 3;
    check_hadamard(random, DType::kBFloat16, block > 8192 ? 2 : 3, k, block);
    if (block <= 4096) check_hadamard(random, DType::kFloat32, 3, k, block, 4);
  }
}

TEST(EmulatedRows, Packing) {
  emulated::multiprocessors = 1;
  Random random(7);
  for (const Grid grid : {Grid{GridKind::kInt, 3}, Grid{GridKind::kInt, 8}, Grid{GridKind::kTernary, 2}}) {
    for (const int64_t k : {7, 128, 257}) {
      check_packing(random, grid, Layout::kPlanes, 3, k, 1);
      if (grid.bits <= 4) check_packing(random, grid, Layout::kPacked, 3, k);
    }
  }
}

}  // namespace
}  // namespace quest::testing
