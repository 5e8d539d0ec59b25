// The words every layer shares: element types, storage layouts, and the quantizer as four independent choices.
//
// A quantizer is a rotation, a grid, a sparsity and an estimator (QuEST, arXiv 2502.05003, section 3). It is written as one string that
// means the same in C++, in torch.ops.quest.*, on the command line and in the metadata of a packed model:
//
//   GRID[BITS]-ROTATION[-4:8]-ESTIMATOR[BOUND][-original]
//   int4-hadamard-trust   int1-hadamard-clip1.3   fp4-none-ste   int4-hadamard-4:8-trust   ternary-none-clip
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace quest {

// Element type of a real-valued tensor.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How the integers of a [rows, K] matrix lie in memory. Every row of kPacked and kPlanes is padded with zero bytes to kRowAlignment, of
// kEvenOdd to 64.
enum class Layout : int32_t {
  kCodes,    // uint8 [rows, K]: one code a byte
  kValues,   // int8  [rows, K]: the value v; 8-bit int grid: c - 128, so that v = 2u + 1
  kPacked,   // uint8 [rows, packed_row_bytes(K)]: two 4-bit codes a byte, the even column in the low half
  kPlanes,   // uint8 [bits, rows, plane_row_bytes(K)]: plane j holds bit j of every code, eight columns a byte, lowest first
  kEvenOdd,  // uint8 [rows, K to a multiple of 64]: one code a byte; of every 64 columns first the 32 even ones, then the 32 odd ones. What
             // packed weights are multiplied by: the low halves of 32 of their bytes meet 32 neighbours, and so do the high ones. 4:8
             // sparse weights too: of 4 adjacent pairs they keep 2, so of 4 neighbours in this order, as the sparse instructions of a GPU
             // want it
};

enum class GridKind : int32_t { kInt, kIntZero, kFp4, kGauss, kTernary };
enum class Rotation : int32_t { kNone, kHadamard };
enum class Sparsity : int32_t { kNone, kFourEight };
enum class Estimator : int32_t { kTrust, kClip, kSte };

// What quantize does to x first (quantize.h).
enum class PrologueKind : int32_t { kNone, kRmsNorm, kSiluMul };

// The levels of a quantizer, in units of the row's scale.
struct Grid {
  GridKind kind = GridKind::kInt;
  int32_t bits = 4;  // int, int_zero, gauss: 1 ... 8 (int_zero, gauss: 2 ... 8); fp4: 4; ternary: 2

  friend constexpr bool operator==(Grid a, Grid b) { return a.kind == b.kind && a.bits == b.bits; }
};

struct Quantizer {
  Grid grid;
  Rotation rotation = Rotation::kHadamard;
  Sparsity sparsity = Sparsity::kNone;
  Estimator estimator = Estimator::kTrust;
  float bound = std::numeric_limits<float>::quiet_NaN();  // k of clip, T of trust in units of sigma; NaN: the default
  bool original = false;                                  // x-hat rotated back to the original space
};

// Both directions are exact: parse(to_string(q)) == q. Errors (quest::Error) name the part that was not understood.
Quantizer parse_quantizer(std::string_view text);
Grid parse_grid(std::string_view text);
Layout parse_layout(std::string_view text);
PrologueKind parse_prologue(std::string_view text);
std::string to_string(const Quantizer& quantizer);
std::string to_string(Grid grid);
std::string to_string(Layout layout);
std::string to_string(PrologueKind prologue);

}  // namespace quest
