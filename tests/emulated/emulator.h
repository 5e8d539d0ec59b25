// A GPU on the host, for machines without one: the kernels of cuda/ compiled by the C++ compiler, each of their threads a thread of the
// host, clusters one after another. What they take of CUDA C++ is here, what they take of PTX in common/: files of the names that
// cuda/common has, found before those.
//
// It shows wrong sums, operands in a wrong order and waits that never end; built with -fsanitize=thread also races. It shows nothing of
// what the CUDA compiler makes of a kernel, and nothing of time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace quest::emulated {

constexpr int kWarp = 32, kWarpgroup = 128, kMostThreads = 1024;
constexpr int kSharedBytes = 227 * 1024;  // a thread block of Hopper can ask for

// How many the GPU has: few, so that a block makes several tiles of a small product. And which it is.
inline int multiprocessors = 4, compute_capability = 90;

// What several threads wait for. A wait that takes a minute is one that never ends.
class Meeting {
 public:
  std::mutex mutex;

  template <typename Condition>
  void wait(std::unique_lock<std::mutex>& lock, Condition condition) {
    if (changed_.wait_for(lock, std::chrono::minutes(1), condition)) return;
    std::fprintf(stderr, "emulated: a barrier has not been reached for a minute\n");
    std::abort();
  }
  void notify() { changed_.notify_all(); }

 private:
  std::condition_variable changed_;
};

// bar.sync and bar.arrive, of the named barriers and of everything else that some number of threads reach together.
class Barrier {
 public:
  // The phase that ends when all threads have arrived.
  long arrive(Meeting& meeting, int threads) {
    const std::lock_guard<std::mutex> lock(meeting.mutex);
    const long phase = phase_;
    if (++arrived_ == threads) {
      arrived_ = 0;
      ++phase_;
      meeting.notify();
    }
    return phase;
  }
  void wait(Meeting& meeting, long phase) {
    std::unique_lock<std::mutex> lock(meeting.mutex);
    meeting.wait(lock, [&] { return phase_ != phase; });
  }
  void sync(Meeting& meeting, int threads) { wait(meeting, arrive(meeting, threads)); }

 private:
  int arrived_ = 0;
  long phase_ = 0;
};

struct Cluster;

struct Block {
  Meeting meeting;
  Barrier named[16], warps[kMostThreads / kWarp], warpgroups[kMostThreads / kWarpgroup];
  // What the lanes of a warp, the threads of a warpgroup show each other within one instruction.
  uint32_t lanes[kMostThreads / kWarp][kWarp][6];
  uint32_t operands[kMostThreads / kWarpgroup][64][8], metadata[kMostThreads / kWarpgroup][64][2];
  Cluster* cluster = nullptr;
  int rank = 0;
  std::atomic<int> running{0};  // threads
  alignas(1024) uint8_t shared[kSharedBytes];

  void sync_warp(int thread) { warps[thread / kWarp].sync(meeting, kWarp); }
  void sync_warpgroup(int thread) { warpgroups[thread / kWarpgroup].sync(meeting, kWarpgroup); }
};

// An mbarrier: a phase ends when all arrivals and all bytes are there.
struct CountingBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Cluster {
  Meeting meeting;
  Barrier barrier;
  std::vector<Block*> blocks;
  int threads = 0;

  // The mbarriers of all blocks, by the address of their 8 bytes.
  Meeting counting;
  std::map<const void*, CountingBarrier> counters;
};

struct Index {
  int x = 0, y = 0, z = 0;
};
inline thread_local Block* block = nullptr;
inline thread_local long cluster_phase = 0;  // that this thread has arrived at
inline thread_local Index thread_index, block_index, block_size, grid_size;
inline int thread() { return thread_index.y * block_size.x + thread_index.x; }  // of the block

}  // namespace quest::emulated

// ---- CUDA C++

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __maxnreg__
#undef __forceinline__
#define __shared__ static  // so thread blocks run one after another; not poisoned: what the block before left is still there
#define __launch_bounds__(...)
#define __grid_constant__
#define __maxnreg__(...)
#define __forceinline__ inline
#define threadIdx quest::emulated::thread_index
#define blockIdx quest::emulated::block_index
#define blockDim quest::emulated::block_size
#define gridDim quest::emulated::grid_size

using std::max;
using std::min;

inline void __syncthreads() { quest::emulated::block->named[0].sync(quest::emulated::block->meeting, blockDim.x * blockDim.y); }
inline void __syncwarp() { quest::emulated::block->sync_warp(quest::emulated::thread()); }
inline void __nanosleep(unsigned) {}
inline int __shfl_sync(unsigned, int value, int) { return value; }  // of what is the same in all lanes
[[noreturn]] inline void __trap() { std::abort(); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selectors >> 4 * i & 7;
    result |= ((byte < 4 ? low >> 8 * byte : high >> 8 * (byte - 4)) & 0xFF) << 8 * i;
  }
  return result;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
// In each half: max(min(a + b, c), 0).
inline uint32_t __viaddmin_s16x2_relu(uint32_t a, uint32_t b, uint32_t c) {
  auto half = [&](int shift) {
    auto value = [&](uint32_t pair) { return static_cast<int16_t>(pair >> shift); };
    return static_cast<uint32_t>(max(min(static_cast<int16_t>(value(a) + value(b)), value(c)), int16_t{0})) << shift;
  };
  return half(0) | half(16);
}
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xFF) * (b >> i & 0xFF);
  return sum;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16; }
template <typename T>
T atomicAdd(T* target, T value) {
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T* target, T value) {
  T found = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (found < value && !__atomic_compare_exchange_n(target, &found, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
  return found;
}
