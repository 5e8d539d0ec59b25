// The instructions of sm_90a that CUDA C++ has no name for: mbarriers, the bulk tensor copy engine (TMA), clusters and register budgets.
// One small function each; PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor", "Parallel Synchronization".
//
// Only code inside `#ifdef QUEST_SM90A` may call them: other architectures have none of these instructions.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QUEST_SM90A
#endif

namespace quest::cuda {

// ---- mbarriers: 8 bytes of shared memory that count arrivals and bytes; a phase ends when both are complete

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the other blocks of the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, after which the phase also waits for `bytes` to be copied.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival at the barrier at the same place in block `rank` of the cluster. It orders nothing between blocks beyond the barrier itself
// (release.cluster would cost a memory fence of the whole GPU each time): enough to say that something has been read.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra wait;\n"
      "finished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ bool barrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// An arrival at a named barrier (ptx.cuh) without a wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of the cluster in two halves and without a fence, for mbarriers that have been initialised, after barrier_init_fence: it orders
// nothing else.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync_relaxed() {
  cluster_arrive_relaxed();
  cluster_wait();
}

// 16 bytes to the same place in the shared memory of block `rank` of the cluster, whose barrier counts them.
__device__ __forceinline__ void store_async(uint32_t rank, void* target, const int32_t (&words)[4], uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b32 remote, counting;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counting, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [remote], {%3, %4, %5, %6}, [counting];\n}" ::"r"(
          shared_address(target)),
      "r"(shared_address(barrier)), "r"(rank), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// ---- the copy engine

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (column, row, plane) of a tensor to the second cache.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int column, int row, int plane) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(column), "r"(row), "r"(plane) : "memory");
}

// The box at (column, row, plane) of a tensor to the same place in every block of the cluster whose bit is set in `blocks`; each of their
// barriers counts the bytes that arrive there.
template <bool MULTICAST>
__device__ __forceinline__ void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int plane,
                                            uint16_t blocks) {
  if constexpr (MULTICAST) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], "
        "%6;" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane), "h"(blocks)
        : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                     shared_address(target)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane)
                 : "memory");
  }
}

// Both of a tensor of five dimensions, the load to this block.
__device__ __forceinline__ void tensor_prefetch_5d(const CUtensorMap* map, const int (&at)[5]) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]),
               "r"(at[3]), "r"(at[4])
               : "memory");
}
__device__ __forceinline__ void tensor_load_5d(void* target, const CUtensorMap* map, uint64_t* barrier, const int (&at)[5]) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
               : "memory");
}

// Shared memory to the box at (column, row); what lies outside the tensor is left out.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(shared_address(source)),
               "r"(column), "r"(row)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Orders this thread's ordinary writes to shared memory before what the copy engine or the tensor cores do next.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements, transposed on the way: lane l gives the address of row l % 8 of matrix l / 8 and holds, of each
// matrix, the elements of column l / 4 in rows 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void stmatrix_x4_transposed(void* shared, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- registers of the warps of one role
template <int COUNT>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace quest::cuda
