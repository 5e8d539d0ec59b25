// What the CUDA tests share: a fixture that needs a GPU, device memory, and a way to run an operation on a stream or as a captured graph.
//
// Without a GPU every test is skipped and says so; with QUEST_REQUIRE_GPU=1 that is a failure.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "testing.h"

namespace quest::testing {

inline void cuda_ok(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    if (found) return;
    cudaGetLastError();
    const char* required = std::getenv("QUEST_REQUIRE_GPU");
    if (required != nullptr && std::string(required) == "1") FAIL() << "QUEST_REQUIRE_GPU=1, but no CUDA device was found";
    GTEST_SKIP() << "no CUDA device";
  }
};

// A copy of host values in device memory. `offset`: elements that lie before it, for addresses that no vector access may use.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values, int64_t offset = 0) : size_(static_cast<int64_t>(values.size())), offset_(offset) {
    cuda_ok(cudaMalloc(reinterpret_cast<void**>(&base_), (size_ + offset_ + 1) * sizeof(T)));
    cuda_ok(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
    cuda_ok(cudaDeviceSynchronize());  // the copy may have returned before it has landed, and a stream that does not block would not wait
  }
  // Filled with a pattern that no operation may leave behind.
  explicit OnDevice(int64_t size, int64_t offset = 0) : OnDevice(std::vector<T>(size, static_cast<T>(0x5A)), offset) {}
  ~OnDevice() { cudaFree(base_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return base_ + offset_; }
  int64_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    cuda_ok(cudaDeviceSynchronize());
    cuda_ok(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  int64_t size_, offset_;
  T* base_ = nullptr;
};

class Stream {
 public:
  Stream() { cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Captures body(stream) into a graph and launches the graph once, after all that was launched before on other streams.
template <typename Body>
void run_captured(const Body& body) {
  cuda_ok(cudaDeviceSynchronize());
  const Stream stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  body(stream);
  cuda_ok(cudaStreamEndCapture(stream, &graph));
  cuda_ok(cudaGraphInstantiate(&executable, graph, 0));
  cuda_ok(cudaGraphLaunch(executable, stream));
  cuda_ok(cudaStreamSynchronize(stream));
  cuda_ok(cudaGraphExecDestroy(executable));
  cuda_ok(cudaGraphDestroy(graph));
}

// Share of elements in which two equally long vectors differ.
template <typename T>
double share_different(const std::vector<T>& expected, const std::vector<T>& got) {
  EXPECT_EQ(expected.size(), got.size());
  int64_t different = 0;
  for (size_t i = 0; i < expected.size() && i < got.size(); ++i) different += std::memcmp(&expected[i], &got[i], sizeof(T)) != 0 ? 1 : 0;
  return expected.empty() ? 0.0 : static_cast<double>(different) / static_cast<double>(expected.size());
}

}  // namespace quest::testing
