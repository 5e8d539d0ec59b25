// quantize: a prologue, rotation, row scale, codes, code sums and the estimator's mask bits in one pass over x. dequantize and
// quantize_backward undo it.
//
//   x_h = x H;  sigma = rms(row);  (c, s) by grid.h;  x-hat = s v(c);  M by the estimator, one bit per element
//   dx  = (g M) H^T, with g the gradient at x-hat in rotated space (output "original": g is rotated first)
//
// 4:8 sparsity: of the 4 adjacent pairs of 8 values of x_h, the 2 of smallest L2 norm become 0 (ties: the later pair goes), before the
// grid; sigma is of the whole row. A row with NaN or Inf (or whose sum of squares overflows float32) gets scale NaN, codes 0, code_sum 0,
// mask 0.
#pragma once

#include <cstdint>

#include "quest/parallel.h"
#include "quest/types.h"

namespace quest {

// What is done to a row before it is quantized, so that the layer before need not write it to memory. As torch does it: in float32, rounded
// to the dtype of x where torch's operations on that dtype end.
//
//   kRmsNorm  x/sqrt(mean(x^2) + epsilon) weight, rounded once
//   kSiluMul  silu(gate) rounded, then times up and rounded; a row of x is gate and up, 2k values
struct Prologue {
  PrologueKind kind = PrologueKind::kNone;
  const void* weight = nullptr;  // kRmsNorm: [k], of the dtype of x
  float epsilon = 0;             // kRmsNorm
};

// Where quantize writes; all rows contiguous. Shapes for K values a row:
struct QuantizeOutput {
  void* codes;        // by layout; a sparse quantizer stores K/2 kept codes a row (kValues: all K, the pruned ones 0)
  float* scale;       // [rows]
  int32_t* code_sum;  // [rows], sum of the stored codes (sparse: of the kept ones)
  uint8_t* mask;      // [rows, plane_row_bytes(K)], bit set: the gradient passes; nullptr: not wanted
  uint8_t* index;     // [rows, index_row_bytes(K)] for a sparse quantizer, else nullptr
};

// What both backends check of quantize and dequantize, in the name of `op`; throws quest::Error. has_index: a 4:8 index was given.
void check_layout(const char* op, const Quantizer& quantizer, Layout layout, int64_t rows, int64_t k);
void check_index(const char* op, const Quantizer& quantizer, bool has_index);
void check_prologue(const char* op, const Prologue& prologue);

// How many values of x become the k values of a row that are quantized.
constexpr int64_t input_width(PrologueKind prologue, int64_t k) { return prologue == PrologueKind::kSiluMul ? 2 * k : k; }

// The block of the rotation of k values; 1: none. How many codes a row stores: half of them where it is 4:8 sparse.
int64_t rotation_block(const Quantizer& quantizer, int64_t k);
int64_t stored_codes(const Quantizer& quantizer, Layout layout, int64_t k);

// x: [rows, input_width(prologue.kind, k)] of dtype, contiguous. Sparse: 8 must divide k, layout is neither kPlanes nor kEvenOdd. kValues:
// not for gauss. kPacked: at most 4 bits.
void quantize(const Quantizer& quantizer, Layout layout, const void* x, DType dtype, int64_t rows, int64_t k, const QuantizeOutput& output,
              const ParallelFor& parallel_for, const Prologue& prologue = {});

// y: [rows, k] of dtype: x-hat, rotated back when quantizer.original. index: as quantize wrote it, nullptr when dense.
void dequantize(const Quantizer& quantizer, Layout layout, const void* codes, const float* scale, const uint8_t* index, void* y,
                DType dtype, int64_t rows, int64_t k, const ParallelFor& parallel_for);

// grad, dx: [rows, k] of dtype; mask as quantize wrote it.
void quantize_backward(const Quantizer& quantizer, const void* grad, const uint8_t* mask, void* dx, DType dtype, int64_t rows, int64_t k,
                       const ParallelFor& parallel_for);

}  // namespace quest
