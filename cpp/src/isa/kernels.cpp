// The table of this instruction set.
#include "isa/simd.h"

namespace quest::QUEST_ISA {

// A pair of planes costs an AND, a popcount and an addition per vector; bytes take eight times as many vectors, but for all planes at once.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int32_t kMaxBitProducts = 1;  // no popcount instruction: eight operations a vector
#else
constexpr int32_t kMaxBitProducts = 2;
#endif

extern const Kernels kTable;
const Kernels kTable = {kPanelBytes,     kTileM,     kTileN,    kMaxBitProducts, rotate_rows, quantize_rows,
                        dequantize_rows, find_above, pack_rows, unpack_rows,     fill_a,      gemm};

}  // namespace quest::QUEST_ISA
