// What the GPU benchmarks share: device memory that is rotated past the cache, timing, and rows of CSV.
//
// A measurement is a CUDA graph of many launches, so that the host's time to launch is not in it. Each launch takes the next of enough
// buffers to exceed the L2 several times. After half a second that is not counted, `kRounds` replays are timed with events; the median and
// the spread (interquartile range over median) are kept. The limit is a plain device copy that moves as many bytes (read + written) over
// the same memory, measured right before.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "quest/types.h"

namespace quest::bench {

constexpr int kRounds = 11;
constexpr double kRoundUs = 4000;                   // what a replay should take at least: far more than the events' resolution
constexpr size_t kArenaBytes = size_t{1} << 30;     // of sources, and of destinations
constexpr size_t kFlightBytes = size_t{512} << 20;  // what the buffers of a problem exceed together: several times the L2
constexpr int kMostLaunches = 512;                  // in a graph
constexpr double kSettleMs = 500;                   // what the clock takes to settle behind other work

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "bench: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

inline void expect(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "bench: %s; nothing is timed\n", what.c_str());
  std::exit(1);
}

struct Times {
  double us, spread_pct;
};

struct Arena {
  uint8_t* source = nullptr;
  uint8_t* target = nullptr;
  Arena() {
    check(cudaMalloc(reinterpret_cast<void**>(&source), kArenaBytes), "cudaMalloc");
    check(cudaMalloc(reinterpret_cast<void**>(&target), kArenaBytes), "cudaMalloc");
  }
  ~Arena() {
    cudaFree(source);
    cudaFree(target);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
};

// Of sizes, so that what follows in the same buffer is as aligned as the buffer.
inline constexpr int64_t kAlignment = 256;

// Buffers of `bytes` that fit both arenas and are in flight together.
inline int buffer_count(double bytes) {
  const double most = static_cast<double>(kArenaBytes) / bytes;
  const double enough = static_cast<double>(kFlightBytes) / bytes + 1;
  return static_cast<int>(std::max(1.0, std::min({most, enough, double{kMostLaunches}})));
}

// Microseconds of one of `launches` launches that `capture` makes a graph of, which is replayed `replays` times in a row.
inline Times time_graph(const std::function<void(cudaStream_t)>& capture, int launches, int replays) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  capture(stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  double elapsed_ms = 0;
  while (times.size() < kRounds) {
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    for (int i = 0; i < replays; ++i) check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaStreamSynchronize(stream), "the timed launches");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (elapsed_ms >= kSettleMs) times.push_back(1e3 * ms / launches / replays);
    elapsed_ms += ms;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::sort(times.begin(), times.end());
  const double median = times[kRounds / 2];
  return {median, 100 * (times[kRounds * 3 / 4] - times[kRounds / 4]) / median};
}

// launch(stream, i): the i-th launch. Microseconds of one of many in one graph.
inline Times time_launches(const std::function<void(cudaStream_t, int)>& launch, double expected_us) {
  const int launches = static_cast<int>(std::max(4.0, std::min(kRoundUs / expected_us, double{kMostLaunches})));
  auto capture = [&](cudaStream_t stream) {
    for (int i = 0; i < launches; ++i) launch(stream, i);
  };
  return time_graph(capture, launches, 1);
}

// A device copy that reads and writes `bytes` in all.
inline Times time_copy(const Arena& arena, double bytes) {
  const size_t half = static_cast<size_t>(bytes / 2) / 256 * 256;
  const int buffers = buffer_count(static_cast<double>(half));
  return time_launches(
      [&](cudaStream_t stream, int i) {
        const size_t offset = i % buffers * half;
        check(cudaMemcpyAsync(arena.target + offset, arena.source + offset, half, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
      },
      bytes / 2.5e6);
}

inline const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

inline std::string gpu_name() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
}

inline void print_header() { std::printf("case,backend,shape,dtype,time_us,spread_pct,gbps,limit_us,share_of_limit,gpu\n"); }

// bytes: read + written by one launch. limit_us: of the copy; 0: none.
inline void print_row(const std::string& name, const std::string& backend, const std::string& shape, const std::string& dtype, Times times,
                      double bytes, double limit_us) {
  std::printf("%s,%s,%s,%s,%.2f,%.1f,%.0f,%.2f,%.3f,%s\n", name.c_str(), backend.c_str(), shape.c_str(), dtype.c_str(), times.us,
              times.spread_pct, bytes / times.us / 1e3, limit_us, limit_us / times.us, gpu_name().c_str());
  std::fflush(stdout);
}

// Normally distributed values of dtype in all of the arena's source.
template <typename Value>
__global__ void fill_normal_kernel(Value* values, int64_t count) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    // SplitMix64 of the position, then Box and Muller.
    uint64_t z = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float u = (static_cast<float>(z >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(z & 0xFFFFFFu) * 0x1p-24f;
    values[i] = static_cast<Value>(sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}

template <typename Value>
void fill_normal(const Arena& arena) {
  fill_normal_kernel<<<2048, 256>>>(reinterpret_cast<Value*>(arena.source), static_cast<int64_t>(kArenaBytes / sizeof(Value)));
  check(cudaDeviceSynchronize(), "filling the arena");
}

inline std::vector<uint8_t> to_host(const void* device, int64_t bytes) {
  std::vector<uint8_t> host(bytes);
  check(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return host;
}

}  // namespace quest::bench
