// The blockwise Hadamard rotation on the GPU: quest/rotation.h says what it computes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quest/rotation.h"

namespace quest::cuda {

// x, y: device memory. Asynchronous on `stream`; allocates nothing.
void hadamard(const void* x, void* y, DType dtype, int64_t rows, int64_t k, int64_t block, cudaStream_t stream);

}  // namespace quest::cuda
