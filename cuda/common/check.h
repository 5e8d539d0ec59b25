// The host side of a launch: which device this is, and every CUDA error as a quest::Error that names the operation.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "quest/check.h"

namespace quest::cuda {

inline void check_cuda(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": CUDA error ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

struct Device {
  int32_t compute_capability;  // 90 for 9.0
  int32_t sm_count;
  int64_t shared_bytes;  // a thread block can ask for
  bool hopper_code;      // the code of sm_90a runs here: it was built, and this is 9.0
};

// The current device; throws unless the kernels run on it. (Each launch asks, some of them twice, so a thread remembers its last one.)
inline Device current_device(const char* op) {
#ifdef QUEST_HAS_SM90A
  constexpr bool kHasHopperCode = true;
#else
  constexpr bool kHasHopperCode = false;
#endif
  thread_local int known = -1;
  thread_local Device result{};
  int device = 0, major = 0, minor = 0, sm_count = 0, shared_bytes = 0;
  check_cuda(op, cudaGetDevice(&device));
  if (device == known) return result;
  check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  check_cuda(op, cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
  check_cuda(op, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(major >= 8, op, ": expected a GPU of compute capability 8.0 or later, got ", major, ".", minor, "; move the tensors to the CPU");
  result = {10 * major + minor, sm_count, shared_bytes, kHasHopperCode && major == 9 && minor == 0};
  known = device;
  return result;
}

inline void check_aligned(const char* op, const char* argument, const void* pointer) {
  check(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, op, ": expected ", argument, " to start at a multiple of 16 bytes, got address ",
        pointer, "; pass a copy of it");
}

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Blocks of a one-dimensional grid, checked against what one launch can have.
inline dim3 grid_of(const char* op, int64_t blocks) {
  check(blocks <= INT32_MAX, op, ": expected a problem of at most ", INT32_MAX, " thread blocks, got ", blocks, "; split the rows");
  return dim3(static_cast<unsigned>(blocks));
}

// What a launch may ask for beyond its grid. cluster: thread blocks of a cluster along x. dependent: it may start before the kernel before
// it in the stream has ended, for it waits for that itself (ptx.cuh: wait_for_prerequisites): only where Device::hopper_code, since older
// code has no such instruction.
struct LaunchOptions {
  int cluster = 1;
  bool dependent = false;
};

template <typename... Parameters, typename... Arguments>
void launch_with(const LaunchOptions& options, const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                 cudaStream_t stream, const Arguments&... arguments) {
  // Beyond 48 KB only for the asking. What is asked for belongs to the kernel, not to this launch, and another thread may be launching it
  // with another size: therefore always as good as all that there is (a KB is left for static shared memory).
  if (shared_bytes > 48 * 1024) {
    const int64_t bytes = std::max(static_cast<int64_t>(shared_bytes), current_device(op).shared_bytes - 1024);
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (options.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(options.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (options.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_with({}, op, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace quest::cuda
