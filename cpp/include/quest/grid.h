// Grids: the levels of a quantizer and everything derived from them, for a row of root mean square sigma.
//
//   int       s = (alpha sigma + 1e-8)/(n - 1);  c = rint(clamp(x, +-s(n-1))/(2s) + 1/2) + n/2 - 1;  v = 2c - (n-1)   (odd integers)
//   int_zero  s = 2 alpha sigma/n;               c = rint(clamp(x/s, -(n/2-1), n/2)) + n/2 - 1;      v = c - (n/2-1)
//   fp4       s = 0.24353988 sigma;              c = E2M1 bits of the nearest level;                 v = 2 * the E2M1 value, |v| <= 12
//   ternary   s = 1.2240 sigma;                  c = v + 1;                                          v in {-1, 0, 1}, threshold s/2
//   gauss     s = sigma;                         c = index of the nearest Lloyd-Max level of N(0,1); x-hat = s level[c]
//
// n = 2^bits. x-hat = s v. alpha(b) are the paper's constants (its appendix; the minimisers of E(x - x-hat)^2 on N(0,1)).
#pragma once

#include <cstdint>

#include "quest/types.h"

namespace quest {

inline constexpr float kScaleEpsilon = 1e-8f;    // keeps the int grid's scale of an all-zero row positive
inline constexpr double kFp4Scale = 0.48707976;  // RMSE-optimal scale of the E2M1 grid on N(0,1)
inline constexpr double kTernaryStep = 1.2240;   // RMSE-optimal step of {-1, 0, 1} on N(0,1)
inline constexpr int32_t kMaxLevels = 256;

// alpha(b): where the int grid clips, in units of sigma; b = 1 ... 8.
double int_alpha(int32_t bits);

// Throws quest::Error unless the grid's kind has these bits.
void check_grid(Grid grid);

// Number of codes: 2^bits; 3 for ternary.
int32_t level_count(Grid grid);

// True where x-hat = s v with an integer v (all but gauss): such grids have exact products.
constexpr bool has_values(Grid grid) { return grid.kind != GridKind::kGauss; }

// The integer v of a code, and the level x-hat/s of a code (equal but for gauss). 0 <= code < level_count (fp4: 16 codes, 8 is -0).
int32_t code_value(Grid grid, int32_t code);
float code_level(Grid grid, int32_t code);

// Largest |v|.
int32_t max_value(Grid grid);

// v = mul * u + add for the integer u that a layout stores (kValues: u = v, but 2u + 1 at 8 bits; kCodes, kPacked, kPlanes, kEvenOdd: u =
// c). Not for fp4 codes, whose values are not an affine function of the code: table look-up first, then mul = 1, add = 0.
struct Affine {
  int32_t mul;
  int32_t add;
};
Affine affine(Grid grid, Layout layout);

// Everything a quantize kernel needs of a quantizer, as plain numbers that can be passed by value to a GPU. Units: sigma.
struct QuantizeParams {
  float scale_factor;   // s = scale_factor * sigma + scale_epsilon
  float scale_epsilon;  // int grid: 1e-8/(n-1); else 0
  float mask_factor;    // what MaskKind compares with: n for the default int trust, k * top for clip, T for trust
  int32_t mask_kind;    // MaskKind
  int32_t levels;       // level_count
};
enum MaskKind : int32_t {
  kMaskAll = 0,        // ste
  kMaskScale = 1,      // |x_h| <= mask_factor * s        (int grid, default trust, no sparsity)
  kMaskMagnitude = 2,  // |x_h| <= mask_factor * sigma    (clip; int: alpha sigma + 1e-8)
  kMaskError = 3,      // |x-hat - x_h| <= mask_factor * sigma  (trust in general; x-hat after pruning)
};
QuantizeParams quantize_params(const Quantizer& quantizer);

// T of the trust estimator and k of clip when Quantizer::bound is NaN (int 1 bit: clip 1.30 rotated, 1.25 not).
double default_trust(Grid grid);
double default_clip(const Quantizer& quantizer);
// Where clip with k = 1 stops, in units of sigma: alpha for int and int_zero, the top level otherwise.
double clip_limit(Grid grid);

// Lloyd-Max levels of N(0,1): 20 sweeps from linspace(-3, 3, 2^bits), ascending. Thread-safe, computed once.
const float* gauss_levels(int32_t bits);

}  // namespace quest
