// From accumulators to y: the affine identity of quest/gemm.h in the form that needs only what `quantize` stores,
//
//   sum v_a v_w = mul_a mul_w sum u_a u_w + add_w V_a + add_a V_w - K add_a add_w,   V = sum of v over the row = mul_c code_sum + add_c
//   (codes in it)
//
// (mul_c, add_c: the affine map of the codes), modulo 2^32; then y = s_a[m] s_w[n] (sum) + bias[n] in the output's type.
#pragma once

#include <cstdint>

#include "common/chunk.cuh"
#include "common/operands.cuh"
#include "quest/gemm.h"

namespace quest::cuda {

struct Output {
  void* y;
  DType dtype;
  const float* bias;  // [n] or nullptr
  int64_t m, n;
  bool vectorized;  // rows of y allow 16-byte stores

  // Whether gemm_few, gemm_stream and gemm_fixed give a lane two neighbouring columns, for which w's rows lie in another order
  // (weight_map).
  __host__ __device__ bool adjacent() const { return vectorized && n % 16 == 0; }
};

// One operand's share of the identity. A row adds other_add * V, V from the row's code sum or, where codes are no affine map of values
// (fp4), summed by the kernel itself.
struct Correction {
  const int32_t* code_sum;
  uint32_t mul, add;  // V = mul code_sum + add
  uint32_t weight;    // other_add
  bool sums_values;   // V comes from the kernel

  __device__ __forceinline__ uint32_t row(int64_t r, int32_t value_sum) const {
    return sums_values ? weight * static_cast<uint32_t>(value_sum) : of_codes(load(r));
  }
  // The same in two steps, where the kernel does not sum: what is loaded, and what it becomes.
  __device__ __forceinline__ int32_t load(int64_t r) const { return weight == 0 ? 0 : code_sum[r]; }
  __device__ __forceinline__ uint32_t of_codes(int32_t sum) const { return weight * (mul * static_cast<uint32_t>(sum) + add); }
};

struct IntegerEpilogue {
  static constexpr bool kSumsValues = true;
  Output output;
  const float *a_scale, *w_scale;
  uint32_t mul, constant;
  Correction a, w;

  // Per row and per column parts; sums are those of the kernel where sums_values is set.
  __device__ __forceinline__ uint32_t row_part(int64_t row, int32_t value_sum) const { return a.row(row, value_sum) + constant; }
  __device__ __forceinline__ uint32_t column_part(int64_t column, int32_t value_sum) const { return w.row(column, value_sum); }
  // Both in two steps: what is loaded, and what it becomes.
  __device__ __forceinline__ int32_t load_column(int64_t column) const { return w.load(column); }
  __device__ __forceinline__ uint32_t column_of(int32_t loaded) const { return w.of_codes(loaded); }
  __device__ __forceinline__ uint32_t row_of(int32_t loaded) const { return a.of_codes(loaded) + constant; }
  __device__ __forceinline__ float row_scale(int64_t row) const { return a_scale[row]; }
  __device__ __forceinline__ float column_scale(int64_t column) const { return w_scale[column]; }
  __device__ __forceinline__ float product(int32_t accumulator, uint32_t row_part, uint32_t column_part) const {
    return static_cast<float>(static_cast<int32_t>(mul * static_cast<uint32_t>(accumulator) + row_part + column_part));
  }
};

// Real activations: no identity, no row scale.
struct RealEpilogue {
  static constexpr bool kSumsValues = false;
  Output output;
  const float* w_scale;

  __device__ __forceinline__ uint32_t row_part(int64_t, int32_t) const { return 0; }
  __device__ __forceinline__ uint32_t column_part(int64_t, int32_t) const { return 0; }
  __device__ __forceinline__ float row_scale(int64_t) const { return 1.0f; }
  __device__ __forceinline__ float column_scale(int64_t column) const { return w_scale[column]; }
  __device__ __forceinline__ float product(float accumulator, uint32_t, uint32_t) const { return accumulator; }
};

// The three roundings of quest/gemm.h.
__device__ __forceinline__ float scaled(float product, float row_scale, float column_scale, float bias) {
  return __fmaf_rn(__fmul_rn(product, row_scale), column_scale, bias);
}

__device__ __forceinline__ uint8_t* element_of(const Output& output, int64_t row, int64_t column) {
  return static_cast<uint8_t*>(output.y) + ((row * output.n + column) << (output.dtype == DType::kFloat32 ? 2 : 1));
}

// One code for all types: kernels of a few microseconds fetch most instructions for one use, and a switch has a store for each type.
__device__ __forceinline__ void store_at(const Output& output, uint8_t* place, float y) {
  const uint32_t narrow = output.dtype == DType::kBFloat16 ? pack_bfloat16(y, 0.0f) : pack_float16(y, 0.0f);
  if (output.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(place) = y;
  } else {
    *reinterpret_cast<uint16_t*>(place) = static_cast<uint16_t>(narrow);
  }
}

// Of two neighbours, at a multiple of their size together.
__device__ __forceinline__ void store_two_at(const Output& output, uint8_t* place, float y0, float y1) {
  if (output.dtype == DType::kFloat32) {
    *reinterpret_cast<float2*>(place) = make_float2(y0, y1);
  } else {
    *reinterpret_cast<uint32_t*>(place) = output.dtype == DType::kBFloat16 ? pack_bfloat16(y0, y1) : pack_float16(y0, y1);
  }
}

__device__ __forceinline__ void store_value(const Output& output, int64_t row, int64_t column, float y) {
  store_at(output, element_of(output, row, column), y);
}

// One element of y.
template <typename Epilogue, typename Accumulator>
__device__ __forceinline__ void store_element(const Epilogue& epilogue, int64_t row, int64_t column, Accumulator accumulator, int32_t a_sum,
                                              int32_t w_sum) {
  const Output& output = epilogue.output;
  const float product = epilogue.product(accumulator, epilogue.row_part(row, a_sum), epilogue.column_part(column, w_sum));
  const float bias = output.bias != nullptr ? output.bias[column] : 0.0f;
  store_value(output, row, column, scaled(product, epilogue.row_scale(row), epilogue.column_scale(column), bias));
}

// ---- host

// v = mul u + add for the u that operands.cuh makes.
inline Affine operand_affine(const Operand& operand, bool as_values) {
  if (as_values) return {1, 0};
  const bool nibbles_or_bits = operand.layout == Layout::kPacked || operand.layout == Layout::kPlanes;
  return affine(operand.grid, nibbles_or_bits ? operand.layout : Layout::kValues);
}

inline Correction make_correction(const Operand& operand, int32_t other_add, int64_t codes_in_row) {
  Correction result{};
  result.code_sum = operand.code_sum;
  result.weight = static_cast<uint32_t>(other_add);
  result.sums_values = is_fp4(operand) && other_add != 0;
  if (!is_fp4(operand)) {
    const Affine code = affine(operand.grid, Layout::kCodes);
    result.mul = static_cast<uint32_t>(code.mul);
    result.add = static_cast<uint32_t>(code.add) * static_cast<uint32_t>(codes_in_row);
  }
  return result;
}

inline Output make_output(void* y, DType dtype, const float* bias, int64_t m, int64_t n) {
  return {y, dtype, bias, m, n, is_aligned(y, 16) && n * element_size(dtype) % 16 == 0};
}

// a_map, w_map: v = mul u + add for the integers u that the kernel multiplies.
inline IntegerEpilogue integer_epilogue(const Operand& a, const Operand& w, Affine a_map, Affine w_map, const Output& output, int64_t k) {
  IntegerEpilogue result{};
  result.output = output;
  result.a_scale = a.scale;
  result.w_scale = w.scale;
  result.mul = static_cast<uint32_t>(a_map.mul * w_map.mul);
  result.constant = 0u - static_cast<uint32_t>(a_map.add * w_map.add) * static_cast<uint32_t>(k);
  result.a = make_correction(a, w_map.add, k);
  result.w = make_correction(w, a_map.add, w.index != nullptr ? k / 2 : k);
  return result;
}

inline void check_layout(const char* op, const char* name, const Operand& operand, Layout first, Layout second) {
  check_grid(operand.grid);
  check(has_values(operand.grid), op, ": expected ", name, " on a grid with integer values, got ", to_string(operand.grid),
        "; dequantize it and multiply in floating point");
  check(operand.layout == first || operand.layout == second, op, ": expected ", name, " in layout ", to_string(first),
        first == second ? "" : " or ", first == second ? "" : to_string(second), ", got ", to_string(operand.layout));
  check(operand.layout != Layout::kPacked || operand.grid.bits <= 4, op, ": expected ", name, " of at most 4 bits for layout packed, got ",
        to_string(operand.grid));
}

}  // namespace quest::cuda
