// cuda/common/hopper.cuh on the host: copies happen when they are started, and tell their barrier at once.
#pragma once

#include <cuda.h>

#include "common/ptx.cuh"
#include "common/tensor_map.h"

#define QUEST_SM90A

namespace quest::cuda {

// ---- mbarriers
template <typename Change>
void change_barrier(const void* barrier, Change change) {
  emulated::Cluster& cluster = *emulated::block->cluster;
  const std::lock_guard<std::mutex> lock(cluster.counting.mutex);
  emulated::CountingBarrier& counter = cluster.counters[barrier];
  change(counter);
  if (counter.pending < 0) std::abort();  // more arrivals than it was made for
  if (counter.pending == 0 && counter.bytes == 0) {
    counter.phase ^= 1;
    counter.pending = counter.expected;
    cluster.counting.notify();
  }
}
inline void* in_block(const void* shared, int rank) {
  emulated::Block& block = *emulated::block->cluster->blocks[rank];
  if (block.running == 0) std::abort();  // its shared memory is another block's by now
  return block.shared + shared_address(shared);
}
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  change_barrier(barrier, [&](auto& counter) { counter = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0}; });
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  change_barrier(barrier, [&](auto& counter) { counter.bytes += bytes, --counter.pending; });
}
inline void barrier_arrive(const void* barrier) {
  change_barrier(barrier, [](auto& counter) { --counter.pending; });
}
inline void barrier_arrive(uint64_t* barrier, uint32_t rank) { barrier_arrive(in_block(barrier, static_cast<int>(rank))); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulated::Cluster& cluster = *emulated::block->cluster;
  std::unique_lock<std::mutex> lock(cluster.counting.mutex);
  const emulated::CountingBarrier& counter = cluster.counters.at(barrier);
  cluster.counting.wait(lock, [&] { return counter.phase != parity; });
}

inline bool barrier_test(uint64_t* barrier, uint32_t parity) {
  std::this_thread::yield();
  emulated::Cluster& cluster = *emulated::block->cluster;
  const std::lock_guard<std::mutex> lock(cluster.counting.mutex);
  return cluster.counters.at(barrier).phase != parity;
}

inline void named_barrier_arrive(int id, int threads) { emulated::block->named[id].arrive(emulated::block->meeting, threads); }

// ---- clusters
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulated::block->rank); }
inline void cluster_arrive_relaxed() {
  emulated::Cluster& cluster = *emulated::block->cluster;
  emulated::cluster_phase = cluster.barrier.arrive(cluster.meeting, cluster.threads);
}
inline void cluster_wait() {
  emulated::Cluster& cluster = *emulated::block->cluster;
  cluster.barrier.wait(cluster.meeting, emulated::cluster_phase);
}
inline void cluster_sync_relaxed() {
  cluster_arrive_relaxed();
  cluster_wait();
}

inline void store_async(uint32_t rank, void* target, const int32_t (&words)[4], uint64_t* barrier) {
  std::memcpy(in_block(target, static_cast<int>(rank)), words, 16);
  change_barrier(in_block(barrier, static_cast<int>(rank)), [](auto& counter) { counter.bytes -= 16; });
}

// ---- the copy engine
inline uint32_t swizzled(uint32_t offset, int swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_128B: return offset ^ (offset >> 7 & 7) << 4;
    case CU_TENSOR_MAP_SWIZZLE_64B: return offset ^ (offset >> 7 & 3) << 4;
    case CU_TENSOR_MAP_SWIZZLE_32B: return offset ^ (offset >> 7 & 1) << 4;
    default: return offset;
  }
}

// What an instruction for tensors of `rank` dimensions finds: with another's map the engine reads something else.
inline TensorDescription described(const CUtensorMap* map, int rank) {
  const auto description = load<TensorDescription>(map);
  if (description.rank != rank) std::abort();
  return description;
}

// Calls copy(element in memory or nullptr, element in shared memory, bytes) for the box at `at`; returns its bytes.
template <typename Copy>
uint32_t for_box(const TensorDescription& description, uint8_t* shared, uint32_t offset, const int (&at)[kMostDimensions], Copy copy) {
  const int64_t bytes = description.stride[0];
  if (offset % 128 != 0) std::abort();  // the engine's alignment
  uint32_t done = 0;
  int i[kMostDimensions];
  for (i[4] = 0; i[4] < description.box[4]; ++i[4])
    for (i[3] = 0; i[3] < description.box[3]; ++i[3])
      for (i[2] = 0; i[2] < description.box[2]; ++i[2])
        for (i[1] = 0; i[1] < description.box[1]; ++i[1])
          for (i[0] = 0; i[0] < description.box[0]; ++i[0]) {
            uint8_t* element = description.base;
            for (int d = 0; d < kMostDimensions; ++d) {
              const int64_t index = at[d] + i[d];
              if (index < 0 || index >= description.size[d]) element = nullptr;
              if (element != nullptr) element += index * description.stride[d];
            }
            copy(element, shared + swizzled(offset + done, description.swizzle), bytes);
            done += static_cast<uint32_t>(bytes);
          }
  return done;
}

inline void load_box(uint16_t blocks, void* target, const TensorDescription& map, uint64_t* barrier, const int (&at)[kMostDimensions]) {
  const auto& all = emulated::block->cluster->blocks;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    const uint32_t bytes =
        for_box(map, all[rank]->shared, shared_address(target), at, [](const uint8_t* memory, uint8_t* shared, int64_t n) {
          memory != nullptr ? std::memcpy(shared, memory, n) : std::memset(shared, 0, n);
        });
    change_barrier(in_block(barrier, static_cast<int>(rank)), [&](auto& counter) { counter.bytes -= bytes; });
  }
}
inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tensor_prefetch(const CUtensorMap* map, int, int, int) { described(map, 3); }
template <bool MULTICAST>
void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int plane, uint16_t blocks) {
  load_box(MULTICAST ? blocks : static_cast<uint16_t>(1 << emulated::block->rank), target, described(map, 3), barrier,
           {column, row, plane, 0, 0});
}
inline void tensor_prefetch_5d(const CUtensorMap* map, const int (&)[5]) { described(map, 5); }
inline void tensor_load_5d(void* target, const CUtensorMap* map, uint64_t* barrier, const int (&at)[5]) {
  load_box(static_cast<uint16_t>(1 << emulated::block->rank), target, described(map, 5), barrier, at);
}
inline void tensor_store(const CUtensorMap* map, const void* source, int column, int row) {
  for_box(described(map, 2), emulated::block->shared, shared_address(source), {column, row, 0, 0, 0},
          [](uint8_t* memory, const uint8_t* shared, int64_t n) {
            if (memory != nullptr) std::memcpy(memory, shared, n);
          });
}
inline void bulk_commit() {}
template <int PENDING>
void bulk_wait_read() {}
inline void async_proxy_fence() {}

inline void stmatrix_x4_transposed(void* shared, const uint32_t (&words)[4]) {
  const int lane = threadIdx.x % emulated::kWarp;
  among_lanes({shared_address(shared)}, [&](auto& lanes) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const auto element = static_cast<uint16_t>(words[i] >> 16 * half);
        std::memcpy(emulated::block->shared + lanes[i * 8 + lane % 4 * 2 + half][0] + lane / 4 * 2, &element, 2);
      }
    }
  });
}

template <int COUNT>
void registers_grow() {}
template <int COUNT>
void registers_shrink() {}

}  // namespace quest::cuda
