// Checks and conversions of tensor arguments. A message names the operation, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "quest/check.h"
#include "quest/types.h"

namespace quest::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string to_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline Shape shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// The dimensions before the last; their product is the number of rows.
inline Shape lead_shape(const Tensor& tensor) {
  Shape shape = shape_of(tensor);
  shape.pop_back();
  return shape;
}

inline int64_t product(const Shape& shape) {
  int64_t result = 1;
  for (int64_t size : shape) result *= size;
  return result;
}

inline Shape with_last(Shape shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t least) {
  check(tensor.dim() >= least, op, ": expected ", name, " with at least ", least, " dimension(s), got shape ", to_text(shape_of(tensor)));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, std::initializer_list<ScalarType> allowed) {
  std::string expected;
  for (ScalarType type : allowed) {
    if (tensor.scalar_type() == type) return;
    expected += (expected.empty() ? "" : " or ") + std::string(torch::headeronly::toString(type));
  }
  check(false, op, ": expected ", name, " of dtype ", expected, ", got ", torch::headeronly::toString(tensor.scalar_type()),
        "; convert it with .to(...)");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& expected) {
  check(shape_of(tensor) == expected, op, ": expected ", name, " of shape ", to_text(expected), ", got ", to_text(shape_of(tensor)));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  check(tensor.device() == other.device(), op, ": expected ", name, " on the same device as ", other_name, "; move one with .to(device)");
}

// The element type of a real-valued argument.
inline DType real_dtype(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  throw Error(concat(op, ": expected ", name, " of dtype float32, bfloat16 or float16, got ", torch::headeronly::toString(type),
                     "; convert it with .to(...)"));
}

// The tensor itself where kernels can read it as it is: contiguous and aligned for vector loads; else a copy.
inline Tensor readable(const Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  if (!tensor.is_contiguous()) return torch::stable::contiguous(tensor);
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment != 0) return torch::stable::clone(tensor);
  return tensor;
}

inline Tensor empty_on(const Tensor& like, const Shape& shape, ScalarType type) { return torch::stable::new_empty(like, shape, type); }

}  // namespace quest::bindings
