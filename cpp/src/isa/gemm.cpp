// Products of panels, for every kind of operand.
//
// A panel holds rows widened to what the multiplier takes (bytes, plane bits or floats), K contiguous and padded with zeros. The panel of a
// is made once; that of w a block of rows at a time, small enough for L2, so that packed weights are widened once per block of a and never
// reach memory. Inside, kTileM x kTileN dot products along K share registers. Bytes are a signed times w unsigned, what maddubs and
// vpdpbusd take; whatever integers they stand for is put right at the end by the identity of gemm.h.
//
// Few-bit planes use popcounts only where those beat bytes (the caller decides): one AND + popcount + add does 512 1-bit products, a
// vpdpbusd 64.
#include "isa/simd.h"

namespace quest::QUEST_ISA {
namespace {

// ---- panels ----

// The codes of a packed row in panel order: in every 2 kPanelBytes columns the even ones first. `bytes` of them, a multiple of 2
// kPanelBytes.
static inline void unpack_halves(const uint8_t* row, int64_t row_bytes, int64_t bytes, uint8_t* out) {
  for (int64_t i = 0; i < bytes; i += 2 * kPanelBytes) {
    const uint8_t* in = row + i / 2;
    const Tail tail(in, i / 2 + kPanelBytes <= row_bytes ? 0 : row_bytes > i / 2 ? row_bytes - i / 2 : 0);
    if (i / 2 + kPanelBytes > row_bytes) in = tail.bytes;
    for (int64_t j = 0; j < kPanelBytes; ++j) out[i + j] = in[j] & 15;
    for (int64_t j = 0; j < kPanelBytes; ++j) out[i + kPanelBytes + j] = in[j] >> 4;
  }
}

// Elements in column order to panel order, out of place; `count` a multiple of 2 kPanelBytes.
template <typename T>
static inline void separate_halves(const T* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += 2 * kPanelBytes) {
    for (int64_t j = 0; j < kPanelBytes; ++j) {
      out[i + j] = in[i + 2 * j];
      out[i + kPanelBytes + j] = in[i + 2 * j + 1];
    }
  }
}

// The codes of a kEvenOdd row in panel order, `bytes` of them, a multiple of 2 kPanelBytes: runs of columns that both orders keep together.
static inline void copy_halves(const uint8_t* row, int64_t row_bytes, int64_t bytes, uint8_t* out) {
  constexpr int64_t kRun = kPanelBytes < 32 ? kPanelBytes : 32;
  for (int64_t i = 0; i < bytes / 2; i += kRun) {  // of the even columns, and of the odd ones
    uint8_t* const target = out + i / kPanelBytes * 2 * kPanelBytes + i % kPanelBytes;
    const int64_t source = i / 32 * 64 + i % 32;
    for (int64_t odd = 0; odd < 2; ++odd) {
      source < row_bytes ? std::memcpy(target + odd * kPanelBytes, row + source + odd * 32, kRun)
                         : std::memset(target + odd * kPanelBytes, 0, kRun);
    }
  }
}

// out = codes of a row in column order, or in panel order where `halves`; `bytes` of them, those beyond k unspecified.
static void read_row(const uint8_t* row, Layout layout, int32_t bits, int64_t plane_stride, int64_t row_bytes, int64_t k, bool halves,
                     int64_t bytes, uint8_t* out) {
  if (layout == Layout::kPacked && halves) return unpack_halves(row, row_bytes, bytes, out);
  if (layout == Layout::kEvenOdd && halves) return copy_halves(row, row_bytes, bytes, out);
  if (layout == Layout::kCodes || layout == Layout::kValues) {
    if (!halves) {
      std::memcpy(out, row, k);
      std::memset(out + k, 0, bytes - k);
      return;
    }
    const int64_t whole = k / (2 * kPanelBytes) * (2 * kPanelBytes);
    separate_halves(row, whole, out);
    if (whole == bytes) return;
    uint8_t rest[2 * kPanelBytes] = {};
    std::memcpy(rest, row + whole, k - whole);
    separate_halves(rest, 2 * kPanelBytes, out + whole);
    return;
  }
  int64_t i = 0;
  for (; i < k; i += kChunk) {
    if (i + kChunk <= bytes) {
      read_codes(row, layout, bits, plane_stride, row_bytes, i, out + i);
    } else {  // panel rows of the narrower instruction sets need not end with a chunk
      uint8_t rest[kChunk];
      read_codes(row, layout, bits, plane_stride, row_bytes, i, rest);
      std::memcpy(out + i, rest, bytes - i);
    }
  }
  if (i < bytes) std::memset(out + i, 0, bytes - i);
}

static void look_up(const uint8_t* table, int64_t count, uint8_t* bytes, bool nibbles) {
  int64_t i = 0;
#if defined(__AVX2__)
  if (nibbles) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    for (; i + 32 <= count; i += 32) {
      __m256i* p = reinterpret_cast<__m256i*>(bytes + i);
      _mm256_storeu_si256(p, _mm256_shuffle_epi8(t, _mm256_loadu_si256(p)));
    }
  }
#else
  (void)nibbles;
#endif
  for (; i < count; ++i) bytes[i] = table[bytes[i]];
}

// 0 in the columns beyond k of a panel row.
template <typename T>
static void zero_padding(T* row, int64_t k, int64_t count, bool halves) {
  if (!halves) {
    for (int64_t i = k; i < count; ++i) row[i] = 0;
    return;
  }
  const int64_t whole = k / (2 * kPanelBytes) * (2 * kPanelBytes);
  for (int64_t column = k; column < count; ++column) {
    const int64_t j = column - whole;
    row[whole + j / 2 + (j % 2) * kPanelBytes] = 0;
  }
}

#if defined(__AVX2__)

// For an index byte, two groups of 8 columns: which of the 8 kept bytes goes to each of the 16 columns; 0x80, which shuffles to 0, where
// pruned.
struct SparseShuffles {
  alignas(16) uint8_t byte[256][16];
};

constexpr SparseShuffles make_sparse_shuffles() {
  SparseShuffles shuffles{};
  for (int index = 0; index < 256; ++index) {
    for (int column = 0; column < 16; ++column) shuffles.byte[index][column] = 0x80;
    for (int kept = 0; kept < 8; ++kept) {
      const int pair = index >> (kept / 2 * 2) & 3;
      shuffles.byte[index][kept / 4 * 8 + 2 * pair + kept % 2] = static_cast<uint8_t>(kept);
    }
  }
  return shuffles;
}

constexpr SparseShuffles kSparseShuffles = make_sparse_shuffles();

#endif

// The values of a 4:8 sparse row in column order. The bytes are XORed with that of value 0, so that pruned pairs are what no kept pair
// touches.
static void expand_sparse(const GemmTask& task, int64_t n, uint8_t* out) {
  const uint8_t* row = task.w + n * task.w_row_bytes;
  const uint8_t* index = task.w_index + n * task.w_index_row_bytes;
  alignas(16) uint8_t table[16];
  for (int c = 0; c < 16; ++c) table[c] = task.w_table[c] ^ task.w_zero;
#if defined(__AVX2__)
  // 16 packed bytes are 64 columns; rows, index and panel are all padded to that.
  const auto load16 = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  const __m128i values = load16(table);
  const __m128i zero = _mm_set1_epi8(static_cast<char>(task.w_zero));
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t i = 0; i < task.k; i += 64) {
    const __m128i packed = load16(row + i / 4);
    const __m128i even = _mm_shuffle_epi8(values, _mm_and_si128(packed, low));
    const __m128i odd = _mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(packed, 4), low));
    const __m128i kept[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int j = 0; j < 4; ++j) {
      const __m128i eight = j % 2 ? _mm_srli_si128(kept[j / 2], 8) : kept[j / 2];
      const __m128i spread = _mm_shuffle_epi8(eight, load16(kSparseShuffles.byte[index[i / 16 + j]]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16 * j), _mm_xor_si128(spread, zero));
    }
  }
  const int64_t written = (task.k + 63) / 64 * 64;
#else
  const uint64_t zero = 0x0101010101010101u * task.w_zero;
  for (int64_t group = 0; group < task.k / 8; ++group) {
    const int pairs = index[group / 2] >> (group % 2 * 4);
    const uint8_t* in = row + 2 * group;
    const uint64_t first = table[in[0] & 15] | table[in[0] >> 4] << 8;
    const uint64_t second = table[in[1] & 15] | table[in[1] >> 4] << 8;
    const uint64_t eight = zero ^ (first << (16 * (pairs & 3)) | second << (16 * (pairs >> 2 & 3)));
    std::memcpy(out + 8 * group, &eight, 8);
  }
  const int64_t written = task.k;
#endif
  std::memset(out + written, 0, task.depth - written);
}

static void copy_planes(const uint8_t* row, int32_t planes, int64_t plane_stride, int64_t row_bytes, int64_t plane_bytes, uint8_t* out) {
  for (int32_t j = 0; j < planes; ++j) {
    std::memcpy(out + j * plane_bytes, row + j * plane_stride, row_bytes);
    std::memset(out + j * plane_bytes + row_bytes, 0, plane_bytes - row_bytes);
  }
}

// The levels of kPanelBytes codes.
static inline void widen(const GemmTask& task, const uint8_t* codes, float* levels) {
  if (task.w_uniform) {
    const float first = task.w_levels[0];
    const float step = task.w_levels[1] - first;
    for (int64_t j = 0; j < kPanelBytes; ++j) levels[j] = first + step * static_cast<float>(codes[j]);
    return;
  }
#if defined(__AVX512F__)
  if (task.w_planes <= 4) {  // a table that fits a register
    const __m512 table = _mm512_loadu_ps(task.w_levels);
    for (int64_t j = 0; j < kPanelBytes; j += 16) {
      const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j)));
      _mm512_storeu_ps(levels + j, _mm512_permutexvar_ps(c, table));
    }
    return;
  }
#elif defined(__AVX2__)
  if (task.w_planes <= 4) {  // a table that fits two registers
    const __m256 lower = _mm256_loadu_ps(task.w_levels);
    const __m256 upper = _mm256_loadu_ps(task.w_levels + 8);
    for (int64_t j = 0; j < kPanelBytes; j += 8) {
      const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + j)));
      const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28));  // bit 3 is the sign
      _mm256_storeu_ps(levels + j, _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, c), _mm256_permutevar8x32_ps(upper, c), is_upper));
    }
    return;
  }
#endif
  for (int64_t j = 0; j < kPanelBytes; ++j) levels[j] = task.w_levels[codes[j]];
}

static void fill_w_row(const GemmTask& task, int64_t n, uint8_t* out) {
  if (task.k == 0) return;  // the data may be a null pointer
  const uint8_t* row = task.w + n * task.w_row_bytes;
  if (task.panel == Panel::kBits) return copy_planes(row, task.w_planes, task.w_plane_stride, task.w_row_bytes, task.depth, out);
  if (task.w_index) return expand_sparse(task, n, out);
  if (task.panel == Panel::kBytes) {
    read_row(row, task.w_layout, task.w_planes, task.w_plane_stride, task.w_row_bytes, task.k, task.halves, task.depth, out);
    if (!task.w_table_is_identity) look_up(task.w_table, task.depth, out, task.w_layout == Layout::kPacked);
    return;
  }
  // Floats: codes first, at the end of the row, where the widening does not overtake them.
  const int64_t count = task.depth / 4;
  uint8_t* codes = out + 3 * count;
  read_row(row, task.w_layout, task.w_planes, task.w_plane_stride, task.w_row_bytes, task.k, task.halves, count, codes);
  for (int64_t i = 0; i < count; i += kPanelBytes) {
    float levels[kPanelBytes];
    widen(task, codes + i, levels);
    std::memcpy(out + 4 * i, levels, sizeof(levels));
  }
}

// ---- dot products of panel rows: MR rows of a and kTileN of w, out[i * stride + j] ----

#if defined(__AVX512F__)

// Sums of the 16 lanes of four vectors.
static inline __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const auto fold = [](__m512i v) { return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)); };
  const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(fold(a), fold(b)), _mm256_hadd_epi32(fold(c), fold(d)));
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

// sum += products of four neighbouring bytes. In place by force: from the intrinsic GCC makes two register copies a step, and keeps arrays
// of sums in memory, which takes half the speed.
__attribute__((always_inline)) static inline void add_products(__m512i& sum, __m512i w, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
}

// The sums of MR rows, one after the other.
template <int MR>
struct ByteSums {
  __m512i sum0 = _mm512_setzero_si512();
  __m512i sum1 = _mm512_setzero_si512();
  __m512i sum2 = _mm512_setzero_si512();
  __m512i sum3 = _mm512_setzero_si512();
  ByteSums<MR - 1> rest;

  __attribute__((always_inline)) void add(__m512i w0, __m512i w1, __m512i w2, __m512i w3, const uint8_t* a, int64_t stride) {
    const __m512i v = _mm512_load_si512(a);
    add_products(sum0, w0, v);
    add_products(sum1, w1, v);
    add_products(sum2, w2, v);
    add_products(sum3, w3, v);
    if constexpr (MR > 1) rest.add(w0, w1, w2, w3, a + stride, stride);
  }
  __attribute__((always_inline)) void write(uint32_t* out, int64_t stride) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum_lanes(sum0, sum1, sum2, sum3));
    if constexpr (MR > 1) rest.write(out + stride, stride);
  }
};
template <>
struct ByteSums<0> {};

template <int MR>
static void dot_bytes(const GemmTask& task, const uint8_t* a, const uint8_t* w, uint32_t* out, int64_t out_stride) {
  ByteSums<MR> sums;
  const int64_t stride = task.w_stride;
  for (int64_t p = 0; p < task.depth; p += 64) {
    const uint8_t* b = w + p;
    sums.add(_mm512_load_si512(b), _mm512_load_si512(b + stride), _mm512_load_si512(b + 2 * stride), _mm512_load_si512(b + 3 * stride),
             a + p, task.a_stride);
  }
  sums.write(out, out_stride);
}

template <int MR>
static void dot_bits(const GemmTask& task, const uint8_t* a, const uint8_t* w, int shift, uint32_t* out, int64_t out_stride) {
  __m512i acc[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  for (int64_t p = 0; p < task.depth; p += 64) {
    __m512i b[kTileN];
    for (int j = 0; j < kTileN; ++j) b[j] = _mm512_load_si512(w + j * task.w_stride + p);
    for (int i = 0; i < MR; ++i) {
      const __m512i v = _mm512_load_si512(a + i * task.a_stride + p);
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_add_epi64(acc[i][j], _mm512_popcnt_epi64(_mm512_and_si512(b[j], v)));
    }
  }
  // The high halves of the 64-bit counts are 0: their lanes add nothing.
  for (int i = 0; i < MR; ++i) {
    __m128i* const sums = reinterpret_cast<__m128i*>(out + i * out_stride);
    const __m128i counts = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    _mm_storeu_si128(sums, _mm_add_epi32(_mm_loadu_si128(sums), _mm_slli_epi32(counts, shift)));
  }
}

template <int MR>
static void dot_floats(const GemmTask& task, const uint8_t* a, const uint8_t* w, float* out, int64_t out_stride) {
  __m512 acc[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < task.depth; p += 64) {
    __m512 b[kTileN];
    for (int j = 0; j < kTileN; ++j) b[j] = _mm512_load_ps(w + j * task.w_stride + p);
    for (int i = 0; i < MR; ++i) {
      const __m512 v = _mm512_load_ps(a + i * task.a_stride + p);
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_fmadd_ps(b[j], v, acc[i][j]);
    }
  }
  const auto fold = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
  for (int i = 0; i < MR; ++i) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(fold(acc[i][0]), fold(acc[i][1])), _mm256_hadd_ps(fold(acc[i][2]), fold(acc[i][3])));
    _mm_storeu_ps(out + i * out_stride, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
}

#elif defined(__AVX2__)

static inline __m128i sum_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

static inline __m256i load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// Pairs of products that fit 16 bits: as many steps in 16-bit sums as cannot overflow, then into 32 bits.
template <int MR>
static void dot_narrow(const GemmTask& task, const uint8_t* a, const uint8_t* w, uint32_t* out, int64_t out_stride) {
  __m256i total[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) total[i][j] = _mm256_setzero_si256();
  }
  const int64_t flush = 32767 / task.max_pair * kPanelBytes;
  for (int64_t begin = 0; begin < task.depth; begin += flush) {
    const int64_t end = smaller(begin + flush, task.depth);
    __m256i acc[MR][kTileN];
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_setzero_si256();
    }
    for (int64_t p = begin; p < end; p += kPanelBytes) {
      __m256i b[kTileN];
      for (int j = 0; j < kTileN; ++j) b[j] = load_bytes(w + j * task.w_stride + p);
      for (int i = 0; i < MR; ++i) {
        const __m256i v = load_bytes(a + i * task.a_stride + p);
        for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_add_epi16(acc[i][j], _mm256_maddubs_epi16(b[j], v));
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kTileN; ++j) total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(acc[i][j], ones));
    }
  }
  for (int i = 0; i < MR; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), sum_lanes(total[i][0], total[i][1], total[i][2], total[i][3]));
  }
}

// Bytes of the full range: widened to 16 bits first, since maddubs would saturate.
template <int MR>
static void dot_wide(const GemmTask& task, const uint8_t* a, const uint8_t* w, uint32_t* out, int64_t out_stride) {
  __m256i acc[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_setzero_si256();
  }
  for (int64_t p = 0; p < task.depth; p += 16) {
    __m256i b[kTileN];
    for (int j = 0; j < kTileN; ++j) {
      b[j] = _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(w + j * task.w_stride + p)));
    }
    for (int i = 0; i < MR; ++i) {
      const __m256i v = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(a + i * task.a_stride + p)));
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(b[j], v));
    }
  }
  for (int i = 0; i < MR; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
}

template <int MR>
static void dot_bytes(const GemmTask& task, const uint8_t* a, const uint8_t* w, uint32_t* out, int64_t out_stride) {
  if (task.max_pair <= 32767) {
    dot_narrow<MR>(task, a, w, out, out_stride);
  } else {
    dot_wide<MR>(task, a, w, out, out_stride);
  }
}

// Counts of nibbles by table look-up, in byte sums for as long as those cannot overflow.
template <int MR>
static void dot_bits(const GemmTask& task, const uint8_t* a, const uint8_t* w, int shift, uint32_t* out, int64_t out_stride) {
  const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  constexpr int64_t kDepth = 31 * kPanelBytes;  // a step adds up to 8
  __m256i total[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) total[i][j] = _mm256_setzero_si256();
  }
  for (int64_t begin = 0; begin < task.depth; begin += kDepth) {
    const int64_t end = smaller(begin + kDepth, task.depth);
    __m256i acc[MR][kTileN];
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_setzero_si256();
    }
    for (int64_t p = begin; p < end; p += kPanelBytes) {
      for (int i = 0; i < MR; ++i) {
        const __m256i v = load_bytes(a + i * task.a_stride + p);
        for (int j = 0; j < kTileN; ++j) {
          const __m256i both = _mm256_and_si256(v, load_bytes(w + j * task.w_stride + p));
          const __m256i lo = _mm256_shuffle_epi8(counts, _mm256_and_si256(both, low));
          const __m256i hi = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
          acc[i][j] = _mm256_add_epi8(acc[i][j], _mm256_add_epi8(lo, hi));
        }
      }
    }
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kTileN; ++j) {
        total[i][j] = _mm256_add_epi32(total[i][j], _mm256_sad_epu8(acc[i][j], _mm256_setzero_si256()));
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    __m128i* const sums = reinterpret_cast<__m128i*>(out + i * out_stride);
    const __m128i tile = sum_lanes(total[i][0], total[i][1], total[i][2], total[i][3]);
    _mm_storeu_si128(sums, _mm_add_epi32(_mm_loadu_si128(sums), _mm_slli_epi32(tile, shift)));
  }
}

template <int MR>
static void dot_floats(const GemmTask& task, const uint8_t* a, const uint8_t* w, float* out, int64_t out_stride) {
  __m256 acc[MR][kTileN];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_setzero_ps();
  }
  const auto floats = [](const uint8_t* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); };
  for (int64_t p = 0; p < task.depth; p += 32) {
    __m256 b[kTileN];
    for (int j = 0; j < kTileN; ++j) b[j] = floats(w + j * task.w_stride + p);
    for (int i = 0; i < MR; ++i) {
      const __m256 v = floats(a + i * task.a_stride + p);
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_fmadd_ps(b[j], v, acc[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(acc[i][0], acc[i][1]), _mm256_hadd_ps(acc[i][2], acc[i][3]));
    _mm_storeu_ps(out + i * out_stride, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
}

#else

template <int MR>
static void dot_bytes(const GemmTask& task, const uint8_t* a, const uint8_t* w, uint32_t* out, int64_t out_stride) {
  for (int i = 0; i < MR; ++i) {
    const int8_t* x = reinterpret_cast<const int8_t*>(a + i * task.a_stride);
    for (int j = 0; j < kTileN; ++j) {
      const uint8_t* y = w + j * task.w_stride;
      uint32_t sum = 0;  // products of 16 bits, which the vectoriser widens and adds in pairs
      for (int64_t p = 0; p < task.depth; ++p) sum += static_cast<uint32_t>(static_cast<int16_t>(x[p]) * static_cast<int16_t>(y[p]));
      out[i * out_stride + j] = sum;
    }
  }
}

static inline uint64_t count_bits(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  return ((x + (x >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u >> 56;
}

template <int MR>
static void dot_bits(const GemmTask& task, const uint8_t* a, const uint8_t* w, int shift, uint32_t* out, int64_t out_stride) {
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kTileN; ++j) {
      uint64_t sum = 0;
      for (int64_t p = 0; p < task.depth; p += 8) {
        uint64_t x, y;
        std::memcpy(&x, a + i * task.a_stride + p, 8);
        std::memcpy(&y, w + j * task.w_stride + p, 8);
        sum += count_bits(x & y);
      }
      out[i * out_stride + j] += static_cast<uint32_t>(sum << shift);
    }
  }
}

template <int MR>
static void dot_floats(const GemmTask& task, const uint8_t* a, const uint8_t* w, float* out, int64_t out_stride) {
  for (int i = 0; i < MR; ++i) {
    const float* x = reinterpret_cast<const float*>(a + i * task.a_stride);
    for (int j = 0; j < kTileN; ++j) {
      const float* y = reinterpret_cast<const float*>(w + j * task.w_stride);
      Vec sum[4];
      for (Vec& s : sum) s = broadcast(0.0f);
      for (int64_t p = 0; p < task.depth / 4; p += 16) {
        for (int q = 0; q < 4; ++q) sum[q] = add(sum[q], mul(load(x + p + 4 * q), load(y + p + 4 * q)));
      }
      const Vec s = add(add(sum[0], sum[1]), add(sum[2], sum[3]));
      out[i * out_stride + j] = (s.lane[0] + s.lane[1]) + (s.lane[2] + s.lane[3]);
    }
  }
}

#endif

// `rows` <= MR rows of a against `columns` (a multiple of kTileN) panel rows of w. out: uint32 sums, or floats.
template <int MR>
static void dot_rows(const GemmTask& task, const uint8_t* a, int64_t rows, const uint8_t* w, int64_t columns, uint32_t* out) {
  if constexpr (MR > 1) {
    if (rows < MR) return dot_rows<MR - 1>(task, a, rows, w, columns, out);
  }
  for (int64_t j = 0; j < columns; j += kTileN) {
    const uint8_t* tile = w + j * task.w_stride;
    switch (task.panel) {
      case Panel::kBytes: dot_bytes<MR>(task, a, tile, out + j, columns); break;
      case Panel::kFloats: dot_floats<MR>(task, a, tile, reinterpret_cast<float*>(out) + j, columns); break;
      case Panel::kBits:
        for (int i = 0; i < MR; ++i) std::memset(out + i * columns + j, 0, kTileN * sizeof(uint32_t));
        for (int32_t p = 0; p < task.a_planes; ++p) {
          for (int32_t q = 0; q < task.w_planes; ++q) {
            dot_bits<MR>(task, a + p * task.depth, tile + q * task.depth, p + q, out + j, columns);
          }
        }
        break;
    }
  }
}

// One row of y: columns [begin, begin + count).
static void write_row(const GemmTask& task, int64_t m, int64_t begin, int64_t count, const uint32_t* sums, const uint32_t* w_sums,
                      float* row) {
  const float a_scale = task.a_scale ? task.a_scale[m] : 1.0f;
  const float* w_scale = task.w_scale + begin;
  const float* bias = task.bias ? task.bias + begin : nullptr;
  const auto write = [&](int64_t j, float product) { row[j] = __builtin_fmaf(product * a_scale, w_scale[j], bias ? bias[j] : 0.0f); };
  if (task.panel == Panel::kFloats) {
    const float* dots = reinterpret_cast<const float*>(sums);
    for (int64_t j = 0; j < count; ++j) write(j, dots[j]);
  } else {
    const uint32_t product = task.mul_a * task.mul_w;
    const uint32_t of_row = task.mul_a * task.add_w * task.a_sum[m] + task.constant;
    const uint32_t of_column = task.mul_w * task.add_a;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t acc = product * sums[j] + of_row + of_column * w_sums[j];
      write(j, static_cast<float>(static_cast<int32_t>(acc)));
    }
  }
  const int64_t size = task.y_dtype == DType::kFloat32 ? 4 : 2;
  store_floats(row, task.y_dtype, count, task.y + (m * task.n + begin) * size);
}

}  // namespace

void fill_a(const GemmTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    uint8_t* out = task.a_panel + r * task.a_stride;
    const uint8_t* row = task.a + r * task.a_row_bytes;
    if (task.panel == Panel::kFloats) {
      const int64_t count = task.depth / 4;
      float* floats = reinterpret_cast<float*>(out);
      if (!task.halves) {
        load_floats(row, task.a_dtype, task.k, floats);
        zero_padding(floats, task.k, count, false);
        continue;
      }
      const int64_t size = task.a_dtype == DType::kFloat32 ? 4 : 2;
      for (int64_t i = 0; i < count; i += 2 * kPanelBytes) {
        float columns[2 * kPanelBytes] = {};
        load_floats(row + i * size, task.a_dtype, smaller(task.k - i, 2 * kPanelBytes), columns);
        separate_halves(columns, 2 * kPanelBytes, floats + i);
      }
      continue;
    }
    if (task.panel == Panel::kBits) {
      if (r == task.m) {  // the row of ones: plane 0 alone
        std::memset(out, 0, task.a_stride);
        std::memset(out, 0xFF, task.depth);
        continue;
      }
      copy_planes(row, task.a_planes, task.a_plane_stride, task.a_row_bytes, task.depth, out);
      uint32_t sum = 0;
      for (int32_t j = 0; j < task.a_planes; ++j) {
        for (int64_t i = 0; i < task.depth; i += 8) {
          uint64_t bits;
          std::memcpy(&bits, out + j * task.depth + i, 8);
          sum += static_cast<uint32_t>(__builtin_popcountll(bits)) << j;
        }
      }
      task.a_sum[r] = sum;
      continue;
    }
    if (r == task.m) {
      std::memset(out, 1, task.depth);
    } else {
      read_row(row, task.a_layout, task.a_planes, task.a_plane_stride, task.a_row_bytes, task.k, task.halves, task.depth, out);
      look_up(task.a_table, task.depth, out, task.a_layout == Layout::kPacked);
    }
    zero_padding(out, task.k, task.depth, task.halves);
    if (r == task.m) continue;
    int32_t sum = 0;
    for (int64_t i = 0; i < task.depth; ++i) sum += static_cast<int8_t>(out[i]);
    task.a_sum[r] = static_cast<uint32_t>(sum);
  }
}

void gemm(const GemmTask& task, int64_t begin, int64_t end, uint8_t* scratch) {
  uint8_t* const panel = scratch;
  uint32_t* const sums = reinterpret_cast<uint32_t*>(panel + task.block_n * task.w_stride);
  uint32_t* const w_sums = sums + kTileM * task.block_n;
  float* const row = reinterpret_cast<float*>(w_sums + task.block_n);
  for (int64_t first = begin; first < end; first += task.block_n) {
    const int64_t count = smaller(task.block_n, end - first);
    const int64_t columns = (count + kTileN - 1) / kTileN * kTileN;
    for (int64_t j = 0; j < count; ++j) fill_w_row(task, first + j, panel + j * task.w_stride);
    std::memset(panel + count * task.w_stride, 0, (columns - count) * task.w_stride);
    std::memset(w_sums, 0, columns * sizeof(uint32_t));
    if (task.has_ones) dot_rows<1>(task, task.a_panel + task.m * task.a_stride, 1, panel, columns, w_sums);
    for (int64_t m = 0; m < task.m; m += kTileM) {
      const int64_t rows = smaller(kTileM, task.m - m);
      dot_rows<kTileM>(task, task.a_panel + m * task.a_stride, rows, panel, columns, sums);
      for (int64_t i = 0; i < rows; ++i) write_row(task, m + i, first, count, sums + i * columns, w_sums, row);
    }
  }
}

}  // namespace quest::QUEST_ISA
