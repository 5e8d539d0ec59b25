// A whole in parts that are as equal as whole numbers are: each has `least`, and of the first parts `more` have one more.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quest::cuda {

struct Shares {
  int32_t least, more;
  __device__ __forceinline__ int first(int part) const { return part * least + min(part, more); }
  __device__ __forceinline__ int count(int part) const { return least + (part < more ? 1 : 0); }
  __host__ __device__ __forceinline__ int32_t most() const { return least + (more > 0 ? 1 : 0); }
};

inline Shares shares_of(int64_t whole, int64_t parts) { return {static_cast<int32_t>(whole / parts), static_cast<int32_t>(whole % parts)}; }

}  // namespace quest::cuda
