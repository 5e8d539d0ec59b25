// quantize, dequantize and quantize_backward on the GPU against the CPU's.
//
// quantize adds the squares of a row in another order than the CPU, and may add the values of a rotation in another order, so sigma and x_h
// may differ in the last bits, and with them codes and mask bits whose x_h/s lies that close to a boundary: at most one in a thousand.
// Everything else is equal to the bit, also between the layouts. A prologue's square root and exponential differ from the CPU's by some
// 2^-22, so one value in thousands rounds to its neighbour in a 16-bit type: that moves few codes, but a short row's sigma.
#include <algorithm>

#include "gpu.h"
#include "quest/cuda/quantize.h"
#include "quest/grid.h"
#include "quest/packing.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::error_text;
using testing::OnDevice;
using testing::Random;

class Quantize : public testing::GpuTest {};
class Dequantize : public testing::GpuTest {};
class QuantizeBackward : public testing::GpuTest {};

constexpr double kShare = 1e-3;

struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> code_sum;
  std::vector<uint8_t> mask, index;
};

bool is_sparse(const Quantizer& quantizer) { return quantizer.sparsity == Sparsity::kFourEight; }

int64_t codes_row_bytes(const Quantizer& quantizer, Layout layout, int64_t k) {
  return row_bytes(layout, is_sparse(quantizer) && layout != Layout::kValues ? k / 2 : k);
}

int64_t codes_bytes(const Quantizer& quantizer, Layout layout, int64_t rows, int64_t k) {
  return rows * codes_row_bytes(quantizer, layout, k) * (layout == Layout::kPlanes ? quantizer.grid.bits : 1);
}

// A prologue whose weight is a vector, in host or, shifted by an offset, in device memory.
struct Input {
  PrologueKind kind = PrologueKind::kNone;
  std::vector<uint8_t> weight;

  static Input of(PrologueKind kind, Random& random, DType dtype, int64_t k) {
    if (kind != PrologueKind::kRmsNorm) return {kind, {}};
    std::vector<float> values = random.normals(k);
    for (float& value : values) value = 1 + value / 4;
    return {kind, testing::to_dtype(values, dtype)};
  }
  Prologue prologue(const uint8_t* data) const { return kind == PrologueKind::kRmsNorm ? Prologue{kind, data, 1e-5f} : Prologue{kind}; }
};

constexpr PrologueKind kPrologueKinds[] = {PrologueKind::kRmsNorm, PrologueKind::kSiluMul};

Result quantize_cpu(const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype, int64_t rows, int64_t k,
                    const Input& input = {}) {
  Result result{std::vector<uint8_t>(codes_bytes(quantizer, layout, rows, k)), std::vector<float>(rows), std::vector<int32_t>(rows),
                std::vector<uint8_t>(rows * plane_row_bytes(k)),
                std::vector<uint8_t>(is_sparse(quantizer) ? rows * index_row_bytes(k) : 0)};
  quantize(quantizer, layout, x.data(), dtype, rows, k,
           {result.codes.data(), result.scale.data(), result.code_sum.data(), result.mask.data(),
            is_sparse(quantizer) ? result.index.data() : nullptr},
           serial_for, input.prologue(input.weight.data()));
  return result;
}

template <typename Run>
Result quantize_gpu_with(const Run& run, const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype,
                         int64_t rows, int64_t k, int64_t offset, const Input& input = {}) {
  const OnDevice<uint8_t> in(x, offset), weight(input.weight, offset), codes(codes_bytes(quantizer, layout, rows, k));
  const OnDevice<uint8_t> mask(rows * plane_row_bytes(k)), index(is_sparse(quantizer) ? rows * index_row_bytes(k) : 0);
  const OnDevice<float> scale(rows);
  const OnDevice<int32_t> code_sum(rows);
  run([&](cudaStream_t stream) {
    cuda::quantize(quantizer, layout, in.data(), dtype, rows, k,
                   {codes.data(), scale.data(), code_sum.data(), mask.data(), is_sparse(quantizer) ? index.data() : nullptr}, stream,
                   input.prologue(weight.data()));
  });
  return {codes.host(), scale.host(), code_sum.host(), mask.host(), index.host()};
}

Result quantize_gpu(const Quantizer& quantizer, Layout layout, const std::vector<uint8_t>& x, DType dtype, int64_t rows, int64_t k,
                    int64_t offset = 0, const Input& input = {}) {
  return quantize_gpu_with([](const auto& body) { body(nullptr); }, quantizer, layout, x, dtype, rows, k, offset, input);
}

void expect_close(const Result& expected, const Result& got, double scale_tolerance = 1e-5, double index_share = 0) {
  EXPECT_LE(testing::share_different(expected.codes, got.codes), kShare);
  EXPECT_LE(testing::share_different(expected.mask, got.mask), kShare);
  EXPECT_LE(testing::share_different(expected.index, got.index), index_share);  // depends on x_h alone
  for (size_t r = 0; r < expected.scale.size(); ++r) {
    if (std::isnan(expected.scale[r])) {
      EXPECT_TRUE(std::isnan(got.scale[r])) << "row " << r;
    } else {
      EXPECT_NEAR(got.scale[r], expected.scale[r], scale_tolerance * expected.scale[r]) << "row " << r;
    }
  }
}

// What quantize writes in `layout` follows from what it writes as codes: the same numbers, packed by the CPU.
void expect_same_codes(const Quantizer& quantizer, Layout layout, const Result& codes, const Result& got, int64_t rows, int64_t k) {
  const int64_t stored = is_sparse(quantizer) ? k / 2 : k;
  std::vector<uint8_t> expected(codes_bytes(quantizer, layout, rows, k));
  if (layout == Layout::kValues) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = codes.codes.data() + r * stored;
      for (int64_t j = 0; j < k; ++j) {
        if (is_sparse(quantizer)) {
          const int32_t pairs = codes.index[r * index_row_bytes(k) + j / 16] >> (j / 8 % 2 * 4) & 15;
          const int64_t pair = j % 8 / 2;
          if (pair != (pairs & 3) && pair != pairs >> 2) continue;
        }
        const int32_t code = *row++;
        if (std::isnan(codes.scale[r])) continue;
        expected[r * k + j] = static_cast<uint8_t>(quantizer.grid.bits == 8 ? code - 128 : code_value(quantizer.grid, code));
      }
    }
  } else if (layout == Layout::kCodes) {
    expected = codes.codes;
  } else if (layout == Layout::kEvenOdd) {
    for (int64_t i = 0; i < rows * k; ++i) {
      expected[i / k * row_bytes(layout, k) + testing::even_odd_column(i % k)] = codes.codes[i];
    }
  } else {
    pack(quantizer.grid, layout, codes.codes.data(), expected.data(), rows, stored, serial_for);
  }
  EXPECT_TRUE(bitwise_equal(expected, got.codes, codes_row_bytes(quantizer, layout, k)));
  EXPECT_EQ(codes.code_sum, got.code_sum);
  EXPECT_TRUE(bitwise_equal(codes.mask, got.mask, plane_row_bytes(k)));
}

std::vector<Layout> layouts_of(const Quantizer& quantizer) {
  std::vector<Layout> layouts = {Layout::kCodes};
  const bool has_zero = !is_sparse(quantizer) || quantizer.grid.bits < 8;  // 8-bit values leave none for the pruned
  if (has_values(quantizer.grid) && has_zero) layouts.push_back(Layout::kValues);
  if (quantizer.grid.bits <= 4) layouts.push_back(Layout::kPacked);
  if (!is_sparse(quantizer)) layouts.insert(layouts.end(), {Layout::kPlanes, Layout::kEvenOdd});
  return layouts;
}

void check_all_layouts(const Quantizer& quantizer, const std::vector<float>& values, DType dtype, int64_t rows, int64_t k, int64_t offset,
                       const Input& input = {}) {
  SCOPED_TRACE(concat(to_string(quantizer), ", [", rows, ", ", k, "], dtype ", static_cast<int>(dtype), ", offset ", offset, ", prologue ",
                      to_string(input.kind)));
  const std::vector<uint8_t> x = testing::to_dtype(values, dtype);
  const Result codes = quantize_gpu(quantizer, Layout::kCodes, x, dtype, rows, k, offset, input);
  const Result expected = quantize_cpu(quantizer, Layout::kCodes, x, dtype, rows, k, input);
  if (input.kind == PrologueKind::kNone) {
    expect_close(expected, codes);
  } else {
    // A value that rounds to its neighbour, by 2 roundings, has at most k, and seldom more than 32, of the k sigma^2 of its row.
    const double moved = 2 * testing::rounding(dtype) * std::min(1.0, 32.0 / static_cast<double>(k));
    expect_close(expected, codes, 1e-5 + moved, kShare);
  }
  const int64_t stored = is_sparse(quantizer) ? k / 2 : k;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int64_t j = 0; j < stored; ++j) sum += codes.codes[r * stored + j];
    EXPECT_EQ(codes.code_sum[r], sum) << "row " << r;
  }
  for (const Layout layout : layouts_of(quantizer)) {
    SCOPED_TRACE(to_string(layout));
    expect_same_codes(quantizer, layout, codes, quantize_gpu(quantizer, layout, x, dtype, rows, k, offset, input), rows, k);
  }
}

TEST_F(Quantize, EveryGridInEveryLayout) {
  Random random(1);
  for (const Grid grid : testing::all_grids()) {
    for (const Sparsity sparsity : {Sparsity::kNone, Sparsity::kFourEight}) {
      Quantizer quantizer;
      quantizer.grid = grid;
      quantizer.sparsity = sparsity;
      check_all_layouts(quantizer, random.normals(3 * 384), DType::kBFloat16, 3, 384, 0);
    }
  }
}

TEST_F(Quantize, EveryEstimatorAndRotation) {
  Random random(2);
  for (const char* text :
       {"int4-none-trust", "int4-hadamard-clip1.2", "int2-none-clip", "int1-hadamard-clip", "int4-hadamard-ste", "fp4-none-clip",
        "gauss3-hadamard-trust0.4", "int4-none-4:8-ste", "int_zero4-hadamard-4:8-clip", "ternary-none-trust", "int4-hadamard-trust0.1",
        "int3-none-trust0.5", "int_zero3-hadamard-clip", "int8-hadamard-ste"}) {
    check_all_layouts(parse_quantizer(text), random.normals(5 * 256), DType::kFloat32, 5, 256, 0);
  }
}

TEST_F(Quantize, EveryRowLengthAndType) {
  Random random(3);
  const Quantizer int4 = parse_quantizer("int4-hadamard-trust");
  // Rotation blocks 1 ... 128, ragged ends, one warp to several, one chunk a thread to eight.
  for (const int64_t k : {1, 2, 3, 4, 6, 8, 12, 16, 24, 100, 127, 160, 192, 255, 256, 264, 1000, 2048, 2056, 4096, 11008}) {
    for (const DType dtype : testing::kDTypes) check_all_layouts(int4, random.normals(3 * k), dtype, 3, k, 0);
  }
  for (const char* text : {"int1-hadamard-trust", "int2-hadamard-trust"}) {
    for (const int64_t k : {1152, 11008}) {
      for (const DType dtype : testing::kDTypes) check_all_layouts(parse_quantizer(text), random.normals(3 * k), dtype, 3, k, 0);
    }
  }
  check_all_layouts(int4, random.normals(2 * 32768), DType::kBFloat16, 2, 32768, 0);
  check_all_layouts(int4, random.normals(40000), DType::kBFloat16, 1, 40000, 0);        // too long for registers: two passes over x
  check_all_layouts(int4, random.normals(37 * 128), DType::kFloat16, 37, 128, 0);       // several rows a thread block
  check_all_layouts(int4, random.normals(1061 * 256), DType::kBFloat16, 1061, 256, 0);  // as many as one has, on a GPU of up to 132 SMs
}

TEST_F(Quantize, AnyAddress) {
  Random random(4);
  for (const DType dtype : testing::kDTypes) {
    check_all_layouts(parse_quantizer("int4-hadamard-trust"), random.normals(3 * 512), dtype, 3, 512, 4);
  }
}

TEST_F(Quantize, RowsWithoutNumbersAndRowsOfZeros) {
  Random random(5);
  const int64_t rows = 6, k = 512;
  std::vector<float> values = random.normals(rows * k);
  values[0 * k + 17] = NAN;
  values[1 * k + 511] = INFINITY;
  values[2 * k + 3] = -INFINITY;
  for (int64_t j = 0; j < k; ++j) values[3 * k + j] = 1e30f;  // finite, but its square is not
  for (int64_t j = 0; j < k; ++j) values[4 * k + j] = 0;
  for (const char* text : {"int4-hadamard-trust", "int4-none-4:8-trust", "fp4-hadamard-ste", "gauss4-none-clip", "int_zero4-none-trust",
                           "ternary-hadamard-clip", "int8-none-trust", "int2-hadamard-trust", "int1-hadamard-clip"}) {
    const Quantizer quantizer = parse_quantizer(text);
    for (const DType dtype : testing::kDTypes) {  // in float16 the row of 1e30 is one of infinities
      check_all_layouts(quantizer, values, dtype, rows, k, 0);
      const Result got = quantize_gpu(quantizer, Layout::kCodes, testing::to_dtype(values, dtype), dtype, rows, k);
      for (int64_t r = 0; r < 4; ++r) {
        EXPECT_TRUE(std::isnan(got.scale[r])) << text << ", row " << r;
        EXPECT_EQ(got.code_sum[r], 0) << text << ", row " << r;
        for (int64_t j = 0; j < plane_row_bytes(k); ++j) EXPECT_EQ(got.mask[r * plane_row_bytes(k) + j], 0) << text << ", row " << r;
      }
      EXPECT_FALSE(std::isnan(got.scale[4])) << text;
    }
  }
}

TEST_F(Quantize, LargeValuesAndGaps) {
  Random random(6);
  std::vector<float> values = random.normals(4 * 1024);
  for (int64_t j = 0; j < 1024; ++j) values[j] = j == 5 ? 1e4f : 1e-4f * values[j];
  for (const char* text : {"int4-none-trust", "int8-hadamard-trust", "gauss8-none-trust", "fp4-none-trust"}) {
    check_all_layouts(parse_quantizer(text), values, DType::kFloat32, 4, 1024, 0);
  }
}

TEST_F(Quantize, StreamsGraphsAndNoMask) {
  Random random(7);
  const Quantizer quantizer = parse_quantizer("int4-hadamard-trust");
  const int64_t rows = 9, k = 768;
  const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * k), DType::kBFloat16);
  const Result expected = quantize_gpu(quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k);
  const testing::Stream stream;
  const Result streamed =
      quantize_gpu_with([&](const auto& body) { body(stream); }, quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0);
  const Result captured =
      quantize_gpu_with([](const auto& body) { testing::run_captured(body); }, quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0);
  for (const Result& got : {streamed, captured}) {
    EXPECT_TRUE(bitwise_equal(expected.codes, got.codes, packed_row_bytes(k)));
    EXPECT_TRUE(bitwise_equal(expected.scale, got.scale, 1));
    EXPECT_TRUE(bitwise_equal(expected.mask, got.mask, plane_row_bytes(k)));
  }
  const OnDevice<uint8_t> in(x), codes(rows * packed_row_bytes(k));
  const OnDevice<float> scale(rows);
  const OnDevice<int32_t> code_sum(rows);
  cuda::quantize(quantizer, Layout::kPacked, in.data(), DType::kBFloat16, rows, k,
                 {codes.data(), scale.data(), code_sum.data(), nullptr, nullptr}, nullptr);
  EXPECT_TRUE(bitwise_equal(expected.codes, codes.host(), packed_row_bytes(k)));
}

void check_prologue_of_normals(PrologueKind kind, const Quantizer& quantizer, DType dtype, int64_t rows, int64_t k, Random& random,
                               int64_t offset = 0) {
  const Input input = Input::of(kind, random, dtype, k);
  check_all_layouts(quantizer, random.normals(rows * input_width(kind, k)), dtype, rows, k, offset, input);
}

TEST_F(Quantize, ProloguesOfEveryRowLengthAndType) {
  Random random(8);
  const Quantizer int4 = parse_quantizer("int4-hadamard-trust");
  for (const PrologueKind kind : kPrologueKinds) {
    // Ragged ends; whole blocks of one warp, of two and of 32; rows that the general kernel walks more than once.
    for (const int64_t k : {1, 2, 3, 8, 12, 24, 100, 127, 128, 160, 255, 256, 264, 384, 1000, 1024, 1152, 2048, 4096, 8200, 11008}) {
      for (const DType dtype : testing::kDTypes) check_prologue_of_normals(kind, int4, dtype, 3, k, random);
    }
    for (const DType dtype : testing::kDTypes) check_prologue_of_normals(kind, int4, dtype, 2, 32768, random);
    check_prologue_of_normals(kind, int4, DType::kBFloat16, 1, 40000, random);
    check_prologue_of_normals(kind, int4, DType::kFloat16, 37, 128, random);     // several rows a thread block
    check_prologue_of_normals(kind, int4, DType::kBFloat16, 1061, 256, random);  // as many as one has, on a GPU of up to 132 SMs
    check_prologue_of_normals(kind, int4, DType::kFloat32, 1061, 1024, random);  // rows of one whole warp
  }
}

TEST_F(Quantize, ProloguesWithEveryGridRotationAndAddress) {
  Random random(9);
  for (const PrologueKind kind : kPrologueKinds) {
    for (const char* text : {"int4-none-trust", "int1-hadamard-clip", "int2-hadamard-clip", "int8-hadamard-ste", "int8-none-clip",
                             "int_zero4-hadamard-trust", "ternary-hadamard-trust", "int4-hadamard-trust0.1", "fp4-hadamard-trust",
                             "gauss4-hadamard-clip", "int4-hadamard-4:8-trust", "fp4-none-4:8-ste"}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
        check_prologue_of_normals(kind, parse_quantizer(text), dtype, 5, 512, random);
    }
    for (const DType dtype : testing::kDTypes)
      check_prologue_of_normals(kind, parse_quantizer("int4-hadamard-trust"), dtype, 3, 512, random, 4);
  }
}

TEST_F(Quantize, ProloguesOfRowsWithoutNumbers) {
  Random random(10);
  const int64_t rows = 8;
  for (const PrologueKind kind : kPrologueKinds) {
    for (const int64_t k : {136, 512, 2048}) {
      const int64_t width = input_width(kind, k);
      std::vector<float> values = random.normals(rows * width);
      values[1 * width + 17] = NAN;
      values[2 * width + width - 1] = INFINITY;
      values[3 * width] = -INFINITY;                                      // silu: no number
      for (int64_t j = 0; j < width; ++j) values[4 * width + j] = 1e30f;  // rms_norm: zeros, for their squares are no numbers
      for (int64_t j = 0; j < width; ++j) values[5 * width + j] = 0;
      for (int64_t j = 0; j < k; ++j) values[6 * width + j] = -1e4f;  // silu: zeros
      values[7 * width + 5] = -95.0f;                                 // silu: e^95 is infinite
      for (const char* text : {"int4-hadamard-trust", "int4-none-4:8-trust", "gauss4-none-clip"}) {
        for (const DType dtype : testing::kDTypes) {
          const Input input = Input::of(kind, random, dtype, k);
          check_all_layouts(parse_quantizer(text), values, dtype, rows, k, 0, input);
          const Result got =
              quantize_gpu(parse_quantizer(text), Layout::kCodes, testing::to_dtype(values, dtype), dtype, rows, k, 0, input);
          for (const int64_t r : {1, 2, 3}) EXPECT_TRUE(std::isnan(got.scale[r])) << text << ", row " << r;
          for (const int64_t r : {0, 5, 6, 7}) EXPECT_FALSE(std::isnan(got.scale[r])) << text << ", row " << r;
        }
      }
    }
  }
}

// More than two waves of thread blocks have kernels that do not prefetch (on a GPU of up to 132 multiprocessors): a row is the same,
// whatever the number of rows.
TEST_F(Quantize, ManyRowsAsFew) {
  Random random(12);
  constexpr int64_t kRows = 9601, kFew = 37, kK = 128;
  for (const DType dtype : testing::kDTypes) {
    auto check = [&](const char* text, PrologueKind kind) {
      SCOPED_TRACE(concat(text, ", dtype ", static_cast<int>(dtype), ", prologue ", to_string(kind)));
      const Quantizer quantizer = parse_quantizer(text);
      const Input input = Input::of(kind, random, dtype, kK);
      const std::vector<uint8_t> x = testing::to_dtype(random.normals(kRows * input_width(kind, kK)), dtype);
      const Result many = quantize_gpu(quantizer, Layout::kPacked, x, dtype, kRows, kK, 0, input);
      const int64_t x_row = input_width(kind, kK) * element_size(dtype), codes_row = packed_row_bytes(kK), mask_row = plane_row_bytes(kK);
      for (const int64_t first : {int64_t{0}, kRows - kFew}) {
        auto rows_of = [&](const auto& all, int64_t width) {
          return std::decay_t<decltype(all)>(all.begin() + first * width, all.begin() + (first + kFew) * width);
        };
        const Result few = quantize_gpu(quantizer, Layout::kPacked, rows_of(x, x_row), dtype, kFew, kK, 0, input);
        EXPECT_TRUE(bitwise_equal(few.codes, rows_of(many.codes, codes_row), codes_row));
        EXPECT_TRUE(bitwise_equal(few.mask, rows_of(many.mask, mask_row), mask_row));
        EXPECT_TRUE(bitwise_equal(few.scale, rows_of(many.scale, 1), 1));
        EXPECT_TRUE(bitwise_equal(few.code_sum, rows_of(many.code_sum, 1), 1));
      }
    };
    check("int4-hadamard-trust", PrologueKind::kNone);
    check("int4-none-trust", PrologueKind::kNone);
    for (const PrologueKind kind : kPrologueKinds) check("int4-hadamard-trust", kind);
  }
}

TEST_F(Quantize, ProloguesInACapturedGraph) {
  Random random(11);
  const Quantizer quantizer = parse_quantizer("int4-hadamard-trust");
  const int64_t rows = 9, k = 768;
  for (const PrologueKind kind : kPrologueKinds) {
    const Input input = Input::of(kind, random, DType::kBFloat16, k);
    const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * input_width(kind, k)), DType::kBFloat16);
    const Result expected = quantize_gpu(quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0, input);
    const Result captured = quantize_gpu_with([](const auto& body) { testing::run_captured(body); }, quantizer, Layout::kPacked, x,
                                              DType::kBFloat16, rows, k, 0, input);
    EXPECT_TRUE(bitwise_equal(expected.codes, captured.codes, packed_row_bytes(k)));
    EXPECT_TRUE(bitwise_equal(expected.scale, captured.scale, 1));
  }
}

TEST_F(Quantize, EmptyAndWrong) {
  QuantizeOutput none{};
  cuda::quantize(parse_quantizer("int4-hadamard-trust"), Layout::kCodes, nullptr, DType::kFloat32, 0, 64, none, nullptr);
  auto text = [&](const char* quantizer, Layout layout, int64_t k) {
    return error_text([&] { cuda::quantize(parse_quantizer(quantizer), layout, nullptr, DType::kFloat32, 1, k, none, nullptr); });
  };
  EXPECT_CONTAINS(text("gauss4-none-ste", Layout::kValues, 64), "expected a grid with integer values");
  EXPECT_CONTAINS(text("int5-none-ste", Layout::kPacked, 64), "expected at most 4 bits");
  EXPECT_CONTAINS(text("int4-none-4:8-ste", Layout::kCodes, 64), "expected an index for quantizer int4-none-4:8-ste, got none");
  uint8_t index = 0;
  none.index = &index;
  EXPECT_CONTAINS(text("int4-none-4:8-ste", Layout::kPlanes, 64), "4:8 sparse quantizer, got planes");
  EXPECT_CONTAINS(text("int4-none-4:8-ste", Layout::kCodes, 60), "expected 8 to divide the last dimension");
  EXPECT_CONTAINS(error_text([&] {
                    cuda::quantize(parse_quantizer("int4-none-ste"), Layout::kCodes, nullptr, DType::kFloat32, 1, 64, none, nullptr,
                                   {PrologueKind::kRmsNorm});
                  }),
                  "quantize: expected a norm_weight for prologue rms_norm, got none");
}

void check_dequantize(const Quantizer& quantizer, Layout layout, DType dtype, int64_t rows, int64_t k, uint64_t seed) {
  SCOPED_TRACE(concat(to_string(quantizer), ", ", to_string(layout), ", k = ", k, ", dtype ", static_cast<int>(dtype)));
  Random random(seed);
  const Result stored =
      quantize_cpu(quantizer, layout, testing::to_dtype(random.normals(rows * k), DType::kFloat32), DType::kFloat32, rows, k);
  std::vector<uint8_t> expected(rows * k * element_size(dtype));
  const bool needs_index = is_sparse(quantizer);
  dequantize(quantizer, layout, stored.codes.data(), stored.scale.data(), needs_index ? stored.index.data() : nullptr, expected.data(),
             dtype, rows, k, serial_for);
  const OnDevice<uint8_t> codes(stored.codes), index(stored.index), y(static_cast<int64_t>(expected.size()));
  const OnDevice<float> scale(stored.scale);
  cuda::dequantize(quantizer, layout, codes.data(), scale.data(), needs_index ? index.data() : nullptr, y.data(), dtype, rows, k, nullptr);
  EXPECT_TRUE(bitwise_equal(expected, y.host(), k * element_size(dtype)));
}

TEST_F(Dequantize, EqualsTheCpu) {
  uint64_t seed = 10;
  for (const Grid grid : testing::all_grids()) {
    for (const Sparsity sparsity : {Sparsity::kNone, Sparsity::kFourEight}) {
      for (const bool original : {false, true}) {
        Quantizer quantizer;
        quantizer.grid = grid;
        quantizer.sparsity = sparsity;
        quantizer.original = original;
        for (const Layout layout : layouts_of(quantizer)) check_dequantize(quantizer, layout, DType::kFloat32, 3, 136, seed++);
      }
    }
  }
  Quantizer original;
  original.original = true;
  for (const int64_t k : {1, 5, 12, 63, 100, 512, 4096}) {
    for (const DType dtype : testing::kDTypes) {
      for (const Layout layout : layouts_of(original)) check_dequantize(original, layout, dtype, 3, k, seed++);
    }
  }
}

TEST_F(QuantizeBackward, EqualsTheCpu) {
  Random random(20);
  for (const char* text : {"int4-none-trust", "int4-hadamard-trust", "int4-hadamard-trust-original"}) {
    const Quantizer quantizer = parse_quantizer(text);
    for (const int64_t k : {1, 6, 100, 128, 384, 777, 1024}) {
      for (const DType dtype : testing::kDTypes) {
        const int64_t rows = 5;
        const std::vector<uint8_t> grad = testing::to_dtype(random.normals(rows * k), dtype);
        const std::vector<uint8_t> mask = random.codes(rows * plane_row_bytes(k), 256);
        std::vector<uint8_t> expected(grad.size());
        quantize_backward(quantizer, grad.data(), mask.data(), expected.data(), dtype, rows, k, serial_for);
        const OnDevice<uint8_t> in(grad), bits(mask), dx(static_cast<int64_t>(grad.size()));
        testing::run_captured(
            [&](cudaStream_t stream) { cuda::quantize_backward(quantizer, in.data(), bits.data(), dx.data(), dtype, rows, k, stream); });
        EXPECT_TRUE(bitwise_equal(expected, dx.host(), k * element_size(dtype))) << text << ", k = " << k;
      }
    }
  }
}

}  // namespace
}  // namespace quest
