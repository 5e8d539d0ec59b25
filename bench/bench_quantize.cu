// quantize and quantize_backward on the GPU against a plain copy of as many bytes; and the latency of a small quantize against two empty
// kernels. Prints CSV (bench.h). Results are compared with the CPU backend's before anything is timed.
//
// bench_quantize [NAME]: cases whose name contains NAME.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "bench.h"
#include "quest/cuda/quantize.h"
#include "quest/packing.h"
#include "quest/types.h"

namespace quest::bench {
namespace {

constexpr int64_t kRows = 16384;
constexpr int64_t kCheckedRows = 16;
constexpr double kMostDifferent = 1e-3;  // share of codes and mask bytes: sums of squares are added in another order

void serial(int64_t begin, int64_t end, int64_t, const RangeBody& body) { body(begin, end); }

struct Case {
  Quantizer quantizer;
  Layout layout;
  DType dtype;
  int64_t rows, k;

  int64_t input_bytes() const { return rows * k * element_size(dtype); }
  int64_t code_bytes() const { return rows * row_bytes(layout, k) * (layout == Layout::kPlanes ? quantizer.grid.bits : 1); }
  int64_t mask_bytes() const { return rows * plane_row_bytes(k); }
  int64_t output_bytes() const {
    return round_up(code_bytes(), kAlignment) + round_up(mask_bytes(), kAlignment) + 2 * round_up(4 * rows, kAlignment);
  }

  QuantizeOutput output(uint8_t* base) const {
    uint8_t* mask = base + round_up(code_bytes(), kAlignment);
    uint8_t* scale = mask + round_up(mask_bytes(), kAlignment);
    return {base, reinterpret_cast<float*>(scale), reinterpret_cast<int32_t*>(scale + round_up(4 * rows, kAlignment)), mask, nullptr};
  }
  std::string shape() const { return std::to_string(rows) + "x" + std::to_string(k); }
};

double share_different(const uint8_t* a, const uint8_t* b, int64_t count) {
  int64_t different = 0;
  for (int64_t i = 0; i < count; ++i) different += a[i] != b[i];
  return static_cast<double>(different) / static_cast<double>(count);
}

// The first rows, in the layout of codes that has no planes between them.
void check_result(const Case& timed, const Arena& arena) {
  Case small = timed;
  small.rows = std::min(timed.rows, kCheckedRows);
  check(cudaMemset(arena.target, 0x5A, small.output_bytes()), "cudaMemset");
  cuda::quantize(small.quantizer, small.layout, arena.source, small.dtype, small.rows, small.k, small.output(arena.target), nullptr);
  const std::vector<uint8_t> got = to_host(arena.target, small.output_bytes());
  const std::vector<uint8_t> x = to_host(arena.source, small.input_bytes());
  std::vector<uint8_t> expected(small.output_bytes());
  const QuantizeOutput out = small.output(expected.data());
  quantize(small.quantizer, small.layout, x.data(), small.dtype, small.rows, small.k, out, serial);
  const std::string name = to_string(small.quantizer) + " at K = " + std::to_string(small.k);
  const uint8_t* mask = got.data() + (out.mask - expected.data());
  expect(share_different(expected.data(), got.data(), small.code_bytes()) <= kMostDifferent, name + ": other codes than the CPU's");
  expect(share_different(out.mask, mask, small.mask_bytes()) <= kMostDifferent, name + ": another mask than the CPU's");
  const float* scale = reinterpret_cast<const float*>(got.data() + (reinterpret_cast<const uint8_t*>(out.scale) - expected.data()));
  for (int64_t r = 0; r < small.rows; ++r) {
    expect(std::abs(scale[r] - out.scale[r]) <= 1e-5f * out.scale[r], name + ": another scale than the CPU's");
  }
}

void bench_case(const std::string& name, const Case& timed, const Arena& arena) {
  check_result(timed, arena);
  const double bytes = static_cast<double>(timed.input_bytes() + timed.code_bytes() + timed.mask_bytes() + 8 * timed.rows);
  const int64_t stride = round_up(std::max(timed.input_bytes(), timed.output_bytes()), kAlignment);
  const int buffers = buffer_count(static_cast<double>(stride));
  const Times copy = time_copy(arena, bytes);
  const Times times = time_launches(
      [&](cudaStream_t stream, int i) {
        const int64_t offset = i % buffers * stride;
        cuda::quantize(timed.quantizer, timed.layout, arena.source + offset, timed.dtype, timed.rows, timed.k,
                       timed.output(arena.target + offset), stream);
      },
      copy.us);
  print_row(name, "quest", timed.shape(), dtype_name(timed.dtype), times, bytes, copy.us);
}

void bench_backward(const Arena& arena, int64_t k) {
  const Quantizer quantizer = parse_quantizer("int4-hadamard-trust");
  const int64_t bytes = kRows * k * 2, mask_bytes = kRows * plane_row_bytes(k);
  const int64_t stride = round_up(bytes, kAlignment) + round_up(mask_bytes, kAlignment);
  const int buffers = buffer_count(static_cast<double>(stride));
  // The mask: whatever bits follow the gradient in the arena. Rows of the check are the first ones.
  auto launch = [&](cudaStream_t stream, int64_t offset, int64_t rows) {
    cuda::quantize_backward(quantizer, arena.source + offset, arena.source + offset + bytes, arena.target + offset, DType::kBFloat16, rows,
                            k, stream);
  };
  launch(nullptr, 0, kCheckedRows);
  const std::vector<uint8_t> grad = to_host(arena.source, kCheckedRows * k * 2);
  const std::vector<uint8_t> mask = to_host(arena.source + bytes, kCheckedRows * plane_row_bytes(k));
  std::vector<uint8_t> expected(grad.size());
  quantize_backward(quantizer, grad.data(), mask.data(), expected.data(), DType::kBFloat16, kCheckedRows, k, serial);
  expect(to_host(arena.target, kCheckedRows * k * 2) == expected, "quantize_backward: another gradient than the CPU's");
  const double moved = 2.0 * static_cast<double>(bytes) + static_cast<double>(mask_bytes);
  const Times copy = time_copy(arena, moved);
  const Times times = time_launches([&](cudaStream_t stream, int i) { launch(stream, i % buffers * stride, kRows); }, copy.us);
  print_row("quantize_backward", "quest", std::to_string(kRows) + "x" + std::to_string(k), "bfloat16", times, moved, copy.us);
}

__global__ void empty_kernel() {}

// A decode step's activation. The limit is two empty kernels: one after another in a graph of many launches, and alone in a graph.
void bench_small(const Arena& arena) {
  const Case small{parse_quantizer("int4-hadamard-trust"), Layout::kPacked, DType::kBFloat16, 16, 4096};
  check_result(small, arena);
  const double bytes = static_cast<double>(small.input_bytes() + small.code_bytes() + small.mask_bytes() + 8 * small.rows);
  auto launch = [&](cudaStream_t stream, int) {
    cuda::quantize(small.quantizer, small.layout, arena.source, small.dtype, small.rows, small.k, small.output(arena.target), stream);
  };
  auto two_empty = [](cudaStream_t stream, int) {
    empty_kernel<<<1, 32, 0, stream>>>();
    empty_kernel<<<1, 32, 0, stream>>>();
  };
  constexpr double kExpectedUs = 4;
  const Times chained_limit = time_launches(two_empty, kExpectedUs);
  const Times chained = time_launches(launch, kExpectedUs);
  print_row("quantize_small_chained", "two_empty_kernels", "-", "-", chained_limit, 0, 0);
  print_row("quantize_small_chained", "quest", small.shape(), "bfloat16", chained, bytes, chained_limit.us);
  constexpr int kReplays = 200;  // small graphs one after another
  const Times alone_limit = time_graph([&](cudaStream_t stream) { two_empty(stream, 0); }, 1, kReplays);
  const Times alone = time_graph([&](cudaStream_t stream) { launch(stream, 0); }, 1, kReplays);
  print_row("quantize_small_alone", "two_empty_kernels", "-", "-", alone_limit, 0, 0);
  print_row("quantize_small_alone", "quest", small.shape(), "bfloat16", alone, bytes, alone_limit.us);
}

void run(const std::string& filter) {
  const Arena arena;
  print_header();
  auto wanted = [&](const std::string& name) { return name.find(filter) != std::string::npos; };
  fill_normal<__nv_bfloat16>(arena);
  const double large = 2.0 * static_cast<double>(kFlightBytes);
  const Times copy = time_copy(arena, large);
  print_row("copy", "cudaMemcpy", "-", "bytes", copy, large, 0);
  if (wanted("quantize_small")) bench_small(arena);
  struct Kind {
    const char* quantizer;
    Layout layout;
  };
  for (const Kind& kind : {Kind{"int4-hadamard-trust", Layout::kPacked}, Kind{"int4-hadamard-trust", Layout::kValues},
                           Kind{"int4-hadamard-trust", Layout::kEvenOdd}, Kind{"int1-hadamard-trust", Layout::kPlanes},
                           Kind{"int2-hadamard-trust", Layout::kPlanes}}) {
    for (const int64_t k : {2048, 4096, 5632, 11008}) {
      const Quantizer quantizer = parse_quantizer(kind.quantizer);
      const std::string name = "quantize_" + to_string(quantizer.grid) + "_" + to_string(kind.layout);
      if (wanted(name)) bench_case(name, {quantizer, kind.layout, DType::kBFloat16, kRows, k}, arena);
    }
  }
  if (wanted("quantize_backward")) {
    for (const int64_t k : {2048, 4096, 5632, 11008}) bench_backward(arena, k);
  }
  for (const char* text :
       {"int4-none-trust", "int1-hadamard-clip", "int8-hadamard-trust", "int_zero4-hadamard-trust", "fp4-hadamard-trust"}) {
    const std::string name = std::string("quantize_") + text;
    if (wanted(name)) bench_case(name, {parse_quantizer(text), Layout::kValues, DType::kBFloat16, kRows, 4096}, arena);
  }
  if (wanted("quantize_float16")) {
    fill_normal<__half>(arena);
    bench_case("quantize_float16", {parse_quantizer("int4-hadamard-trust"), Layout::kPacked, DType::kFloat16, kRows, 4096}, arena);
  }
  if (wanted("quantize_float32")) {
    fill_normal<float>(arena);
    bench_case("quantize_float32", {parse_quantizer("int4-hadamard-trust"), Layout::kPacked, DType::kFloat32, kRows, 4096}, arena);
  }
}

}  // namespace
}  // namespace quest::bench

int main(int argc, char** argv) {
  quest::bench::run(argc > 1 ? argv[1] : "");
  return 0;
}
