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

// What is done to x first (quest::Prologue): the weight of rms_norm, [k] in the dtype of x.
struct PrologueArguments {
  PrologueKind kind = PrologueKind::kNone;
  std::optional<Tensor> weight;
  double epsilon = 0;
};

// The k of [*lead, k] values that quantize makes of x. Throws where silu_mul cannot halve it.
int64_t quantized_width(const char* op, const Tensor& x, PrologueKind prologue);

// x: [*lead, k], or [*lead, 2k] where prologue is silu_mul, real. Checks every argument in the name of `op`.
Quantized quantize(const char* op, const Tensor& x, const Quantizer& quantizer, Layout layout, bool mask,
                   const PrologueArguments& prologue);

}  // namespace quest::bindings
