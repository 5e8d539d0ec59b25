// The operands of integer products as the kernels see them: rows of bytes or nibbles that are read 16 bytes at a time and turned into int8
// integers u.
//
// Each operand has v = mul u + add (quest/gemm.h). How u is made of what is stored:
//   kValues            u as stored (mul = 1, add = 0; the 8-bit grids mul u + add = v)
//   kCodes, kEvenOdd   the u of kValues, by bytewise arithmetic or, for fp4, by table; kEvenOdd in its order, which w then has too
//   kPacked            u = c; where fp4 is involved, v by table for both operands, because code_sum does not give the sum of an fp4 row
//   kPacked, sparse    v by table, 0 where pruned
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/chunk.cuh"
#include "common/grid.cuh"
#include "quest/gemm.h"
#include "quest/packing.h"

namespace quest::cuda {

// Rows of one stored integer a byte, or of plain bytes (16-bit floats, bit planes).
struct ByteRows {
  const uint8_t* data;
  int64_t rows, row_bytes, plane_bytes;
  bool vectorized;  // rows start at multiples of 16 bytes
  bool converts;    // u = convert(byte), else the byte
  bool looks_up;    // convert: by table, else mul byte + add, modulo 256, mul 1 or 2
  uint32_t mul, add;
  uint4 table;
  bool even_odd;  // NarrowingLoader: the order of kEvenOdd

  __device__ __forceinline__ bool copies() const { return vectorized && !converts; }

  // Bytes byte ... byte + 15 of a row of a plane.
  __device__ __forceinline__ const uint8_t* address(int plane, int64_t row, int64_t byte) const {
    return data + plane * plane_bytes + row * row_bytes + byte;
  }
  __device__ __forceinline__ bool contains(int64_t row, int64_t byte) const { return row < rows && byte < row_bytes; }

  __device__ uint4 load(int plane, int64_t row, int64_t byte) const {
    uint32_t words[4] = {0, 0, 0, 0};
    if (contains(row, byte)) {
      const uint8_t* source = address(plane, row, byte);
      if (vectorized) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(source);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (byte + i < row_bytes) words[i / 4] |= static_cast<uint32_t>(source[i]) << (8 * (i % 4));
        }
      }
      if (converts) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t left = row_bytes - byte - 4 * i;
          const uint32_t exists = left >= 4 ? 0xFFFFFFFFu : left <= 0 ? 0u : 0xFFFFFFFFu >> (8 * (4 - left));
          words[i] = convert(words[i]) & exists;
        }
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

 private:
  __device__ __forceinline__ uint32_t convert(uint32_t codes) const {
    if (looks_up) return look_up_nibbles(table, __byte_perm(codes | codes >> 4, 0u, 0x4420));
    // A bytewise sum without carries between bytes: the lower 7 bits added, the top bit by exclusive or.
    const uint32_t scaled = mul == 2 ? codes << 1 & 0xFEFEFEFEu : codes;
    return ((scaled & 0x7F7F7F7Fu) + (add & 0x7F7F7F7Fu)) ^ ((scaled ^ add) & 0x80808080u);
  }
};

// Rows of two codes a byte, padded to 16 bytes.
struct NibbleRows {
  const uint8_t* data;
  int64_t rows, row_bytes;
  bool looks_up;
  uint4 table;
  bool even_odd;  // what is widened has the order of kEvenOdd

  // 32 codes.
  __device__ __forceinline__ uint4 load(int64_t row, int64_t byte) const {
    if (row >= rows || byte >= row_bytes) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(data + row * row_bytes + byte);
  }

  // 8 codes to 8 integers.
  __device__ __forceinline__ uint2 widen(uint32_t nibbles) const {
    if (looks_up) return make_uint2(look_up_nibbles(table, nibbles), look_up_nibbles(table, nibbles >> 16));
    return nibbles_to_codes(nibbles);
  }
};

// Rows of the kept codes of a 4:8 sparse matrix, and of its pair indices.
struct SparseRows {
  NibbleRows kept;
  const uint8_t* index;
  int64_t index_row_bytes;
  int64_t groups;  // of 8 columns, a row
  bool even_odd;   // what is expanded has the order of kEvenOdd

  // The pair indices of 64 columns, a nibble for every 8.
  __device__ __forceinline__ uint32_t load_index(int64_t row, int64_t byte) const {
    if (row >= kept.rows || byte >= index_row_bytes) return 0;
    return *reinterpret_cast<const uint32_t*>(index + row * index_row_bytes + byte);
  }

  // 4 kept codes (16 bits) and their index to 8 integers, 0 where pruned.
  __device__ __forceinline__ uint2 expand(uint32_t codes, uint32_t pairs) const {
    const uint32_t values = look_up_nibbles(kept.table, codes);
    const uint64_t spread = static_cast<uint64_t>(values & 0xFFFFu) << (16 * (pairs & 3u)) | static_cast<uint64_t>(values >> 16)
                                                                                                 << (16 * (pairs >> 2 & 3u));
    return make_uint2(static_cast<uint32_t>(spread), static_cast<uint32_t>(spread >> 32));
  }
};

// ---- host

inline bool is_fp4(const Operand& operand) { return operand.grid.kind == GridKind::kFp4; }

// Whether an operand's bytes are int8 integers of its affine map: values, and codes of up to 7 bits.
inline bool is_bytes(const Operand& operand) {
  return operand.layout == Layout::kValues || (operand.layout == Layout::kCodes && operand.grid.bits < 8 && !is_fp4(operand));
}

inline ByteRows plain_rows(const void* data, int64_t rows, int64_t row_bytes) {
  ByteRows result{};
  result.data = static_cast<const uint8_t*>(data);
  result.rows = rows;
  result.row_bytes = row_bytes;
  result.vectorized = is_aligned(data, 16) && row_bytes % 16 == 0;
  return result;
}

// kValues, kCodes or kEvenOdd, as the u of kValues.
inline ByteRows byte_rows(const Operand& operand, int64_t rows, int64_t k) {
  ByteRows result = plain_rows(operand.data, rows, row_bytes(operand.layout, k));
  if (operand.layout != Layout::kValues) {
    result.converts = true;
    result.looks_up = is_fp4(operand);
    if (result.looks_up) {
      result.table = value_table(operand.grid);
    } else {
      const UniformGrid grid = uniform_grid(operand.grid);
      result.mul = grid.stored_mul;
      result.add = grid.stored_add * 0x01010101u;
    }
  }
  return result;
}

inline NibbleRows nibble_rows(const char* op, const char* name, const Operand& operand, int64_t rows, int64_t k, bool looks_up) {
  check_aligned(op, name, operand.data);
  return {static_cast<const uint8_t*>(operand.data), rows, packed_row_bytes(k), looks_up, value_table(operand.grid), false};
}

inline SparseRows sparse_rows(const char* op, const Operand& operand, int64_t rows, int64_t k, bool even_odd) {
  check_aligned(op, "w_index", operand.index);
  return {nibble_rows(op, "w", operand, rows, k / 2, true), operand.index, index_row_bytes(k), k / 8, even_odd};
}

}  // namespace quest::cuda
