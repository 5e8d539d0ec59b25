// quantize, dequantize and quantize_backward on the GPU against the CPU's.
#include "rows.h"

namespace quest {
namespace {

using testing::bitwise_equal;
using testing::check_all_layouts;
using testing::check_dequantize;
using testing::check_many_rows_as_few;
using testing::check_prologue_of_normals;
using testing::check_quantize_backward;
using testing::error_text;
using testing::kPrologueKinds;
using testing::layouts_of;
using testing::OnDevice;
using testing::PrologueInput;
using testing::quantize_gpu;
using testing::quantize_gpu_with;
using testing::Quantized;
using testing::Random;

class Quantize : public testing::GpuTest {};
class Dequantize : public testing::GpuTest {};
class QuantizeBackward : public testing::GpuTest {};

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
      const Quantized got = quantize_gpu(quantizer, Layout::kCodes, testing::to_dtype(values, dtype), dtype, rows, k);
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
  const Quantized expected = quantize_gpu(quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k);
  const testing::Stream stream;
  const Quantized streamed =
      quantize_gpu_with([&](const auto& body) { body(stream); }, quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0);
  const Quantized captured =
      quantize_gpu_with([](const auto& body) { testing::run_captured(body); }, quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0);
  for (const Quantized& got : {streamed, captured}) {
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
          const PrologueInput input = PrologueInput::of(kind, random, dtype, k);
          check_all_layouts(parse_quantizer(text), values, dtype, rows, k, 0, input);
          const Quantized got =
              quantize_gpu(parse_quantizer(text), Layout::kCodes, testing::to_dtype(values, dtype), dtype, rows, k, 0, input);
          for (const int64_t r : {1, 2, 3}) EXPECT_TRUE(std::isnan(got.scale[r])) << text << ", row " << r;
          for (const int64_t r : {0, 5, 6, 7}) EXPECT_FALSE(std::isnan(got.scale[r])) << text << ", row " << r;
        }
      }
    }
  }
}

// More than two waves of thread blocks have kernels that do not prefetch (on a GPU of up to 132 multiprocessors).
TEST_F(Quantize, ManyRowsAsFew) {
  Random random(12);
  for (const DType dtype : testing::kDTypes) {
    auto check = [&](const char* text, PrologueKind kind) {
      check_many_rows_as_few(random, parse_quantizer(text), dtype, kind, 9601, 37, 128);
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
    const PrologueInput input = PrologueInput::of(kind, random, DType::kBFloat16, k);
    const std::vector<uint8_t> x = testing::to_dtype(random.normals(rows * input_width(kind, k)), DType::kBFloat16);
    const Quantized expected = quantize_gpu(quantizer, Layout::kPacked, x, DType::kBFloat16, rows, k, 0, input);
    const Quantized captured = quantize_gpu_with([](const auto& body) { testing::run_captured(body); }, quantizer, Layout::kPacked, x,
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

TEST_F(Dequantize, EqualsTheCpu) {
  Random random(10);
  for (const Grid grid : testing::all_grids()) {
    for (const Sparsity sparsity : {Sparsity::kNone, Sparsity::kFourEight}) {
      for (const bool original : {false, true}) {
        Quantizer quantizer;
        quantizer.grid = grid;
        quantizer.sparsity = sparsity;
        quantizer.original = original;
        for (const Layout layout : layouts_of(quantizer)) check_dequantize(random, quantizer, layout, DType::kFloat32, 3, 136);
      }
    }
  }
  Quantizer original;
  original.original = true;
  for (const int64_t k : {1, 5, 12, 63, 100, 512, 4096}) {
    for (const DType dtype : testing::kDTypes) {
      for (const Layout layout : layouts_of(original)) check_dequantize(random, original, layout, dtype, 3, k);
    }
  }
}

TEST_F(QuantizeBackward, EqualsTheCpu) {
  Random random(20);
  for (const char* text : {"int4-none-trust", "int4-hadamard-trust", "int4-hadamard-trust-original"}) {
    const Quantizer quantizer = parse_quantizer(text);
    for (const int64_t k : {1, 6, 100, 128, 384, 777, 1024}) {
      for (const DType dtype : testing::kDTypes) {
        check_quantize_backward(random, quantizer, dtype, 5, k, [](const auto& body) { testing::run_captured(body); });
      }
    }
  }
}

}  // namespace
}  // namespace quest
