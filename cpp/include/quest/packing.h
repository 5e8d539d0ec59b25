// Canonical storage of codes: little end first along K, every row padded with zero bytes to 16 bytes (what TMA needs); K is kept beside.
//
// 4:8 sparsity keeps 2 of every 4 adjacent pairs. A sparse row of K values (8 divides K) is stored as its K/2 kept codes in order, in any
// layout but kPlanes and kEvenOdd, and an index: for every 8 values the two kept pair numbers p0 < p1 as p0 | p1 << 2, two such nibbles a
// byte, low first. (Sparse kValues are the exception: all K values, the pruned ones 0.)
#pragma once

#include <cstdint>

#include "quest/parallel.h"
#include "quest/types.h"

namespace quest {

inline constexpr int64_t kRowAlignment = 16;
inline constexpr int64_t kEvenOddColumns = 64;  // that kEvenOdd orders at a time

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t packed_row_bytes(int64_t k) { return round_up((k + 1) / 2, kRowAlignment); }
constexpr int64_t plane_row_bytes(int64_t k) { return round_up((k + 7) / 8, kRowAlignment); }
constexpr int64_t index_row_bytes(int64_t k) { return round_up((k + 15) / 16, kRowAlignment); }

// Bytes of one row (kPlanes: of one row of one plane) of k stored integers.
int64_t row_bytes(Layout layout, int64_t k);

// What both backends check of pack and unpack, in the name of `op`; and the error for codes[position] that is none of the grid's.
void check_packing(const char* op, Grid grid, Layout layout, int64_t rows, int64_t k);
[[noreturn]] void throw_out_of_range(Grid grid, int32_t code, int64_t position, int64_t k);

// codes: uint8 [rows, k]; packed: kPacked or kPlanes (`bits` planes). Throws if a code does not fit the grid. Inverse of each other.
void pack(Grid grid, Layout layout, const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t k, const ParallelFor& parallel_for);
void unpack(Grid grid, Layout layout, const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t k, const ParallelFor& parallel_for);

}  // namespace quest
