// gemm_sparse: the product with a 4:8 sparse packed weight. Its kept codes are expanded to dense int8 rows, 0 where pruned, on their way to
// shared memory: half the bytes of the dense weight are read, the tensor cores work as for a dense one. (On wgmma they skip what is pruned:
// gemm_sparse_wgmma.cu.)
//
// The sparse 4-bit tensor cores of compute capability 8.x keep 2 of 4 pairs as this format does, but take the kept integers as nibbles. The
// values of int4 (odd, up to 15) are none, and codes would need, for every element of y, the sum of those codes of a whose weights are
// kept.
#include "common/gemm_tile.cuh"
#include "common/wgmma_products.h"
#include "quest/cuda/gemm.h"

namespace quest::cuda {
namespace {

// A thread takes the 64 columns of one tile row: 32 kept codes and 8 pair indices.
template <int ROWS>
class SparseLoader {
 public:
  using Source = SparseRows;
  __device__ __forceinline__ SparseLoader(const SparseRows& source, int64_t first_row) : source_(source), first_row_(first_row) {}

  __device__ __forceinline__ void fetch(int, int k_tile, uint8_t*) {
    if (threadIdx.x >= ROWS) return;
    const int64_t row = first_row_ + threadIdx.x;
    codes_ = source_.kept.load(row, static_cast<int64_t>(k_tile) * (kTileRowBytes / 4));
    groups_ = source_.groups - static_cast<int64_t>(k_tile) * (kTileRowBytes / 8);
    index_ = source_.load_index(row, static_cast<int64_t>(k_tile) * (kTileRowBytes / 16));
  }
  __device__ __forceinline__ void commit(uint8_t* target) {
    if (threadIdx.x >= ROWS) return;
    const uint32_t codes[4] = {codes_.x, codes_.y, codes_.z, codes_.w};
    uint2 columns[8];  // in groups of 8
#pragma unroll
    for (int group = 0; group < 8; ++group) {
      columns[group] = make_uint2(0, 0);  // also beyond the row's end: a may hold padding there
      if (group < groups_) columns[group] = source_.expand(codes[group / 2] >> (16 * (group % 2)) & 0xFFFFu, index_ >> (4 * group) & 15u);
    }
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      uint4 words;
      if (source_.even_odd) {
        const uint2* four = columns + piece % 2 * 4;
        auto half = [&](uint2 group) { return __byte_perm(group.x, group.y, piece < 2 ? 0x6420 : 0x7531); };
        words = make_uint4(half(four[0]), half(four[1]), half(four[2]), half(four[3]));
      } else {
        const uint2* two = columns + 2 * piece;
        words = make_uint4(two[0].x, two[0].y, two[1].x, two[1].y);
      }
      *reinterpret_cast<uint4*>(target + tile_offset(threadIdx.x, piece)) = words;
    }
  }

 private:
  static_assert(ROWS <= kTileThreads, "a thread a row");
  const SparseRows& source_;
  int64_t first_row_, groups_;
  uint4 codes_;
  uint32_t index_;
};

}  // namespace

void gemm_sparse(const Operand& a, const Operand& w, const float* bias, void* y, DType dtype, int64_t m, int64_t n, int64_t k,
                 cudaStream_t stream) {
  const char* op = "gemm_sparse";
  if (a.layout != Layout::kEvenOdd) check_layout(op, "a", a, Layout::kPacked, Layout::kValues);
  check_layout(op, "w", w, Layout::kPacked, Layout::kPacked);
  check(w.index != nullptr, op, ": expected w with a 4:8 index, got none; use gemm_int4");
  check(k % 8 == 0, op, ": expected 8 to divide k, got ", k);
  check_gemm_depth(op, a.grid, w.grid, k);
  if (m == 0 || n == 0) return;
  const Device device = current_device(op);
  const Output output = make_output(y, dtype, bias, m, n);
  if (gemm_sparse_wgmma(op, a, w, output, k, device, stream)) return;
  const GemmTile tile = plan_mma_sync(GemmFamily::kSparse, m, n, device.sm_count);
  const SparseRows w_rows = sparse_rows(op, w, n, k, a.layout == Layout::kEvenOdd);
  const bool looks_up = is_fp4(a) || is_fp4(w);
  if (a.layout == Layout::kPacked) {
    const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, looks_up), operand_affine(w, true), output, k);
    launch_tile<MmaInt8, NibbleLoader, SparseLoader>(op, tile, nibble_rows(op, "a", a, m, k, looks_up), w_rows, steps_of(k), epilogue,
                                                     stream);
  } else {
    const IntegerEpilogue epilogue = integer_epilogue(a, w, operand_affine(a, is_fp4(a)), operand_affine(w, true), output, k);
    launch_tile<MmaInt8, ByteLoader, SparseLoader>(op, tile, byte_rows(a, m, k), w_rows, steps_of(k), epilogue, stream);
  }
}

}  // namespace quest::cuda
