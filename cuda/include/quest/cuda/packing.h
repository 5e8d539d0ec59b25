// pack and unpack on the GPU: quest/packing.h has the layouts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quest/packing.h"

namespace quest::cuda {

// codes, packed: device memory. pack waits for the stream once, to report a code that does not fit the grid (so it cannot be captured into
// a graph); `packed` serves as its scratch space meanwhile. unpack is asynchronous.
void pack(Grid grid, Layout layout, const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t k, cudaStream_t stream);
void unpack(Grid grid, Layout layout, const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t k, cudaStream_t stream);

}  // namespace quest::cuda
