// What the products on Hopper's wgmma share: their problem, the weight on its way to the tensor cores, and the loop over K.
//
// The weight is the left operand of the instruction and goes through registers, so that it can lie in memory in any width: 4-bit codes are
// widened there, to bytes, or codes of any width, for real a, to a's type. A step of the main loop takes 128 bytes of every row of a, 128
// int8, 1024 bits or 64 floats, and as many columns of the rows of w.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/matrix_map.h"
#include "common/steps.cuh"
#include "common/wgmma_epilogue.cuh"

namespace quest::cuda {

inline constexpr int kStepRowBytes = 128;  // of a: what the 128-byte swizzle covers

// The warpgroups of a block that multiply, 64 rows of w each. K_GROUPS of them have the same rows and share the stages.
template <int N_GROUPS_, int K_GROUPS_ = 1>
struct Warpgroups {
  static constexpr int N_GROUPS = N_GROUPS_, K_GROUPS = K_GROUPS_, MULTIPLIERS = N_GROUPS * K_GROUPS;
  static constexpr int BLOCK_N = N_GROUPS * kWarpgroupColumns;
};

struct WgmmaProblem {
  // What the copying thread needs, first: each line of a kernel's parameters comes when it is first looked at.
  Steps steps;
  int32_t tiles_m, clusters_n;  // of the tile's rows of y, of the cluster's columns
  uint32_t copied_bytes;        // to a stage of a block
  int32_t paired;               // FewTile: 1 if two thread blocks share a tile along K, else 0
  // And the others.
  uint32_t flip;                  // ByteFragments
  uint4 table;                    // TableFragments
  uint32_t value_mul, value_add;  // SparseFragments: v + 128, four bytes, of four codes; RealFragments: v, twice; RealBytes: v
  TileOutput output;
};

// From a tile of 64 rows a warpgroup in shared memory to the words of the instruction, for all instructions of a step: `fetch` loads what
// lies there, `widen` makes the words. `offset`: of this lane's bytes in the tile; the copy engine's swizzle turns the step to the next
// columns into an exclusive or.

// kRowBytes: of a row and a plane in a stage; kPlanes: that it has together; kSteps: that it serves, one after another.
struct DenseFragments {
  static constexpr int kIndexBytes = 0, kPlanes = 1, kSteps = 1;
};

// One byte an integer (flip: 0x80808080 makes c - 128 of 8-bit codes), or 8 bits of a plane.
struct ByteFragments : DenseFragments {
  static constexpr int kRowBytes = kStepRowBytes, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    Words words;
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row & 7)) * 16;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) ldmatrix_x4(fetched.words[i], address ^ i * 32);
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = fetched.words[i][j] ^ problem.flip;
    }
  }
};

// Two 4-bit codes a byte, and a in the order of kEvenOdd: its 32 even columns of 64 meet the low halves of 32 bytes, its odd ones the high
// halves.
struct CodeFragments : DenseFragments {
  static constexpr int kRowBytes = kStepRowBytes / 2, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    uint32_t codes[kInstructions / 2][4];
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    return row * kRowBytes + (row >> 1 & 3) * 16 + lane % 4 * 4;  // the same swizzle for row + 8
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions / 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fetched.codes[i][j] = load_shared_32((address ^ (2 * i + j / 2) * 16) + j % 2 * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem&) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = fetched.codes[i / 2][j] >> i % 2 * 4 & 0x0F0F0F0Fu;
    }
  }
};

// Two 4-bit codes a byte, by table, and a in the order of its columns.
struct TableFragments : DenseFragments {
  static constexpr int kRowBytes = kStepRowBytes / 2, kInstructions = 4;
  using Words = uint32_t[kInstructions][4];
  struct Fetched {
    Words codes;  // 4 each
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    return row * kRowBytes + (row >> 1 & 3) * 16 + lane % 4 * 2;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fetched.codes[i][j] = load_shared_16((address ^ i * 16) + j / 2 * 8 + j % 2 * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i][j] = look_up_nibbles(problem.table, fetched.codes[i][j]);
    }
  }
};

// Real a: 16 columns an instruction. A code's bits become the lowest of a number from kBase on, whose unit they are (16-bit floats are
// exact there): kBase + c. value_mul, value_add: v = value_mul (kBase + c) + value_add, twice.
template <typename Real>
struct RealFragments : DenseFragments {
  static constexpr int kInstructions = 4;
  static constexpr bool kBFloat16 = std::is_same_v<Real, MmaBFloat16>;
  static constexpr int kBase = kBFloat16 ? 16 : 64, kCodeBit = kBFloat16 ? 3 : 4;
  static constexpr uint32_t kBasePair = kBFloat16 ? 0x41804180u : 0x54005400u;
  using Words = uint32_t[kInstructions][4];
};

// Two 4-bit codes a byte.
template <typename Real>
struct RealNibbles : RealFragments<Real> {
  using Base = RealFragments<Real>;
  using typename Base::Words;
  static constexpr int kRowBytes = kStepRowBytes / 4;
  struct Fetched {
    uint4 codes[2][2];  // of row g and row g + 8: all of them
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int row = first_row + threadIdx.x % 32 / 4;
    return row * kRowBytes + (row >> 2 & 1) * 16;  // the same swizzle for row + 8
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) fetched.codes[row][i] = load_shared_128((address ^ i * 16) + row * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
    // Of every word, 8 codes, a lane has two neighbours: byte t.
    const uint32_t t = threadIdx.x % 4, selector = t | (4 + t) << 8;
    constexpr uint32_t kMask = 0x000F000Fu << Base::kCodeBit;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t codes = word_of(fetched.codes[row][i / 4], i % 4);
        const uint32_t low = codes << Base::kCodeBit, high = codes >> (4 - Base::kCodeBit);
        const uint32_t numbers = (__byte_perm(low, high, selector) & kMask) | Base::kBasePair;
        words[i / 2][i % 2 * 2 + row] = Real::fma(numbers, problem.value_mul, problem.value_add);
      }
    }
  }
};

// Codes of a byte: two where a table has four codes. The bits 0x4700cc00 are the float32 kBase + c, and value_mul and value_add are
// float32: v is exact in both 16-bit types.
template <typename Real>
struct RealBytes : TableFragments {
  static constexpr int kBase = 32768;
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
    const float mul = __uint_as_float(problem.value_mul), add = __uint_as_float(problem.value_add);
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        auto value = [&](uint32_t byte) {
          return fmaf(__uint_as_float(__byte_perm(fetched.codes[i][j], 0x47000000u, 0x7504u | byte << 4)), mul, add);
        };
        words[i][j] = Real::pack(value(0), value(1));
      }
    }
  }
};

// Planes of a weight of 1 to 3 bits: of every row 16 bytes of each plane, the copy engine's least, of which a step needs the first or the
// last 8. One bit is a sign.
template <typename Real, int BITS>
struct RealPlanes : RealFragments<Real> {
  using Base = RealFragments<Real>;
  using typename Base::Words;
  static constexpr int kRowBytes = 16, kPlanes = BITS, kSteps = 2;
  struct Fetched {
    uint2 planes[BITS][2];  // of row g and row g + 8
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) { return (first_row + threadIdx.x % 32 / 4) * kRowBytes; }
  // plane_bytes: of the tile.
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address, int plane_bytes) {
#pragma unroll
    for (int p = 0; p < BITS; ++p) {
#pragma unroll
      for (int row = 0; row < 2; ++row) fetched.planes[p][row] = load_shared_64(address + p * plane_bytes + row * 8 * kRowBytes);
    }
  }
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
    const int shift = threadIdx.x % 4 * 2;  // of every 8 columns a lane has two neighbours
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t shifted[BITS];
#pragma unroll
        for (int p = 0; p < BITS; ++p) shifted[p] = (half == 0 ? fetched.planes[p][row].x : fetched.planes[p][row].y) >> shift;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          // The first bit goes to the low half of a word and the second to the high half: `at`, of both.
          auto spread = [&](int p, int at) {
            return ((shifted[p] >> 8 * byte & 0xFFu) * ((1u << at) + (1u << (at + 15)))) & 0x00010001u << at;
          };
          uint32_t numbers;
          if constexpr (BITS == 1) {
            numbers = spread(0, 15) ^ (Base::kBFloat16 ? 0xBF80BF80u : 0xBC00BC00u);
          } else {
            numbers = Base::kBasePair;
#pragma unroll
            for (int p = 0; p < BITS; ++p) numbers |= spread(p, Base::kCodeBit + p);
            numbers = Real::fma(numbers, problem.value_mul, problem.value_add);
          }
          words[2 * half + byte / 2][byte % 2 * 2 + row] = numbers;
        }
      }
    }
  }
};

// The kept codes of a 4:8 sparse weight, and behind their tile the pair indices: 16 bytes of every row, the copy engine's least, of which a
// step needs the first or the last 8.
//
// With a in the order of kEvenOdd each half of 64 columns has one value of every pair, so that two kept pairs of four are two kept values
// of four, and the index of 64 columns is the instruction's metadata as it is, for both halves. A word of a row holds 8 codes, of the pairs
// of two groups: its even nibbles are in the first half, its odd ones in the second.
struct SparseFragments {
  static constexpr int kRowBytes = kStepRowBytes / 4, kIndexBytes = 16, kPlanes = 1, kSteps = 1, kInstructions = 2;
  using Words = uint32_t[kInstructions][5];
  struct Fetched {
    uint32_t codes[2 * kInstructions];  // of row g and row g + 8 for each instruction
    uint2 index;
  };
  static __device__ __forceinline__ uint32_t offset(int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
    return row * kRowBytes + (lane / 16 ^ (row >> 2 & 1)) * 16;
  }
  // tile_rows: of w, behind which the indices lie.
  static __device__ __forceinline__ uint32_t index_offset(int first_row, int tile_rows) {
    const int lane = threadIdx.x % 32;
    return tile_rows * kRowBytes + (first_row + lane / 4 + lane % 2 * 8) * kIndexBytes;
  }
  static __device__ __forceinline__ void fetch(Fetched& fetched, uint32_t address, uint32_t index_address) {
    ldmatrix_x4(fetched.codes, address);
    fetched.index = load_shared_64(index_address);
  }
  // The words' products have been waited for.
  static __device__ __forceinline__ void widen(Words& words, const Fetched& fetched, const WgmmaProblem& problem) {
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        words[i][row] = value(fetched.codes[2 * i + row] & 0x0F0F0F0Fu, problem);
        words[i][2 + row] = value(fetched.codes[2 * i + row] >> 4 & 0x0F0F0F0Fu, problem);
      }
    }
    replace_metadata(words[0][4], fetched.index.x, problem.value_mul);
    replace_metadata(words[1][4], fetched.index.y, problem.value_mul);
  }

 private:
  // 4 codes to mul c + add; v + 128 carries nothing from byte to byte.
  static __device__ __forceinline__ uint32_t value(uint32_t four, const WgmmaProblem& problem) {
    return (four * problem.value_mul + problem.value_add) ^ 0x80808080u;
  }
};

// The ring of stages at the start of a block's shared memory, of a's rows, then w's, and where this thread is in it. empty: a phase ends
// with an arrival of every multiplying warp that reads what this block copies.
template <typename Tile>
struct StageRing {
  uint8_t* shared;
  uint64_t *full, *empty;
  uint32_t copied_bytes;     // to a stage
  bool evens_first = false;  // of the rows of w, if Tile::ORDERS_ROWS (weight_map)
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint8_t* a_tile() const { return shared + stage * Tile::STAGE_BYTES; }
  // Those of every `step`-th stage.
  __device__ __forceinline__ void init_barriers(int first, int step) const {
#pragma unroll 1
    for (int i = first; i < Tile::STAGES; i += step) {
      barrier_init(&full[i], 1);  // the copier, and the bytes
      barrier_init(&empty[i], Tile::CLUSTER * Tile::N_GROUPS * kWarpgroup / 32);
    }
  }
  __device__ __forceinline__ void advance(int stages = 1) {
    stage += stages;
    if (stage >= Tile::STAGES) stage -= Tile::STAGES, parity ^= 1;
  }

  // The rows of w from first_n on, in the columns of a step, to the second cache.
  __device__ __forceinline__ void prefetch(const CUtensorMap& w_map, int k_tile, const StepCursor& step, int first_n) const {
    const int byte = w_byte(k_tile);
    if constexpr (Tile::ORDERS_ROWS) {
      tensor_prefetch_5d(&w_map, weight_at(byte, first_n, step.w_plane, evens_first).at);
    } else {
      tensor_prefetch(&w_map, byte, first_n, step.w_plane);
    }
  }

  // The rows from first_m and first_n on, in the columns of a step, to the next stage; of a the share of this block, for all of its
  // cluster.
  __device__ __forceinline__ void copy(const CUtensorMap& a_map, const CUtensorMap& w_map, const CUtensorMap& index_map, int k_tile,
                                       const StepCursor& step, int first_m, int first_n, int rank) {
    using Fragments = typename Tile::Fragments;
    constexpr int kShare = Tile::BLOCK_M / Tile::CLUSTER;
    barrier_wait(&empty[stage], parity ^ 1);
    barrier_expect(&full[stage], copied_bytes);
    uint8_t* const w_tile = a_tile() + Tile::A_BYTES;
    load_rows(w_tile, w_map, w_byte(k_tile), first_n, step.w_plane);
    if constexpr (Fragments::kIndexBytes > 0) {
      load_rows(w_tile + Tile::BLOCK_N * Fragments::kRowBytes, index_map, k_tile / 2 * Fragments::kIndexBytes, first_n, 0);
    }
    tensor_load<(Tile::CLUSTER > 1)>(a_tile() + rank * kShare * kStepRowBytes, &a_map, &full[stage], k_tile * kStepRowBytes,
                                     first_m + rank * kShare, step.a_plane, (1 << Tile::CLUSTER) - 1);
    advance();
  }

 private:
  static __device__ __forceinline__ int w_byte(int k_tile) { return k_tile / Tile::Fragments::kSteps * Tile::Fragments::kRowBytes; }
  // Of w or of its index.
  __device__ __forceinline__ void load_rows(uint8_t* target, const CUtensorMap& map, int byte, int first_n, int plane) const {
    if constexpr (Tile::ORDERS_ROWS) {
      tensor_load_5d(target, &map, &full[stage], weight_at(byte, first_n, plane, evens_first).at);
    } else {
      tensor_load<false>(target, &map, &full[stage], byte, first_n, plane, 0);
    }
  }
};

// What a warp of a multiplying warpgroup keeps between the steps of a tile, and between tiles.
template <typename Tile>
class TileMultiplier {
  using Fragments = typename Tile::Fragments;
  using Words = typename Fragments::Words;
  static constexpr bool kSparse = Fragments::kIndexBytes > 0;

 public:
  __device__ __forceinline__ TileMultiplier(const StageRing<Tile>& ring, int group) : lane_(threadIdx.x % 32) {
    const int first_row = group * kWarpgroupColumns + warp_index() * 16;
    const uint32_t w_tile = shared_address(ring.shared) + Tile::A_BYTES;
    fragment_address_ = w_tile + Fragments::offset(first_row);
    if constexpr (kSparse) {
      index_address_ = w_tile + Fragments::index_offset(first_row, Tile::BLOCK_N);
      even_[0][4] = even_[1][4] = odd_[0][4] = odd_[1][4] = 0;
    }
  }

  // The sums of a tile, from every K_GROUPS-th of the ring's next stages, which go back. first_k_tile: of the steps.
  __device__ __forceinline__ void multiply(typename Tile::Mma::Accumulator (&accumulators)[Tile::BLOCK_M / 2], StageRing<Tile>& ring,
                                           const WgmmaProblem& problem, const Steps& steps, int first_k_tile) {
    const int count = steps.count();
    StepCursor cursor(steps);
    // The products of the stage whose words are in `now`; meanwhile the words of the next stage are loaded.
    auto multiply_stage = [&](int i, const Words& now, Words& next) {
      const uint64_t b_tile = swizzled_tile(ring.a_tile());
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < Fragments::kInstructions; ++j) {
        Tile::Mma::mma(accumulators, now[j], b_tile + j * (Tile::Mma::kBytes / 16), (i | j) != 0);
      }
      wgmma_commit();
      const int previous = ring.stage - Tile::K_GROUPS + (ring.stage < Tile::K_GROUPS ? Tile::STAGES : 0);
      wgmma_wait<1>();  // the products before these, which used `next`
      if (i > 0) give_back(ring, previous);
      if (i + 1 < count) {
        ring.advance(Tile::K_GROUPS);
        load(next, ring, problem, first_k_tile + i + 1);
        if constexpr (Tile::Mma::kPlanes) {
          if (cursor.advance()) {
            wgmma_wait<0>();
            wgmma_owned(accumulators);
#pragma unroll
            for (int32_t& accumulator : accumulators) accumulator *= 2;
          }
        }
      }
    };
    load(even_, ring, problem, first_k_tile);
    for (int i = 0; i < count; i += 2) {
      multiply_stage(i, even_, odd_);
      if (i + 1 < count) multiply_stage(i + 1, odd_, even_);
    }
    wgmma_wait<0>();
    wgmma_owned(accumulators);
    give_back(ring, ring.stage);
    ring.advance(Tile::K_GROUPS);
  }

 private:
  __device__ __forceinline__ void load(Words& words, const StageRing<Tile>& ring, const WgmmaProblem& problem, int k_tile) const {
    barrier_wait(&ring.full[ring.stage], ring.parity);
    const uint32_t offset = ring.stage * Tile::STAGE_BYTES;
    typename Fragments::Fetched fetched;
    if constexpr (kSparse) {
      Fragments::fetch(fetched, fragment_address_ + offset, index_address_ + offset + k_tile % 2 * (Fragments::kIndexBytes / 2));
    } else if constexpr (Fragments::kSteps > 1) {
      constexpr int kStepBytes = Fragments::kRowBytes / Fragments::kSteps;
      Fragments::fetch(fetched, fragment_address_ + offset + k_tile % Fragments::kSteps * kStepBytes, Tile::BLOCK_N * Fragments::kRowBytes);
    } else {
      Fragments::fetch(fetched, fragment_address_ + offset);
    }
    Fragments::widen(words, fetched, problem);
  }
  // To every block that copies to it.
  __device__ __forceinline__ void give_back(const StageRing<Tile>& ring, int stage) const {
    if (lane_ < Tile::CLUSTER) Tile::CLUSTER > 1 ? barrier_arrive(&ring.empty[stage], lane_) : barrier_arrive(&ring.empty[stage]);
  }

  int lane_;
  uint32_t fragment_address_, index_address_ = 0;
  Words even_, odd_;
};

}  // namespace quest::cuda
