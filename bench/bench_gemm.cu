// The low-bit products on the GPU, one at a time: microseconds, and what share of the tensor cores' cycles they use at the clock that the
// GPU really ran at, which tells a kernel that waits from a GPU that is out of power. Prints CSV. Results are compared with the CPU
// backend's before anything is timed. Codes and results are rotated past the cache. bench/run.py has the peers.
//
// bench_gemm CASE [M N K]...    CASE: w4a4, w1a1, w2a2, w4a8, w8a8 ... (wXaY), w4a4s with a 4:8 sparse weight, w1a16 ... with activations
//                               of bfloat16 (of many rows too, where the operation multiplies by torch); without shapes, the paper's 7B
//                               layers
#include <cuda_bf16.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "bench.h"
#include "quest/cuda/gemm.h"
#include "quest/cuda/quantize.h"
#include "quest/packing.h"
#include "quest/plan.h"

namespace quest::bench {
namespace {

constexpr int kCheckedRows = 8;
constexpr double kSustainedUs = 20e3;  // a round: many of the clock's periods

void serial(int64_t begin, int64_t end, int64_t, const RangeBody& body) { body(begin, end); }

class Buffer {
 public:
  explicit Buffer(int64_t bytes) { check(cudaMalloc(&data_, static_cast<size_t>(bytes)), "cudaMalloc"); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T = uint8_t>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Of the codes, without the index of a sparse operand.
int64_t stored_bytes(Grid grid, Sparsity sparsity, Layout layout, int64_t rows, int64_t k) {
  return rows * row_bytes(layout, sparsity == Sparsity::kFourEight ? k / 2 : k) * (layout == Layout::kPlanes ? grid.bits : 1);
}

// Quantized normal values on the device, `copies` of them one after another, with the same scales and sums.
class Codes {
 public:
  Codes(const Arena& arena, Grid grid, Sparsity sparsity, Layout layout, int64_t rows, int64_t k, int copies)
      : grid_(grid),
        layout_(layout),
        rows_(rows),
        bytes_(stored_bytes(grid, sparsity, layout, rows, k)),
        index_bytes_(sparsity == Sparsity::kFourEight ? rows * index_row_bytes(k) : 0),
        factor_bytes_(round_up(rows * 4, kAlignment)),
        data_(bytes_ * copies),
        scale_(factor_bytes_ * copies),
        sum_(factor_bytes_ * copies),
        index_(index_bytes_ * copies) {
    Quantizer quantizer = parse_quantizer(to_string(grid) + "-none-ste");
    quantizer.sparsity = sparsity;
    for (int copy = 0; copy < copies; ++copy) {
      cuda::quantize(quantizer, layout, arena.source, DType::kBFloat16, rows, k,
                     {data_.as() + copy * bytes_, scale(copy), sum(copy), nullptr, index(copy)}, nullptr);
    }
    check(cudaDeviceSynchronize(), "quantizing the operands");
  }
  Operand device(int copy) const { return {grid_, layout_, data_.as() + copy * bytes_, scale(copy), sum(copy), index(copy)}; }

  // The first copy on the host; the vectors keep what the operand points to.
  struct Host {
    std::vector<uint8_t> data, scale, sum, index;
    Operand operand;
  };
  Host host() const {
    Host result{to_host(data_.as(), bytes_),
                to_host(scale_.as(), 4 * rows_),
                to_host(sum_.as(), 4 * rows_),
                to_host(index_.as(), index_bytes_),
                {}};
    result.operand = {grid_,
                      layout_,
                      result.data.data(),
                      reinterpret_cast<const float*>(result.scale.data()),
                      reinterpret_cast<const int32_t*>(result.sum.data()),
                      index_bytes_ > 0 ? result.index.data() : nullptr};
    return result;
  }

 private:
  float* scale(int copy) const { return reinterpret_cast<float*>(scale_.as() + copy * factor_bytes_); }
  int32_t* sum(int copy) const { return reinterpret_cast<int32_t*>(sum_.as() + copy * factor_bytes_); }
  uint8_t* index(int copy) const { return index_bytes_ > 0 ? index_.as() + copy * index_bytes_ : nullptr; }

  Grid grid_;
  Layout layout_;
  int64_t rows_, bytes_, index_bytes_, factor_bytes_;
  Buffer data_, scale_, sum_, index_;
};

// The clock of multiprocessor 0, and the time.
struct Instant {
  long long cycles;
  unsigned long long ns;
};

__global__ void read_clock(Instant* instant) {
  uint32_t multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  if (multiprocessor != 0 || threadIdx.x != 0) return;
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  *instant = {clock64(), ns};
}

using Product = void (*)(const Operand&, const Operand&, const float*, void*, DType, int64_t, int64_t, int64_t, cudaStream_t);
using HostProduct = void (*)(const Operand&, const Operand&, const float*, void*, DType, int64_t, int64_t, int64_t, const ParallelFor&);

// What a product of the first rows gives on the CPU.
void check_codes(const std::string& name, HostProduct product, const Codes& a, const Codes& w, Grid a_grid, Layout a_layout,
                 const Buffer& y, int64_t m, int64_t n, int64_t k) {
  const int64_t rows = std::min<int64_t>(m, kCheckedRows);
  std::vector<uint8_t> expected(rows * n * 2);
  Codes::Host host_a = a.host();
  const Codes::Host host_w = w.host();
  if (a_layout == Layout::kPlanes) {  // the checked rows of each plane, side by side
    for (int plane = 1; plane < a_grid.bits; ++plane) {
      std::memmove(host_a.data.data() + plane * rows * row_bytes(a_layout, k), host_a.data.data() + plane * m * row_bytes(a_layout, k),
                   rows * row_bytes(a_layout, k));
    }
  }
  product(host_a.operand, host_w.operand, nullptr, expected.data(), DType::kBFloat16, rows, n, k, serial);
  expect(to_host(y.as(), rows * n * 2) == expected, name + ": another product than the CPU's");
}

// The same for real activations. Both results are rounded to bfloat16, so that they may be neighbours, 2^-7 of the largest apart; a quarter
// of that is for sums in another order and for x as fixed-point numbers.
void check_reals(const std::string& name, const Arena& arena, const Codes& w, const Buffer& y, int64_t m, int64_t n, int64_t k) {
  const int64_t rows = std::min<int64_t>(m, kCheckedRows);
  const std::vector<uint8_t> x = to_host(arena.source, rows * k * 2), got = to_host(y.as(), rows * n * 2);
  std::vector<uint8_t> expected(rows * n * 2);
  const Codes::Host host_w = w.host();
  gemm_weight_only(x.data(), host_w.operand, nullptr, expected.data(), DType::kBFloat16, rows, n, k, serial);
  auto value = [](const std::vector<uint8_t>& bytes, int64_t i) {
    const uint32_t bits = static_cast<uint32_t>(bytes[2 * i]) << 16 | static_cast<uint32_t>(bytes[2 * i + 1]) << 24;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  };
  float largest = 0, error = 0;
  for (int64_t i = 0; i < rows * n; ++i) {
    largest = std::max(largest, std::abs(value(expected, i)));
    error = std::max(error, std::abs(value(got, i) - value(expected, i)));
  }
  expect(error <= 1.25f * 0x1p-7f * largest, name + ": another product than the CPU's");
}

// a_grid: nullptr for activations of bfloat16.
void bench_shape(const std::string& name, const Grid* a_grid, Grid w_grid, Sparsity sparsity, int64_t m, int64_t n, int64_t k,
                 const Arena& arena) {
  const GemmShape mnk = cuda::shape_on_device(m, n, k);
  const GemmOperands operands = plan_operands(w_grid, a_grid, sparsity, &mnk);
  Product product = cuda::gemm_int8;
  HostProduct host_product = gemm_int8;
  double operations_a_cycle = 8192;  // of a multiprocessor's tensor cores on Hopper
  if (operands.family == GemmFamily::kInt4) product = cuda::gemm_int4, host_product = gemm_int4;
  if (operands.family == GemmFamily::kPlanes) product = cuda::gemm_planes, host_product = gemm_planes, operations_a_cycle = 65536;
  if (operands.family == GemmFamily::kSparse) product = cuda::gemm_sparse, host_product = gemm_sparse, operations_a_cycle = 16384;
  if (a_grid == nullptr) operations_a_cycle = 4096;
  const int64_t w_bytes = stored_bytes(w_grid, sparsity, operands.w, n, k), y_bytes = round_up(m * n * 2, kAlignment);
  const int64_t a_bytes = a_grid != nullptr ? stored_bytes(*a_grid, Sparsity::kNone, operands.a, m, k) : round_up(m * k * 2, kAlignment);
  const int copies = std::min(buffer_count(static_cast<double>(w_bytes + a_bytes + y_bytes)), 64);
  const Codes w(arena, w_grid, sparsity, operands.w, n, k, copies);
  std::optional<Codes> a;
  if (a_grid != nullptr) a.emplace(arena, *a_grid, Sparsity::kNone, operands.a, m, k, copies);
  const Buffer y(y_bytes * copies);

  auto launch = [&](cudaStream_t stream, int i) {
    const int copy = i % copies;
    void* const target = y.as() + copy * y_bytes;
    if (a_grid != nullptr) {
      product(a->device(copy), w.device(copy), nullptr, target, DType::kBFloat16, m, n, k, stream);
    } else {
      cuda::gemm_weight_only(arena.source + copy * a_bytes, w.device(copy), nullptr, target, DType::kBFloat16, m, n, k, stream);
    }
  };
  launch(nullptr, 0);
  if (a_grid != nullptr) {
    check_codes(name, host_product, *a, w, *a_grid, operands.a, y, m, n, k);
  } else {
    check_reals(name, arena, w, y, m, n, k);
  }

  const double operations = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const double expected_us = 3 + operations / 1.5e9;
  const int launches = static_cast<int>(std::max(4.0, std::min(kRoundUs / expected_us, 256.0)));
  const int replays = static_cast<int>(std::max(1.0, kSustainedUs / (launches * expected_us)));
  const Buffer instants(2 * sizeof(Instant));
  Instant* const instant = instants.as<Instant>();
  read_clock<<<1024, 32>>>(instant);
  const Times times = time_graph(
      [&](cudaStream_t stream) {
        for (int i = 0; i < launches; ++i) launch(stream, i);
      },
      launches, replays);
  read_clock<<<1024, 32>>>(instant + 1);
  Instant read[2];
  check(cudaMemcpy(read, instant, sizeof read, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const double ghz = static_cast<double>(read[1].cycles - read[0].cycles) / static_cast<double>(read[1].ns - read[0].ns);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  const double products = operands.family == GemmFamily::kPlanes ? a_grid->bits * w_grid.bits : 1;
  const double cycles = operations * products / operations_a_cycle / multiprocessors;
  std::printf("%s,%s,%ld,%ld,%ld,%.2f,%.1f,%.1f,%.3f,%.3f,%s\n", name.c_str(), to_string(operands.family).c_str(), static_cast<long>(m),
              static_cast<long>(n), static_cast<long>(k), times.us, times.spread_pct, operations / times.us / 1e6, ghz,
              cycles / (times.us * ghz * 1e3), gpu_name().c_str());
  std::fflush(stdout);
}

void run(int argc, char** argv) {
  int w_bits = 0, a_bits = 0;
  expect(argc >= 2 && (argc - 2) % 3 == 0 && std::sscanf(argv[1], "w%da%d", &w_bits, &a_bits) == 2,
         "expected CASE [M N K]..., where CASE is like w4a4 or w4a4s");
  const Sparsity sparsity = std::string(argv[1]).back() == 's' ? Sparsity::kFourEight : Sparsity::kNone;
  std::vector<std::array<int64_t, 3>> shapes;
  for (int i = 2; i < argc; i += 3) shapes.push_back({std::atoll(argv[i]), std::atoll(argv[i + 1]), std::atoll(argv[i + 2])});
  if (shapes.empty()) {
    for (const int64_t m : {16, 1024, 4096, 16384}) {
      for (const auto& [n, k] : {std::array<int64_t, 2>{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}})
        shapes.push_back({m, n, k});
    }
  }
  const Grid a_grid{GridKind::kInt, a_bits};
  const Arena arena;
  fill_normal<__nv_bfloat16>(arena);
  std::printf("case,family,M,N,K,time_us,spread_pct,tops,sm_ghz,tensor_share,gpu\n");
  for (const auto& [m, n, k] : shapes) {
    bench_shape(argv[1], a_bits == 16 ? nullptr : &a_grid, Grid{GridKind::kInt, w_bits}, sparsity, m, n, k, arena);
  }
}

}  // namespace
}  // namespace quest::bench

int main(int argc, char** argv) {
  quest::bench::run(argc, argv);
  return 0;
}
