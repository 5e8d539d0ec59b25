// quantize and dequantize, a row at a time: the row lies as float32 in scratch (L1, or L2 for long rows), goes through the prologue and is
// rotated there, and its codes, mask bits and index leave in 64-column steps.
#include "isa/simd.h"

namespace quest::QUEST_ISA {
namespace {

static inline int64_t padded_row(int64_t k) { return (k + kRowChunk - 1) / kRowChunk * kRowChunk; }

// Sum of squares in 32 partial sums, whatever the vector width, so that every instruction set finds the same sigma. The row ends in zeros.
static float sum_of_squares(const float* row, int64_t padded) {
  constexpr int kSums = 32;
  constexpr int kVectors = kSums / kLanes;
  Vec sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = broadcast(0.0f);
  for (int64_t i = 0; i < padded; i += kSums) {
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = load(row + i + j * kLanes);
      sum[j] = add(sum[j], mul(x, x));
    }
  }
  float sums[kSums];
  for (int j = 0; j < kVectors; ++j) store(sums + j * kLanes, sum[j]);
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// To the nearest numbers of dtype.
static void round_floats(float* x, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) return;
  uint16_t rounded[kChunk];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t step = smaller(count - i, kChunk);
    store_floats(x + i, dtype, step, rounded);
    load_floats(rounded, dtype, step, x + i);
  }
}

static void rms_norm(float* row, const float* weight, int64_t k, int64_t padded, float epsilon) {
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(row, padded) / static_cast<float>(k) + epsilon);
  for (int64_t i = 0; i < k; ++i) row[i] = row[i] * factor * weight[i];
}

// x/(1 + e^-x) to a few units in the last place. e^y = 2^n e^r with |r| <= ln(2)/2, where the series of e^r up to r^7/7! is off by 5e-9.
// 2^n is two factors, so that it overflows to infinity and underflows as e^y does; beyond +-104 it has done so.
static inline float silu(float x) {
  float y = -x;
  y = y > -104.0f ? y : -104.0f;
  y = y < 104.0f ? y : 104.0f;
  constexpr float kRound = 12582912.0f;  // as in write_affine
  constexpr int32_t kRoundBits = 0x4B400000;
  const float shifted = y * 1.44269504f + kRound;  // 1/ln(2)
  const float n = shifted - kRound;
  int32_t power;
  std::memcpy(&power, &shifted, 4);
  power -= kRoundBits;
  const float r = y - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts, n times the first one exact
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t half_bits = ((power >> 1) + 127) << 23;
  const int32_t rest_bits = (power - (power >> 1) + 127) << 23;
  float half, rest;
  std::memcpy(&half, &half_bits, 4);
  std::memcpy(&rest, &rest_bits, 4);
  return x / (1.0f + series * half * rest);
}

static void silu_mul(float* gate, const float* up, DType dtype, int64_t k) {
  for (int64_t i = 0; i < k; ++i) gate[i] = silu(gate[i]);
  round_floats(gate, dtype, k);
  for (int64_t i = 0; i < k; ++i) gate[i] *= up[i];
}

// What a row's codes are computed with.
struct RowGrid {
  float scale;       // s
  float reciprocal;  // of the code step: 1/(2s) for int, else 1/s; 0 where s is 0
  float sigma;
  float mask_limit;
};

// int, int_zero, ternary: c = rint(clamp(x reciprocal, +-) + shift) + offset.
struct AffineCodes {
  float low, high, shift;
  int32_t offset;
};

static AffineCodes affine_codes(Grid grid) {
  const int32_t n = 1 << grid.bits;
  if (grid.kind == GridKind::kInt) return {-0.5f * (n - 1), 0.5f * (n - 1), 0.5f, n / 2 - 1};
  if (grid.kind == GridKind::kIntZero) return {-(0.5f * n - 1), 0.5f * n, 0.0f, n / 2 - 1};
  return {-1.0f, 1.0f, 0.0f, 1};
}

static void write_affine(const AffineCodes& a, const float* x, float reciprocal, uint8_t* codes) {
  // Adding 1.5 * 2^23 leaves the integer nearest to a small float, ties to even, in its low bits.
  constexpr float kRound = 12582912.0f;
  constexpr int32_t kRoundBits = 0x4B400000;
  for (int j = 0; j < kChunk; ++j) {
    float y = x[j] * reciprocal;
    y = y > a.low ? y : a.low;
    y = y < a.high ? y : a.high;
    y = y + a.shift + kRound;
    int32_t bits;
    std::memcpy(&bits, &y, 4);
    codes[j] = static_cast<uint8_t>(bits - kRoundBits + a.offset);
  }
}

// Number of the n - 1 middles below the value: by comparing with each where they are few, which needs no gather, else by halving.
static void write_nearest(const float* middles, int32_t n, const float* z, int32_t* found) {
  for (int j = 0; j < kChunk; ++j) found[j] = 0;
  if (n <= 16) {
    for (int32_t i = 0; i < n - 1; ++i) {
      for (int j = 0; j < kChunk; ++j) found[j] += z[j] > middles[i];
    }
    return;
  }
  for (int32_t step = n / 2; step > 0; step /= 2) {
    for (int j = 0; j < kChunk; ++j) found[j] += z[j] > middles[found[j] + step - 1] ? step : 0;
  }
}

static void write_table_codes(const QuantizeTask& task, const float* x, float reciprocal, uint8_t* codes) {
  const bool fp4 = task.grid.kind == GridKind::kFp4;
  float z[kChunk];
  int32_t found[kChunk];
  for (int j = 0; j < kChunk; ++j) z[j] = fp4 ? __builtin_fabsf(x[j] * reciprocal) : x[j] * reciprocal;
  write_nearest(task.middles, fp4 ? 8 : task.params.levels, z, found);
  for (int j = 0; j < kChunk; ++j) codes[j] = static_cast<uint8_t>(found[j] | (fp4 && x[j] < 0 ? 8 : 0));
}

// Which of 64 values 4:8 sparsity keeps (0 or 1), and eight index nibbles.
static uint32_t write_kept(const float* x, uint8_t* kept) {
  constexpr int kGroups = kChunk / 8;
  float norm[4][kGroups];
  for (int p = 0; p < 4; ++p) {
    for (int g = 0; g < kGroups; ++g) {
      const float a = x[8 * g + 2 * p];
      const float b = x[8 * g + 2 * p + 1];
      norm[p][g] = a * a + b * b;
    }
  }
  int32_t before[4][kGroups] = {};  // pairs that come before this one: larger, or as large and earlier
  for (int p = 0; p < 4; ++p) {
    for (int q = 0; q < 4; ++q) {
      for (int g = 0; g < kGroups; ++g) before[p][g] += q < p ? norm[q][g] >= norm[p][g] : norm[q][g] > norm[p][g];
    }
  }
  uint32_t index = 0;
  for (int g = 0; g < kGroups; ++g) {
    int position = 4 * g;
    for (int p = 0; p < 4; ++p) {
      const bool keep = before[p][g] < 2;
      kept[8 * g + 2 * p] = kept[8 * g + 2 * p + 1] = keep;
      index |= keep ? static_cast<uint32_t>(p) << position : 0;
      position += keep ? 2 : 0;
    }
  }
  return index;
}

// The kept codes of eight groups, in order.
static void compress(const uint8_t* codes, uint32_t index, uint8_t* half) {
  for (int pair = 0; pair < 2 * kChunk / 8; ++pair) std::memcpy(half + 2 * pair, codes + pair / 2 * 8 + 2 * (index >> (2 * pair) & 3), 2);
}

static void write_mask(const QuantizeTask& task, const RowGrid& grid, const float* x, const uint8_t* codes, const uint8_t* kept,
                       uint8_t* pass) {
  if (task.params.mask_kind != kMaskError) {
    for (int j = 0; j < kChunk; ++j) pass[j] = __builtin_fabsf(x[j]) <= grid.mask_limit;
    return;
  }
  for (int j = 0; j < kChunk; ++j) {
    const float level = kept[j] ? task.levels[codes[j]] : 0.0f;
    pass[j] = __builtin_fabsf(grid.scale * level - x[j]) <= grid.mask_limit;
  }
}

static RowGrid row_grid(const QuantizeTask& task, float sigma) {
  const QuantizeParams& p = task.params;
  RowGrid grid;
  grid.sigma = sigma;
  grid.scale = p.scale_factor * sigma + p.scale_epsilon;
  const float step = task.grid.kind == GridKind::kInt ? 2 * grid.scale : grid.scale;
  grid.reciprocal = step > 0 ? 1 / step : 0.0f;
  switch (p.mask_kind) {
    case kMaskScale: grid.mask_limit = p.mask_factor * grid.scale; break;
    // clip k: k (alpha sigma + 1e-8) for int; the ratio of the scale's two terms is 1e-8/alpha.
    case kMaskMagnitude: grid.mask_limit = p.mask_factor * (sigma + p.scale_epsilon / p.scale_factor); break;
    case kMaskError: grid.mask_limit = p.mask_factor * sigma; break;
    default: grid.mask_limit = __builtin_inff(); break;
  }
  return grid;
}

// A row that holds no numbers.
static void write_nan_row(const QuantizeTask& task, int64_t r) {
  const int64_t planes = task.layout == Layout::kPlanes ? task.grid.bits : 1;
  for (int64_t j = 0; j < planes; ++j) std::memset(task.codes + j * task.plane_stride + r * task.code_row_bytes, 0, task.code_row_bytes);
  if (task.mask) std::memset(task.mask + r * task.mask_row_bytes, 0, task.mask_row_bytes);
  if (task.index) {
    // Any valid index: the first two pairs.
    std::memset(task.index + r * task.index_row_bytes, 0, task.index_row_bytes);
    for (int64_t i = 0; i < task.k / 8; ++i) task.index[r * task.index_row_bytes + i / 2] |= i % 2 ? 0x40 : 0x04;
  }
  task.scale[r] = __builtin_nanf("");
  task.code_sum[r] = 0;
}

// other: with a prologue, the weight of the norm, or scratch for `up`.
static void quantize_row(const QuantizeTask& task, int64_t r, float* row, float* other) {
  const int64_t k = task.k;
  const int64_t padded = padded_row(k);
  const uint8_t* const x_row = static_cast<const uint8_t*>(task.x) + r * task.x_row_bytes;
  load_floats(x_row, task.dtype, k, row);
  std::memset(row + k, 0, (padded - k) * sizeof(float));
  if (task.prologue == PrologueKind::kRmsNorm) {
    rms_norm(row, other, k, padded, task.norm_epsilon);
  } else if (task.prologue == PrologueKind::kSiluMul) {
    load_floats(x_row + task.x_row_bytes / 2, task.dtype, k, other);
    silu_mul(row, other, task.dtype, k);
  }
  if (task.prologue != PrologueKind::kNone) round_floats(row, task.dtype, k);
  const float sum = sum_of_squares(row, padded);
  if (!(sum <= __FLT_MAX__)) return write_nan_row(task, r);
  rotate(row, k, task.block);

  const RowGrid grid = row_grid(task, __builtin_sqrtf(sum / static_cast<float>(k)));
  const bool table = task.grid.kind == GridKind::kFp4 || task.grid.kind == GridKind::kGauss;
  const AffineCodes affine = affine_codes(task.grid);
  uint8_t* const codes_out = task.codes + r * task.code_row_bytes;
  if (task.index) std::memset(task.index + r * task.index_row_bytes, 0, task.index_row_bytes);
  int32_t code_sum = 0;
  // To `padded`, not to k: rows of masks and planes are padded to 128 columns.
  for (int64_t i = 0; i < padded; i += kChunk) {
    const float* x = row + i;
    const int64_t count = k > i ? smaller(k - i, kChunk) : 0;
    uint8_t codes[kChunk];
    uint8_t kept[kChunk];
    if (table) {
      write_table_codes(task, x, grid.reciprocal, codes);
    } else {
      write_affine(affine, x, grid.reciprocal, codes);
    }
    uint32_t index = 0;
    if (task.sparse) {
      index = write_kept(x, kept);
      std::memcpy(task.index + r * task.index_row_bytes + i / 16, &index, (count + 15) / 16);
      if (count % 16) task.index[r * task.index_row_bytes + i / 16 + count / 16] &= 0x0F;
    } else {
      std::memset(kept, 1, sizeof(kept));
    }
    if (task.mask && i / 8 < task.mask_row_bytes) {
      uint8_t pass[kChunk];
      write_mask(task, grid, x, codes, kept, pass);
      std::memset(pass + count, 0, kChunk - count);
      const uint64_t bits = bits_of(pass, 0);
      std::memcpy(task.mask + r * task.mask_row_bytes + i / 8, &bits, 8);
    }
    std::memset(codes + count, 0, kChunk - count);
    int32_t sum_of_codes = 0;
    for (int j = 0; j < kChunk; ++j) sum_of_codes += kept[j] ? codes[j] : 0;
    code_sum += sum_of_codes;
    if (task.layout == Layout::kValues) {
      for (int j = 0; j < kChunk; ++j) codes[j] = kept[j] ? task.stored[codes[j]] : 0;
      write_codes(codes_out, task.layout, task.grid.bits, task.plane_stride, task.code_row_bytes, i, codes);
    } else if (task.sparse) {
      uint8_t half[kChunk] = {};
      compress(codes, index, half);
      if (task.layout == Layout::kPacked) {
        write_codes(codes_out + i / 4, task.layout, 0, 0, smaller(task.code_row_bytes - i / 4, kChunk / 4), 0, half);
      } else {
        std::memcpy(codes_out + i / 2, half, count / 2);
      }
    } else {
      write_codes(codes_out, task.layout, task.grid.bits, task.plane_stride, task.code_row_bytes, i, codes);
    }
  }
  task.scale[r] = grid.scale;
  task.code_sum[r] = code_sum;
}

}  // namespace

void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end, float* row) {
  float* const other = row + padded_row(task.k);
  if (task.prologue == PrologueKind::kRmsNorm) load_floats(task.norm_weight, task.dtype, task.k, other);
  for (int64_t r = begin; r < end; ++r) quantize_row(task, r, row, other);
}

static inline int32_t index_nibble(const DequantizeTask& task, int64_t r, int64_t group) {
  return task.index[r * task.index_row_bytes + group / 2] >> (group % 2 * 4) & 15;
}

void dequantize_rows(const DequantizeTask& task, int64_t begin, int64_t end, float* row) {
  const int64_t size = task.dtype == DType::kFloat32 ? 4 : 2;
  const bool half = task.index && task.layout != Layout::kValues;  // the row holds the kept codes alone
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* codes_in = task.codes + r * task.code_row_bytes;
    const float scale = task.scale[r];
    const int64_t stored = half ? task.k / 2 : task.k;
    for (int64_t i = 0; i < stored; i += kChunk) {
      uint8_t codes[kChunk];
      read_codes(codes_in, task.layout, task.bits, task.plane_stride, task.code_row_bytes, i, codes);
      if (!half) {
        for (int j = 0; j < kChunk; ++j) row[i + j] = scale * task.levels[codes[j]];
        continue;
      }
      const int64_t last = smaller(i / 4 + kChunk / 4, task.k / 8);
      for (int64_t group = i / 4; group < last; ++group) {
        const int32_t pairs = index_nibble(task, r, group);
        float* out = row + 8 * group;
        for (int j = 0; j < 8; ++j) out[j] = scale * 0.0f;
        for (int j = 0; j < 4; ++j) out[2 * (pairs >> (j / 2 * 2) & 3) + j % 2] = scale * task.levels[codes[4 * (group - i / 4) + j]];
      }
    }
    // All values of a sparse row: no 8-bit int value is 0, so the pruned ones are known by the index alone.
    for (int64_t group = 0; task.index && !half && group < task.k / 8; ++group) {
      const int32_t pairs = index_nibble(task, r, group);
      for (int pair = 0; pair < 4; ++pair) {
        if ((pairs & 3) != pair && pairs >> 2 != pair) row[8 * group + 2 * pair] = row[8 * group + 2 * pair + 1] = scale * 0.0f;
      }
    }
    const int64_t padded = (task.k + kRowChunk - 1) / kRowChunk * kRowChunk;
    std::memset(row + task.k, 0, (padded - task.k) * sizeof(float));
    rotate(row, task.k, task.block);
    store_floats(row, task.dtype, task.k, static_cast<uint8_t*>(task.y) + r * task.k * size);
  }
}

}  // namespace quest::QUEST_ISA
