// cuda/common/check.h with a launch that runs the kernel on threads of the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "emulator.h"
#include "quest/check.h"

namespace quest::cuda {

inline void check_cuda(const char* op, cudaError_t error) { check(error == cudaSuccess, op, ": ", cudaGetErrorString(error)); }

struct Device {
  int32_t compute_capability;
  int32_t sm_count;
  int64_t shared_bytes;
  bool hopper_code;
};

inline Device current_device(const char*) {
  const int capability = emulated::compute_capability;
  return {capability, emulated::multiprocessors, emulated::kSharedBytes, capability == 90};
}

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
inline void check_aligned(const char* op, const char* argument, const void* pointer) {
  check(is_aligned(pointer, 16), op, ": expected ", argument, " to start at a multiple of 16 bytes");
}
inline dim3 grid_of(const char*, int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

struct LaunchOptions {
  int cluster = 1;
  bool dependent = false;
};

template <typename... Parameters, typename... Arguments>
void launch_with(const LaunchOptions& options, const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                 cudaStream_t, const Arguments&... arguments) {
  check(shared_bytes <= emulated::kSharedBytes && block.x * block.y <= emulated::kMostThreads, op, ": more than a thread block can have");
  const int blocks = static_cast<int>(grid.x), rows = static_cast<int>(grid.y), layers = static_cast<int>(grid.z);
  const int threads = static_cast<int>(block.x * block.y);
  for (int index = 0; index < blocks * rows * layers; index += options.cluster) {
    const int first = index % blocks, row = index / blocks % rows, layer = index / blocks / rows;
    emulated::Cluster cluster;
    cluster.threads = options.cluster * threads;
    std::vector<std::unique_ptr<emulated::Block>> owned;
    for (int rank = 0; rank < options.cluster; ++rank) {
      owned.push_back(std::make_unique<emulated::Block>());
      owned.back()->cluster = &cluster;
      owned.back()->rank = rank;
      owned.back()->running = threads;
      std::memset(owned.back()->shared, 0xA5, emulated::kSharedBytes);  // no zeros for the taking
      cluster.blocks.push_back(owned.back().get());
    }
    std::vector<std::thread> running;
    for (int rank = 0; rank < options.cluster; ++rank) {
      for (int thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, rank, thread] {
          emulated::block = cluster.blocks[rank];
          threadIdx = {thread % static_cast<int>(block.x), thread / static_cast<int>(block.x), 0};
          blockIdx = {first + rank, row, layer};
          blockDim = {static_cast<int>(block.x), static_cast<int>(block.y), 1};
          gridDim = {blocks, rows, layers};
          kernel(arguments...);
          --cluster.blocks[rank]->running;
        });
      }
    }
    for (std::thread& thread : running) thread.join();
    for (const auto& block_of : owned) {
      const uint8_t *end = block_of->shared + emulated::kSharedBytes, *rest = block_of->shared + shared_bytes;
      check(std::all_of(rest, end, [](uint8_t byte) { return byte == 0xA5; }), op, ": a thread block wrote beyond its ", shared_bytes,
            " bytes of shared memory");
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_with({}, op, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace quest::cuda
