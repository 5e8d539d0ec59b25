// The order of a product's main loop: all of K for each pair of planes (one pair for operands that are no planes), pairs by falling i + j,
// so that sum 2^(i+j) P_ij is Horner's rule: the sums double whenever i + j falls.
#pragma once

#include <cstdint>

namespace quest::cuda {

struct Steps {
  int k_tiles;
  int a_planes, w_planes;

  __device__ __forceinline__ int count() const { return k_tiles * a_planes * w_planes; }
  // Of the pairs with i + j = sum.
  __device__ __forceinline__ int count_of(int sum) const { return k_tiles * (min(sum, a_planes - 1) - max(sum - w_planes + 1, 0) + 1); }
};

class StepCursor {
 public:
  __device__ __forceinline__ explicit StepCursor(const Steps& steps)
      : a_plane(steps.a_planes - 1), w_plane(steps.w_planes - 1), steps_(steps) {}

  // True when the new step exists and belongs to the next lower a_plane + w_plane.
  __device__ __forceinline__ bool advance() {
    if (++k_tile < steps_.k_tiles) return false;
    k_tile = 0;
    ++a_plane;
    --w_plane;
    if (a_plane < steps_.a_planes && w_plane >= 0) return false;
    const int sum = a_plane + w_plane - 1;
    a_plane = sum < steps_.w_planes ? 0 : sum - (steps_.w_planes - 1);
    w_plane = sum - a_plane;
    return sum >= 0;
  }

  int k_tile = 0, a_plane, w_plane;

 private:
  Steps steps_;
};

}  // namespace quest::cuda
