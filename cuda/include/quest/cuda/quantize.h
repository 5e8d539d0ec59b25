// quantize, dequantize and quantize_backward on the GPU: quest/quantize.h says what they compute.
//
// All pointers are device memory. Asynchronous on `stream`; nothing is allocated, nothing synchronised, and the result does not depend on
// how the work is scheduled. Rows that are padded in memory (kPacked, kPlanes, masks, indices) must start at a multiple of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quest/quantize.h"

namespace quest::cuda {

void quantize(const Quantizer& quantizer, Layout layout, const void* x, DType dtype, int64_t rows, int64_t k, const QuantizeOutput& output,
              cudaStream_t stream, const Prologue& prologue = {});

void dequantize(const Quantizer& quantizer, Layout layout, const void* codes, const float* scale, const uint8_t* index, void* y,
                DType dtype, int64_t rows, int64_t k, cudaStream_t stream);

void quantize_backward(const Quantizer& quantizer, const void* grad, const uint8_t* mask, void* dx, DType dtype, int64_t rows, int64_t k,
                       cudaStream_t stream);

}  // namespace quest::cuda
