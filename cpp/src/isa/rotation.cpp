// The fast Walsh-Hadamard transform of float32 rows, in scratch.
//
// Stages run by rising stride, so that every instruction set rounds alike: strides up to a chunk of eight vectors in registers, then two
// stages a pass over memory. 1/sqrt(B) is applied once, as the last thing.
#include "isa/simd.h"

namespace quest::QUEST_ISA {
namespace {

constexpr int kVectors = 8;
constexpr int64_t kRegisterChunk = kVectors * kLanes;
static_assert(kRowChunk % kRegisterChunk == 0, "scratch rows hold whole register chunks");

template <int S>
static inline void stage_across(Vec* v) {
  for (int i = 0; i < kVectors; ++i) {
    if (i & S) continue;
    const Vec a = v[i];
    const Vec b = v[i + S];
    v[i] = add(a, b);
    v[i + S] = sub(a, b);
  }
}

template <int S>
static inline void stage_within(Vec* v) {
  for (int i = 0; i < kVectors; ++i) v[i] = butterfly<S>(v[i]);
}

// One block, or several, of a register chunk.
static inline void rotate_chunk(float* x, int64_t block, float factor) {
  Vec v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = load(x + i * kLanes);
  if (block > 1) stage_within<1>(v);
  if (block > 2) stage_within<2>(v);
#if defined(__AVX2__)
  if (block > 4) stage_within<4>(v);
#endif
#if defined(__AVX512F__)
  if (block > 8) stage_within<8>(v);
#endif
  if (block > kLanes) stage_across<1>(v);
  if (block > 2 * kLanes) stage_across<2>(v);
  if (block > 4 * kLanes) stage_across<4>(v);
  const Vec f = broadcast(factor);
  for (int i = 0; i < kVectors; ++i) store(x + i * kLanes, block <= kRegisterChunk ? mul(v[i], f) : v[i]);
}

// Strides s and 2s of one block of 4s or more.
static inline void stage_pair(float* x, int64_t block, int64_t s, bool last, float factor) {
  const Vec f = broadcast(factor);
  for (int64_t base = 0; base < block; base += 4 * s) {
    for (int64_t i = base; i < base + s; i += kLanes) {
      const Vec a = load(x + i);
      const Vec b = load(x + i + s);
      const Vec c = load(x + i + 2 * s);
      const Vec d = load(x + i + 3 * s);
      const Vec p = add(a, b);
      const Vec q = sub(a, b);
      const Vec r = add(c, d);
      const Vec t = sub(c, d);
      const Vec out[4] = {add(p, r), add(q, t), sub(p, r), sub(q, t)};
      for (int j = 0; j < 4; ++j) store(x + i + j * s, last ? mul(out[j], f) : out[j]);
    }
  }
}

// The last stride alone: s = block/2.
static inline void stage_last(float* x, int64_t s, float factor) {
  const Vec f = broadcast(factor);
  for (int64_t i = 0; i < s; i += kLanes) {
    const Vec a = load(x + i);
    const Vec b = load(x + i + s);
    store(x + i, mul(add(a, b), f));
    store(x + i + s, mul(sub(a, b), f));
  }
}

}  // namespace

void rotate(float* row, int64_t k, int64_t block) {
  if (block == 1) return;
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int64_t i = 0; i < k; i += kRegisterChunk) rotate_chunk(row + i, block, factor);
  if (block <= kRegisterChunk) return;
  for (int64_t base = 0; base < k; base += block) {
    int64_t s = kRegisterChunk;
    for (; 4 * s <= block; s *= 4) stage_pair(row + base, block, s, 4 * s == block, factor);
    if (2 * s == block) stage_last(row + base, s, factor);
  }
}

void rotate_rows(const RotateTask& task, int64_t begin, int64_t end, float* row) {
  const int64_t size = task.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t padded = (task.k + kRowChunk - 1) / kRowChunk * kRowChunk;
  for (int64_t r = begin; r < end; ++r) {
    load_floats(static_cast<const uint8_t*>(task.x) + r * task.k * size, task.dtype, task.k, row);
    std::memset(row + task.k, 0, (padded - task.k) * sizeof(float));
    if (task.rotate_first) rotate(row, task.k, task.block);
    if (task.mask) {
      const uint8_t* mask = task.mask + r * task.mask_row_bytes;
      for (int64_t i = 0; i < task.k; i += kChunk) {
        uint8_t pass[kChunk];
        read_codes(mask, Layout::kPlanes, 1, 0, task.mask_row_bytes, i, pass);
        for (int j = 0; j < kChunk; ++j) row[i + j] = pass[j] ? row[i + j] : 0.0f;
      }
    }
    if (task.rotate_last) rotate(row, task.k, task.block);
    store_floats(row, task.dtype, task.k, static_cast<uint8_t*>(task.y) + r * task.k * size);
  }
}

}  // namespace quest::QUEST_ISA
