// What the kernels need of an instruction set: a float vector for the rotation, bits <-> bytes, float conversions and storage of codes.
// Everything is local to the translation unit (see kernels.h). Other loops are plain, and left to the compiler's vectoriser.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 takes the deliberately undefined operands of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "kernels.h"

namespace quest::QUEST_ISA {
namespace {

inline constexpr int64_t kChunk = 64;  // codes that a step of a row loop handles: one uint64 of mask bits

// ---- products: bytes of a vector (the unit of panels, kernels.h), and rows of a and w that share registers ----

#if defined(__AVX512F__)
inline constexpr int64_t kPanelBytes = 64;
inline constexpr int kTileM = 6;  // 24 accumulators + 4 of w + operands = 32 registers
#elif defined(__AVX2__)
inline constexpr int64_t kPanelBytes = 32;
inline constexpr int kTileM = 2;  // 8 accumulators + 4 of w + operands = 16 registers
#else
inline constexpr int64_t kPanelBytes = 16;
inline constexpr int kTileM = 2;
#endif
inline constexpr int kTileN = 4;

// ---- float vectors; butterfly<S>(v): lanes i and i + S become their sum and difference ----

#if defined(__AVX512F__)

using Vec = __m512;
inline constexpr int kLanes = 16;
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
template <int S>
static inline Vec butterfly(Vec v) {
  Vec swapped;
  if constexpr (S == 1) swapped = _mm512_permute_ps(v, 0xB1);
  if constexpr (S == 2) swapped = _mm512_permute_ps(v, 0x4E);
  if constexpr (S == 4) swapped = _mm512_shuffle_f32x4(v, v, 0xB1);
  if constexpr (S == 8) swapped = _mm512_shuffle_f32x4(v, v, 0x4E);
  constexpr __mmask16 upper = S == 1 ? 0xAAAA : S == 2 ? 0xCCCC : S == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_mask_sub_ps(_mm512_add_ps(v, swapped), upper, swapped, v);
}

#elif defined(__AVX2__)

using Vec = __m256;
inline constexpr int kLanes = 8;
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
template <int S>
static inline Vec butterfly(Vec v) {
  Vec swapped;
  if constexpr (S == 1) swapped = _mm256_permute_ps(v, 0xB1);
  if constexpr (S == 2) swapped = _mm256_permute_ps(v, 0x4E);
  if constexpr (S == 4) swapped = _mm256_permute2f128_ps(v, v, 1);
  constexpr int upper = S == 1 ? 0xAA : S == 2 ? 0xCC : 0xF0;
  return _mm256_blend_ps(_mm256_add_ps(v, swapped), _mm256_sub_ps(swapped, v), upper);
}

#else

struct Vec {
  float lane[4];
};
inline constexpr int kLanes = 4;
static inline Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
static inline void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
static inline Vec broadcast(float x) { return {{x, x, x, x}}; }
template <typename Op>
static inline Vec lanewise(Vec a, Vec b, Op op) {
  return {{op(a.lane[0], b.lane[0]), op(a.lane[1], b.lane[1]), op(a.lane[2], b.lane[2]), op(a.lane[3], b.lane[3])}};
}
static inline Vec add(Vec a, Vec b) {
  return lanewise(a, b, [](float x, float y) { return x + y; });
}
static inline Vec sub(Vec a, Vec b) {
  return lanewise(a, b, [](float x, float y) { return x - y; });
}
static inline Vec mul(Vec a, Vec b) {
  return lanewise(a, b, [](float x, float y) { return x * y; });
}
template <int S>
static inline Vec butterfly(Vec v) {
  const float* x = v.lane;
  if constexpr (S == 1) return {{x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]}};
  return {{x[0] + x[2], x[1] + x[3], x[0] - x[2], x[1] - x[3]}};
}

#endif

// ---- bits and bytes ----

// Bit i of the result: bit `bit` of bytes[i]; 64 bytes.
static inline uint64_t bits_of(const uint8_t* bytes, int bit) {
#if defined(__AVX512BW__)
  return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(static_cast<char>(1 << bit)));
#elif defined(__AVX2__)
  const __m128i shift = _mm_cvtsi32_si128(7 - bit);  // moves the wanted bit to the top of its byte
  const __m256i lo = _mm256_sll_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), shift);
  const __m256i hi = _mm256_sll_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)), shift);
  return static_cast<uint32_t>(_mm256_movemask_epi8(lo)) | static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(hi))) << 32;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    // The product moves the low bit of byte j to bit 56 + j; no two terms meet.
    bits |= ((eight >> bit & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * i);
  }
  return bits;
#endif
}

// bytes[i] |= value where bit i is set; 64 bytes.
static inline void or_bits(uint64_t bits, uint8_t value, uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m512i set = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(static_cast<char>(value)));
  _mm512_storeu_si512(bytes, _mm512_or_si512(_mm512_loadu_si512(bytes), set));
#elif defined(__AVX2__)
  // Byte i of a vector takes the byte of `bits` that holds its bit, then tests that bit.
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int half = 0; half < 2; ++half) {
    __m256i* out = reinterpret_cast<__m256i*>(bytes + 32 * half);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits >> (32 * half))), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, select), select);
    _mm256_storeu_si256(out, _mm256_or_si256(_mm256_loadu_si256(out), _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)))));
  }
#else
  for (int i = 0; i < 64; ++i) bytes[i] |= bits >> i & 1 ? value : 0;
#endif
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Copies `count` bytes to a zeroed 64-byte buffer: the end of a row, where 64 would read past it.
struct Tail {
  alignas(64) uint8_t bytes[64];
  Tail(const uint8_t* data, int64_t count) : bytes{} { std::memcpy(bytes, data, count); }
};

// ---- codes in their layouts, 64 a step from column i (a multiple of 64) ----

// Out of the row at `row`; those beyond the row's k are whatever the padding holds (kCodes, kValues: 0).
static inline void read_codes(const uint8_t* row, Layout layout, int32_t bits, int64_t plane_stride, int64_t row_bytes, int64_t i,
                              uint8_t* codes) {
  switch (layout) {
    case Layout::kCodes:
    case Layout::kValues: {
      const int64_t count = smaller(row_bytes - i, kChunk);
      if (count < kChunk) std::memset(codes, 0, kChunk);
      std::memcpy(codes, row + i, count);
      return;
    }
    case Layout::kPacked: {
      const Tail tail(row + i / 2, smaller(row_bytes - i / 2, kChunk / 2));
      for (int j = 0; j < 32; ++j) {
        codes[2 * j] = tail.bytes[j] & 15;
        codes[2 * j + 1] = tail.bytes[j] >> 4;
      }
      return;
    }
    case Layout::kEvenOdd:
      for (int j = 0; j < 32; ++j) {
        codes[2 * j] = row[i + j];
        codes[2 * j + 1] = row[i + 32 + j];
      }
      return;
    case Layout::kPlanes:
      std::memset(codes, 0, kChunk);
      for (int32_t j = 0; j < bits; ++j) {
        uint64_t plane;
        std::memcpy(&plane, row + j * plane_stride + i / 8, 8);
        or_bits(plane, static_cast<uint8_t>(1 << j), codes);
      }
      return;
  }
}

// Into the row, up to its end; codes beyond k must be 0.
static inline void write_codes(uint8_t* row, Layout layout, int32_t bits, int64_t plane_stride, int64_t row_bytes, int64_t i,
                               const uint8_t* codes) {
  switch (layout) {
    case Layout::kCodes:
    case Layout::kValues:
      if (i < row_bytes) std::memcpy(row + i, codes, smaller(row_bytes - i, kChunk));
      return;
    case Layout::kPacked: {
      uint8_t packed[32];
      for (int j = 0; j < 32; ++j) packed[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
      if (i / 2 < row_bytes) std::memcpy(row + i / 2, packed, smaller(row_bytes - i / 2, 32));
      return;
    }
    case Layout::kEvenOdd:
      if (i >= row_bytes) return;
      for (int j = 0; j < 32; ++j) {
        row[i + j] = codes[2 * j];
        row[i + 32 + j] = codes[2 * j + 1];
      }
      return;
    case Layout::kPlanes:
      if (i / 8 >= row_bytes) return;
      for (int32_t j = 0; j < bits; ++j) {
        const uint64_t plane = bits_of(codes, j);
        std::memcpy(row + j * plane_stride + i / 8, &plane, 8);
      }
      return;
  }
}

// ---- float32 rows from and to the element types ----

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  uint32_t bits;
  if (magnitude >= 0x7C00) {
    bits = 0x7F800000 | (magnitude & 0x3FF) << 13;
  } else {
    // The exponent field rebiased by a product, which also normalises subnormals.
    bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even.
static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;  // 65520 and above
  if (bits < 0x38800000) {                       // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

static inline void load_floats(const void* x, DType dtype, int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat32: std::memcpy(out, x, count * sizeof(float)); return;
    case DType::kBFloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(x);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
        std::memcpy(out + i, &bits, 4);
      }
      return;
    }
    case DType::kFloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(x);
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
      }
#endif
      for (; i < count; ++i) out[i] = half_to_float(in[i]);
      return;
    }
  }
}

static inline void store_floats(const float* in, DType dtype, int64_t count, void* y) {
  switch (dtype) {
    case DType::kFloat32: std::memcpy(y, in, count * sizeof(float)); return;
    case DType::kBFloat16: {
      uint16_t* out = static_cast<uint16_t*>(y);
      for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, in + i, 4);
        const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // rounding would make some NaNs infinite
      }
      return;
    }
    case DType::kFloat16: {
      uint16_t* out = static_cast<uint16_t*>(y);
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
      }
#endif
      for (; i < count; ++i) out[i] = float_to_half(in[i]);
      return;
    }
  }
}

}  // namespace

// ---- functions that the files of one instruction set share ----

// row *= blockdiag(H/sqrt(block)); k floats in scratch, in place. What lies between k and the next multiple of kRowChunk must be finite or
// unused.
void rotate(float* row, int64_t k, int64_t block);

// The functions of the table.
void rotate_rows(const RotateTask& task, int64_t begin, int64_t end, float* row);
void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end, float* row);
void dequantize_rows(const DequantizeTask& task, int64_t begin, int64_t end, float* row);
int64_t find_above(const uint8_t* codes, int64_t count, int32_t limit);
void pack_rows(const PackTask& task, int64_t begin, int64_t end);
void unpack_rows(const PackTask& task, int64_t begin, int64_t end);
void fill_a(const GemmTask& task, int64_t begin, int64_t end);
void gemm(const GemmTask& task, int64_t begin, int64_t end, uint8_t* scratch);

}  // namespace quest::QUEST_ISA
