// The ceilings of this GPU, measured: what bench/run.py calls the limit. Prints CSV: peak,value,unit,milliseconds,gpu.
//
//   copy             GB/s  device-to-device copy, bytes read + written
//   mma_s8, mma_b1, mma_bf16  TOPS  mma.sync m16n8 k32, k256 (and.popc), k16: sm_80 and newer
//   wgmma_s8         TOPS  m64n256k32, full-range int8 (the wgmma rows: sm_90a)
//   wgmma_s8_4bit    TOPS  the same on int4 values of normal numbers, odd integers up to 15: operands decide the power, and it the clock
//   wgmma_b1         TOPS  m64n256k256, and.popc
//   wgmma_sparse_s8  TOPS  m64n256k64, half of A's values stored; counts the products of the dense matrix
//   wgmma_bf16       TOPS  m64n256k16
//
// A product and its addition are two operations. Each figure is a mean over at least 200 ms behind 500 ms of warm-up: a burst that ends
// before the power limit acts would be a limit that no long kernel can meet. Operands are random, since zeros toggle no wires and run
// faster. Each kernel first multiplies ones, whose sums are known: a kernel without its instructions has no rate.
//
// How the work is split: one block on every multiprocessor. wgmma: two warpgroups, each with 64 x 256 accumulators and its A in registers,
// share four stages of B in shared memory (256 rows of 128 bytes, swizzled by 128 bytes, so that no bank is asked twice at once). mma.sync:
// 16 warps, everything in registers, 16 independent accumulators each, which covers the latency of the instruction.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr double kWarmupMs = 500;  // what the clock takes to settle behind other work
constexpr double kTimedMs = 300;   // launches are counted beforehand: at least 200 ms remain should the clock rise meanwhile
constexpr double kLaunchMs = 5;    // long enough for the gap between launches, some microseconds, to vanish in it
constexpr size_t kCopyBytes = size_t{1} << 30;

constexpr int kStages = 4;
constexpr int kRowBytes = 128;  // of B in one stage: the width of the swizzle
constexpr int kStageBytes = 256 * kRowBytes;
constexpr int kStageAlignment = 1024;  // the swizzle repeats after 8 rows and starts at a multiple of them
constexpr int kSharedBytes = kStages * kStageBytes + kStageAlignment;
constexpr int kWgmmaThreads = 256;
constexpr int kMmaThreads = 512;
constexpr int kFragmentWords = 16;  // 32-bit words of an operand that a thread holds: four instructions' worth
constexpr int kOperandWords = kStages * kStageBytes / 4 + kWgmmaThreads * kFragmentWords;
static_assert(kOperandWords >= 2 * kMmaThreads * kFragmentWords, "mma.sync takes A and B from the same buffer");

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "bench_peaks: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

}  // namespace

// Not in the namespace without a name: code for sm_80 has no use for the first four, which would be a warning.
namespace quest::bench {

// ---- the instructions: d += a b^T. kDepth: elements of K; kTerms: products in one sum; kOnes: a word whose elements are all 1 ----

#define QUEST_ACCUMULATORS                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define QUEST_FOUR(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define QUEST_SIXTEEN(c, i) QUEST_FOUR(c, i), QUEST_FOUR(c, i + 4), QUEST_FOUR(c, i + 8), QUEST_FOUR(c, i + 12)
#define QUEST_ALL(c)                                                                                                                 \
  QUEST_SIXTEEN(c, 0), QUEST_SIXTEEN(c, 16), QUEST_SIXTEEN(c, 32), QUEST_SIXTEEN(c, 48), QUEST_SIXTEEN(c, 64), QUEST_SIXTEEN(c, 80), \
      QUEST_SIXTEEN(c, 96), QUEST_SIXTEEN(c, 112)
// d[64, 256] over four warps; the predicate says that d is added to, not overwritten.
#define QUEST_WGMMA(instruction, tail, constraint)                                                                                    \
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; " instruction " " QUEST_ACCUMULATORS "{%128, %129, %130, %131}, %132, " tail \
               "; }"                                                                                                                  \
               : QUEST_ALL(constraint)                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata))

struct WgmmaInt8 {
  using Accumulator = uint32_t;
  static constexpr int kDepth = 32, kTerms = 32, kStepBytes = 32;  // kStepBytes: of each row of B
  static constexpr uint32_t kOnes = 0x01010101;
  static __device__ __forceinline__ void issue(uint32_t (&d)[128], const uint32_t* a, uint64_t b, uint32_t metadata) {
    QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8", "add", "+r");
  }
};

struct WgmmaBits {
  using Accumulator = uint32_t;
  static constexpr int kDepth = 256, kTerms = 256, kStepBytes = 32;
  static constexpr uint32_t kOnes = 0xffffffff;
  static __device__ __forceinline__ void issue(uint32_t (&d)[128], const uint32_t* a, uint64_t b, uint32_t metadata) {
    QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc", "add", "+r");
  }
};

struct WgmmaSparseInt8 {  // `metadata`: the places, of 4, of the two stored values, two bits each
  using Accumulator = uint32_t;
  static constexpr int kDepth = 64, kTerms = 32, kStepBytes = 64;
  static constexpr uint32_t kOnes = 0x01010101;
  static __device__ __forceinline__ void issue(uint32_t (&d)[128], const uint32_t* a, uint64_t b, uint32_t metadata) {
    QUEST_WGMMA("wgmma.mma_async.sp.sync.aligned.m64n256k64.s32.s8.s8", "%133, 0, add", "+r");
  }
};

struct WgmmaBFloat16 {
  using Accumulator = float;
  static constexpr int kDepth = 16, kTerms = 16, kStepBytes = 32;
  static constexpr uint32_t kOnes = 0x3f803f80;
  static __device__ __forceinline__ void issue(float (&d)[128], const uint32_t* a, uint64_t b, uint32_t metadata) {
    QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "add, 1, 1, 0", "+f");
  }
};

#define QUEST_MMA(instruction, constraint)                                                    \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

struct MmaInt8 {  // d[16, 8] over one warp
  using Accumulator = uint32_t;
  static constexpr int kDepth = 32;
  static constexpr uint32_t kOnes = 0x01010101;
  static __device__ __forceinline__ void issue(uint32_t (&d)[4], const uint32_t* a, const uint32_t* b) {
    QUEST_MMA("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "+r");
  }
};

struct MmaBits {
  using Accumulator = uint32_t;
  static constexpr int kDepth = 256;
  static constexpr uint32_t kOnes = 0xffffffff;
  static __device__ __forceinline__ void issue(uint32_t (&d)[4], const uint32_t* a, const uint32_t* b) {
    QUEST_MMA("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", "+r");
  }
};

struct MmaBFloat16 {
  using Accumulator = float;
  static constexpr int kDepth = 16;
  static constexpr uint32_t kOnes = 0x3f803f80;
  static __device__ __forceinline__ void issue(float (&d)[4], const uint32_t* a, const uint32_t* b) {
    QUEST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
  }
};

}  // namespace quest::bench

namespace {

using namespace quest::bench;

// ---- the kernels: `iterations` passes over the operands; result[thread] = the sum of its accumulators ----

template <class Instruction>
constexpr int wgmmas_per_iteration() {
  return kStages * kRowBytes / Instruction::kStepBytes;
}

template <class Instruction>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_kernel(const uint32_t* operands, const uint32_t* metadata, int iterations, typename Instruction::Accumulator* result) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t aligned = (base + kStageAlignment - 1) / kStageAlignment * kStageAlignment;
  auto* words = reinterpret_cast<uint32_t*>(shared + (aligned - base));
  for (int i = threadIdx.x; i < kStages * kStageBytes / 4; i += kWgmmaThreads) words[i] = operands[i];
  uint32_t a[kFragmentWords];
  for (int i = 0; i < kFragmentWords; ++i) a[i] = operands[kStages * kStageBytes / 4 + threadIdx.x * kFragmentWords + i];
  const uint32_t places = metadata[threadIdx.x];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what ordinary stores wrote
  __syncthreads();

  typename Instruction::Accumulator d[128] = {};
  // Matrix descriptor: address / 16, 1024 bytes / 16 from 8 rows to the next 8, and kind 1, the 128-byte swizzle.
  const uint64_t descriptor = (uint64_t{1} << 62) | (uint64_t{kStageAlignment / 16} << 32) | (uint64_t{1} << 16) | (aligned >> 4);
  constexpr int kSteps = kRowBytes / Instruction::kStepBytes;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Instruction::issue(d, a + 4 * step, descriptor + (stage * kStageBytes + step * Instruction::kStepBytes) / 16, places);
      }
    }
    // Waiting for all of them costs nothing: the other warpgroup's are queued meanwhile.
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  typename Instruction::Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) sum += d[i];
  result[blockIdx.x * kWgmmaThreads + threadIdx.x] = sum;
#endif
}

constexpr int kMmasPerIteration = 16;

template <class Instruction>
__global__ void __launch_bounds__(kMmaThreads, 1)
    mma_kernel(const uint32_t* operands, const uint32_t* /*metadata*/, int iterations, typename Instruction::Accumulator* result) {
  uint32_t a[kFragmentWords], b[kFragmentWords];
  for (int i = 0; i < kFragmentWords; ++i) {
    a[i] = operands[threadIdx.x * kFragmentWords + i];
    b[i] = operands[(kMmaThreads + threadIdx.x) * kFragmentWords + i];
  }
  typename Instruction::Accumulator d[kMmasPerIteration][4] = {};
  for (int iteration = 0; iteration < iterations; ++iteration) {
#pragma unroll
    for (int i = 0; i < kMmasPerIteration; ++i) Instruction::issue(d[i], a + i / 4 * 4, b + i % 4 * 4);
  }
  typename Instruction::Accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kMmasPerIteration; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  result[blockIdx.x * kMmaThreads + threadIdx.x] = sum;
}

// ---- measuring ----

// Milliseconds of `calls` calls.
template <class Launch>
double elapsed_ms(int calls, const Launch& launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaEventRecord(start), "record");
  for (int i = 0; i < calls; ++i) launch();
  check(cudaEventRecord(end), "record");
  check(cudaEventSynchronize(end), "kernel");
  float elapsed = 0;
  check(cudaEventElapsedTime(&elapsed, start, end), "time");
  check(cudaEventDestroy(start), "event");
  check(cudaEventDestroy(end), "event");
  return elapsed;
}

struct Sustained {
  double call_ms;
  double timed_ms;  // over all timed calls
};

// `estimate_ms`: of one call, for counting them.
template <class Launch>
Sustained sustained(double estimate_ms, const Launch& launch) {
  const int warmup_calls = static_cast<int>(kWarmupMs / estimate_ms) + 1;
  const double warm_ms = elapsed_ms(warmup_calls, launch) / warmup_calls;
  const int calls = static_cast<int>(kTimedMs / warm_ms) + 1;
  const double timed_ms = elapsed_ms(calls, launch);
  return {timed_ms / calls, timed_ms};
}

struct Device {
  cudaDeviceProp properties;
  uint32_t* operands;
  uint32_t* metadata;
  void* result;
};

void print_row(const Device& device, const std::string& peak, double value, const char* unit, double timed_ms) {
  std::printf("%s,%.1f,%s,%.0f,%s\n", peak.c_str(), value, unit, timed_ms, device.properties.name);
  std::fflush(stdout);
}

enum class Values { kBits, kFourBit, kBFloat16 };

// The odd integer that stands for x, of standard deviation 1, on the int4 grid: 15 at 2.5139 and above.
uint32_t int4_value(double x) {
  const int code = static_cast<int>(std::floor(x * 15 / (2 * 2.513930578568423))) + 8;
  return static_cast<uint32_t>(2 * std::clamp(code, 0, 15) - 15);
}

// Words of random elements.
std::vector<uint32_t> random_words(Values values) {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  std::vector<uint32_t> words(kOperandWords);
  for (uint32_t& word : words) {
    word = generator();
    if (values == Values::kFourBit) {
      word = 0;
      for (int i = 0; i < 32; i += 8) word |= (int4_value(normal(generator)) & 0xff) << i;
    } else if (values == Values::kBFloat16) {  // magnitudes of 0.5 to 2: no infinity among them
      word = (word & 0x807f807f) | 0x3f003f00 | (generator() & 0x00800080);
    }
  }
  return words;
}

// Each nibble: two different places of four, the lower first.
std::vector<uint32_t> random_metadata() {
  constexpr uint32_t kPairs[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};
  std::mt19937 generator(1);
  std::vector<uint32_t> words(kWgmmaThreads, 0);
  for (uint32_t& word : words) {
    for (int nibble = 0; nibble < 8; ++nibble) word |= kPairs[generator() % 6] << (4 * nibble);
  }
  return words;
}

// `operations`: of one block in one iteration. `ones_sum`: of a thread's accumulators after one iteration on ones.
template <class Accumulator>
void measure(const Device& device, const std::string& peak, void (*kernel)(const uint32_t*, const uint32_t*, int, Accumulator*),
             int threads, int shared_bytes, double operations, double ones_sum, uint32_t ones, Values values) {
  const int blocks = device.properties.multiProcessorCount;
  auto* result = static_cast<Accumulator*>(device.result);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  auto launch = [&](int iterations) {
    kernel<<<blocks, threads, shared_bytes>>>(device.operands, device.metadata, iterations, result);
    check(cudaGetLastError(), peak.c_str());
  };
  auto upload = [&](const std::vector<uint32_t>& words) {
    check(cudaMemcpy(device.operands, words.data(), words.size() * 4, cudaMemcpyHostToDevice), "copy");
  };

  upload(std::vector<uint32_t>(kOperandWords, ones));
  check(cudaMemset(result, 0xff, size_t(blocks) * threads * sizeof(Accumulator)), "fill");
  launch(1);
  std::vector<Accumulator> sums(size_t(blocks) * threads);
  check(cudaMemcpy(sums.data(), result, sums.size() * sizeof(Accumulator), cudaMemcpyDeviceToHost), peak.c_str());
  for (Accumulator sum : sums) {
    if (double(sum) == ones_sum) continue;
    std::fprintf(stderr, "bench_peaks: %s: a thread's products of ones sum to %.0f, expected %.0f; left out\n", peak.c_str(), double(sum),
                 ones_sum);
    return;
  }

  upload(random_words(values));
  constexpr int kProbe = 1000;
  launch(kProbe);
  const int iterations = static_cast<int>(kProbe * kLaunchMs / elapsed_ms(1, [&] { launch(kProbe); })) + 1;
  const Sustained time = sustained(kLaunchMs, [&] { launch(iterations); });
  print_row(device, peak, operations * iterations * blocks / time.call_ms * 1e-9, "TOPS", time.timed_ms);
}

template <class Instruction>
void measure_wgmma(const Device& device, const std::string& peak, Values values) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, wgmma_kernel<Instruction>), "attributes");
  if (device.properties.major != 9 || attributes.ptxVersion < 90) return;  // no wgmma here, or none compiled in
  const double count = wgmmas_per_iteration<Instruction>();
  measure(device, peak, wgmma_kernel<Instruction>, kWgmmaThreads, kSharedBytes, 2.0 * count * 2 * 64 * 256 * Instruction::kDepth,
          count * 128 * Instruction::kTerms, Instruction::kOnes, values);
}

template <class Instruction>
void measure_mma(const Device& device, const std::string& peak, Values values) {
  const double count = kMmasPerIteration;
  measure(device, peak, mma_kernel<Instruction>, kMmaThreads, 0, 2.0 * count * (kMmaThreads / 32) * 16 * 8 * Instruction::kDepth,
          count * 4 * Instruction::kDepth, Instruction::kOnes, values);
}

// Bytes that differ from their neighbours, so that a copy cannot be compressed.
__global__ void fill(uint32_t* words, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    words[i] = static_cast<uint32_t>(i * 2654435761u) ^ static_cast<uint32_t>(i >> 7);
  }
}

void measure_copy(const Device& device) {
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "memory");
  const size_t bytes = std::min(kCopyBytes, free_bytes / 4);
  void *source, *target;
  check(cudaMalloc(&source, bytes), "memory");
  check(cudaMalloc(&target, bytes), "memory");
  fill<<<device.properties.multiProcessorCount * 8, 256>>>(static_cast<uint32_t*>(source), bytes / 4);
  check(cudaGetLastError(), "fill");
  const Sustained time = sustained(1.0, [&] { check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice), "copy"); });
  check(cudaFree(source), "free");
  check(cudaFree(target), "free");
  print_row(device, "copy", 2.0 * bytes / time.call_ms * 1e-6, "GB/s", time.timed_ms);
}

}  // namespace

int main() {
  Device device;
  check(cudaGetDeviceProperties(&device.properties, 0), "device");
  check(cudaMalloc(&device.operands, kOperandWords * 4), "memory");
  check(cudaMalloc(&device.result, size_t(device.properties.multiProcessorCount) * kMmaThreads * 4), "memory");
  const std::vector<uint32_t> metadata = random_metadata();
  check(cudaMalloc(&device.metadata, metadata.size() * 4), "memory");
  check(cudaMemcpy(device.metadata, metadata.data(), metadata.size() * 4, cudaMemcpyHostToDevice), "copy");

  std::printf("peak,value,unit,milliseconds,gpu\n");
  measure_copy(device);
  // The slower unit first: it warms the chip, whose clock falls by some percent within the first second.
  measure_mma<MmaInt8>(device, "mma_s8", Values::kBits);
  measure_mma<MmaBits>(device, "mma_b1", Values::kBits);
  measure_mma<MmaBFloat16>(device, "mma_bf16", Values::kBFloat16);
  measure_wgmma<WgmmaInt8>(device, "wgmma_s8", Values::kBits);
  measure_wgmma<WgmmaInt8>(device, "wgmma_s8_4bit", Values::kFourBit);
  measure_wgmma<WgmmaBits>(device, "wgmma_b1", Values::kBits);
  measure_wgmma<WgmmaSparseInt8>(device, "wgmma_sparse_s8", Values::kBits);
  measure_wgmma<WgmmaBFloat16>(device, "wgmma_bf16", Values::kBFloat16);
  return 0;
}
