// Which product a pair of grids gets, and with which tile: one table, a reason beside each row, testable without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "quest/types.h"

namespace quest {

enum class GemmFamily : int32_t { kInt8, kInt4, kPlanes, kSparse, kWeightOnly, kDequantized };

std::string to_string(GemmFamily family);

// The family and operand layouts of a product. Family and weight follow from the grids alone: what a packed model stores must not depend on
// the machine it is made on.
struct GemmOperands {
  GemmFamily family;
  Layout a;  // layout that quantize writes the activation in
  Layout w;  // layout of the stored weight
  const char* reason;
};
struct GemmShape {
  int64_t m, n, k;
  int32_t compute_capability = 90, sm_count = 132;  // of the GPU; 0: none
};
// activation: nullptr for weight-only. sparsity: of the weight. shape: of the product; where it is given, the activation's layout is the
// one for so many rows on that GPU.
GemmOperands plan_operands(Grid weight, const Grid* activation, Sparsity sparsity, const GemmShape* shape = nullptr);

// The CUDA kernel variant and tile for one problem.
struct GemmTile {
  const char* kernel;                 // name of the variant
  bool wgmma;                         // on Hopper's asynchronous tensor cores, fed by its copy engine; else mma.sync
  int32_t block_m, block_n, block_k;  // block_k in stored elements
  int32_t cluster;                    // thread blocks of a cluster: they share the rows of a and take neighbouring columns of y, or share K
  int32_t split_k;                    // warpgroups, of all blocks of the cluster, that share one output tile along K
  const char* reason;
};
// compute_capability: 90 for 9.0. For an activation in plan_operands' layout; kInt4: of int grids. Operands that the copy engine cannot
// read (rows that start at no multiple of 16 bytes, layouts that have to be widened for both sides) get plan_mma_sync's tile instead, those
// that the kernels for few rows do not take plan_wgmma's.
GemmTile plan_tile(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count);
GemmTile plan_wgmma(GemmFamily family, int64_t m, int64_t n, int64_t k, int32_t sm_count);
GemmTile plan_mma_sync(GemmFamily family, int64_t m, int64_t n, int32_t sm_count);
// split_k of plan_wgmma's tiles of few rows, by their 64, 128 or 192 columns; twice the first where two thread blocks share K.
constexpr int32_t kWgmmaFewSplit[3] = {2, 2, 1};
// The product of one plane each, which has two kernels of its own: that for few rows, and one whose rows of w stay in shared memory
// (results in rows that start at multiples of 16 bytes; others get plan_wgmma's tile).
GemmTile plan_bits(int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count);
bool is_stationary(const GemmTile& tile);

// The second of them keeps block_n rows of w whole, in chunks of 128 bytes, beside a ring of stages of 64 rows of a.
constexpr int32_t kStationaryM = 64, kStationarySpan = 32, kStationaryRowBytes = 128;
constexpr int32_t kStationaryMostChunks = 16, kStationaryMostStages = 16;
// Of shared memory: two warpgroups' factors of the columns, 10 bytes each, and two barriers a chunk and a stage.
constexpr int64_t stationary_other_bytes(int32_t block_n) {
  return int64_t{2} * 10 * block_n + 2 * (kStationaryMostChunks + kStationaryMostStages) * 8;
}
int64_t stationary_chunks(int64_t k);
int64_t stationary_stages(int32_t block_n, int64_t k);  // what the shared memory of Hopper has room for, 0 without room for w

// Rows of integers that the kernel for few rows takes, and whether it takes a product. kInt4: of packed rows of a; of bytes, and for 1-bit
// products, those of kInt8.
int32_t plan_skinny_rows(GemmFamily family, int64_t k, int32_t compute_capability);
bool plan_skinny(GemmFamily family, int64_t m, int64_t k, int32_t compute_capability);

// Its thread blocks have teams of so many warps (of kSkinnyWarps), which share K and make kSkinnyN columns at a time.
constexpr int32_t kSkinnyWarps = 16, kSkinnyN = 16;
int32_t plan_skinny_team(int64_t n, int32_t sm_count);

// Hopper's kernel for few rows of codes in the order of kEvenOdd, which stay in shared memory, and a packed weight, which streams past
// them: whether it is faster than plan_skinny's. (It takes more products, faster than plan_wgmma's tiles do.)
bool plan_stream(int64_t m, int64_t n, int64_t k, int32_t sm_count);

// How it divides a product: among pairs of thread blocks, which share K and have one of so many ranges of w, of tiles of kStreamTileN rows.
// Two and two of a block's warpgroups share K again.
struct StreamPlan {
  int32_t rows;                  // of a that the kernel has room for, 16 or 32; 0: it does not take the product
  int32_t slots;                 // of each warpgroup's ring of w
  int64_t ranges, shared_bytes;  // shared_bytes: of a thread block
};
StreamPlan plan_stream_split(int64_t m, int64_t n, int64_t k, int32_t sm_count);

constexpr int32_t kStreamTileN = 64, kStreamColumns = 256;  // of K: a unit
constexpr int32_t kStreamGroups = 4, kStreamKGroups = 2, kStreamBlocks = 2;
constexpr int32_t kStreamSenders = kStreamKGroups * kStreamBlocks;  // of sums of a tile
constexpr int32_t kStreamMostSlots = 8, kStreamMostTiles = 16;
// What it keeps in shared memory, in bytes (the kernel asserts that it agrees).
constexpr int32_t kStreamSlotBytes = kStreamTileN * kStreamColumns / 2;              // a box of w
constexpr int32_t kStreamPartBytes = 512;                                            // sums of a warp and 8 rows
constexpr int32_t kStreamColumnBytes = kStreamTileN * 12;                            // scales, biases, code sums of a tile
constexpr int32_t stream_unit_bytes(int32_t rows) { return rows * kStreamColumns; }  // of a
constexpr int32_t stream_other_bytes(int32_t rows) { return 8 * rows + 8 * (2 * kStreamGroups * kStreamMostSlots + kStreamMostTiles); }

// The kernel that holds few rows of real activations in registers: how many at once, and by how many warps of a thread block. (plan_tile
// names it for up to plan_weight_only_rows rows; plan_weight_only knows what the weight is.)
struct HeldPlan {
  int32_t rows, warps;
};
constexpr int32_t kHeldUnitN = 32, kHeldColumns = 512;  // rows of w that it sums together; columns of K of a warp
HeldPlan plan_held(int32_t compute_capability);

// Rows of real activations of 16-bit types up to which that kernel, some at a time, is faster than a product with the dequantized weight.
int64_t plan_weight_only_rows(int32_t compute_capability);

// Whether Hopper's kernel that makes fixed-point numbers of few rows of real activations, some at a time, can take a product, and is faster
// than the kernel above, or than a product with the dequantized weight. (plan_widened comes first.)
bool plan_fixed(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k);

// How it divides a product: among clusters of thread blocks, which have so many rows of a and one of so many ranges of w; and along K among
// the blocks of a cluster and some of their warpgroups.
struct FixedPlan {
  int32_t rows;  // of a: 1, 2 or 4 (by weights of one bit), 8 or 16
  int32_t cluster, k_groups;
  int32_t slots;                 // of each warpgroup's ring of w
  int64_t ranges, shared_bytes;  // of tiles of kFixedTileN rows of w; of a thread block
};
FixedPlan plan_fixed_split(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k, int32_t sm_count);

constexpr int32_t kFixedTileN = 64, kFixedGroups = 4;  // warpgroups of a thread block
constexpr int32_t kFixedMostSlots = 8, kFixedMostTiles = 32;
// What it keeps in shared memory, in bytes (the kernel asserts that it agrees). K comes in units, the weight in boxes of kFixedTileN rows.
// one_bit: weights that are multiplied where they lie; planes: of others, or 1.
struct FixedRoom {
  int32_t unit_columns;
  int32_t unit, slot;                // numbers of a, with 8 bytes of factors a row; a box of w
  int32_t parts, part, tile_scales;  // a tile's sums are so many parts, of a warp and 8 rows each; its scales and biases
  int32_t other;                     // at most: 1024 for barriers, 512 for the largest magnitudes, 8 to align, in all a multiple of 16
};
constexpr FixedRoom fixed_room(bool one_bit, int32_t planes, int32_t rows) {
  const int32_t unit_columns = one_bit ? 1024 : 512, box_row = one_bit ? 128 : 64;
  return {unit_columns, rows * (2 * unit_columns + 8), kFixedTileN * box_row * planes, 4 * ((rows + 7) / 8), 512, 2 * kFixedTileN * 4,
          1552};
}

// Whether Hopper's kernel of large tiles takes a product of real activations of 16-bit types, whose weight it widens on its way to the
// tensor cores: of more rows than the kernels above take, or where it is faster than they are. And its tile.
bool plan_widened(Grid weight, Layout layout, int64_t m, int64_t n, int64_t k, int32_t sm_count);
GemmTile plan_widened_tile(int64_t m, int64_t n, int64_t k, int32_t sm_count);

// The product of real activations by a weight in its layout of plan_operands, as plan_tile for the families above.
GemmTile plan_weight_only(Grid weight, int64_t m, int64_t n, int64_t k, int32_t compute_capability, int32_t sm_count);

// Shared memory that a kernel on Hopper asks for and does not use, beside at most kSpreadStaticBytes of its own: so much that a
// multiprocessor has room for its share of few thread blocks, or for a warp for each of its schedulers, and for no block more. Blocks that
// start while the kernel before still runs go wherever there is room: all to the few multiprocessors that it has left, otherwise. 0: there
// are so many blocks that they fill every multiprocessor. shared_bytes: what a thread block can have.
int64_t plan_spread_bytes(int64_t thread_blocks, int64_t block_warps, int32_t sm_count, int64_t shared_bytes);
constexpr int64_t kSpreadStaticBytes = 320, kSpreadMostShare = 16;
constexpr int64_t kReservedSharedBytes = 1024;  // of each thread block, by CUDA: a multiprocessor has so much more than a block can have

// Whether gemm_int4, for more rows, multiplies codes as they are, two a byte, on tensor cores for 4-bit integers. Later GPUs than 8.9 only
// emulate those, several times slower than they multiply int8.
bool plan_native_int4(Layout a_layout, Grid a, Grid w, int32_t compute_capability);

}  // namespace quest
