// The blockwise Hadamard rotation y = x blockdiag(H/sqrt(B)), Sylvester order, along the last dimension. Symmetric, so its own inverse.
#pragma once

#include <cstdint>

#include "quest/parallel.h"
#include "quest/types.h"

namespace quest {

inline constexpr int64_t kHadamardBlock = 128;
inline constexpr int64_t kMaxHadamardBlock = 32768;

// 128 where it divides k, else the largest power of two that divides k.
constexpr int64_t default_block(int64_t k) { return k % kHadamardBlock == 0 ? kHadamardBlock : (k & -k); }

// Throws quest::Error unless `block` is one that `hadamard` takes for a last dimension k.
void check_block(int64_t k, int64_t block);

// x, y: [rows, k] of dtype, contiguous; may be the same. block: a power of two, 1 ... 32768, that divides k. Computed in float32.
void hadamard(const void* x, void* y, DType dtype, int64_t rows, int64_t k, int64_t block, const ParallelFor& parallel_for);

}  // namespace quest
