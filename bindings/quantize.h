// quantize as the other bindings call it: `linear` quantizes its activation before the product.
#pragma once

#include "arguments.h"
#include "backend.h"

namespace quest::bindings {

struct Quantized {
  Tensor codes;
  Tensor scale;
  Tensor code_sum;
  Tensor mask;
  Tensor index;
};

// Shape of the integers a layout stores for [*lead, k] values.
Shape codes_shape(const Quantizer& quantizer, Layout layout, const Shape& lead, int64_t k);

// x: [*lead, k], real. Checks every argument in the name of `op`.
Quantized quantize(const char* op, const Tensor& x, const Quantizer& quantizer, Layout layout, bool mask);

}  // namespace quest::bindings
