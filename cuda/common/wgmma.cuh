// wgmma: d[64, N] += a[64, 32 bytes] b[N, 32 bytes]^T by one warpgroup (128 threads), asynchronously. a is in registers or in shared
// memory, b in shared memory.
//
// With warp w of the group, g = lane / 4 and t = lane % 4:
//   a   words 0 ... 3: bytes 4t ... of row 16w + g, of row + 8, then the same at byte 16 + 4t
//   b   N rows of 128 bytes in shared memory, 16-byte pieces permuted by the copy engine's 128-byte swizzle; `b_tile` describes it and the
//       32 bytes at 32 i of every row are b_tile + 2 i; so does `a_tile` with 64 rows
//       sparse: two of every four bytes are kept, 64 K bytes in 32; word 4 holds their places, two bits each, the lower ones first, of 32
//       of the 64 bytes: of the first half in lanes of t = 0 (row 16w + g) and t = 1 (row + 8), of the second in t = 2 and 3
//   d   words 4j ... 4j + 3: columns 8j + 2t and 8j + 2t + 1 of row 16w + g, then of row + 8
// Elements: int8 or uint8 (32 products; sparse: 64, a is int8, b uint8), bits with and.popc (256; xor is refused on Hopper), or 16-bit
// floats (16, of which d is float32).
//
// Between wgmma_fence() and the wait the registers belong to the tensor cores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"

namespace quest::cuda {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// After a wait for all: the compiler must not have moved a use of d above it.
template <typename T, int COUNT>
__device__ __forceinline__ void wgmma_owned(T (&d)[COUNT]) {
#pragma unroll
  for (T& word : d) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(word)::"memory");
    } else {
      asm volatile("" : "+r"(word)::"memory");
    }
  }
}

// New metadata for a sparse product, where the products that used the old have been waited for. The tensor cores read metadata while they
// multiply, as they do a, but the compiler (13.0) takes its registers for free once the instruction has started. The old value is therefore
// one that this may keep: nothing else is put in its place until here. always: not 0, but not known to the compiler.
__device__ __forceinline__ void replace_metadata(uint32_t& metadata, uint32_t by, uint32_t always) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p mov.b32 %0, %1;\n}" : "+r"(metadata) : "r"(by), "r"(always) : "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of a tile of 128-byte rows with the 128-byte swizzle, which starts at a multiple of 1024 bytes: address, 1024 bytes from one
// group of 8 rows to the next, swizzle mode 1 (PTX ISA, "Matrix Descriptor Format").
__device__ __forceinline__ uint64_t swizzled_tile(const void* shared) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return (shared_address(shared) & 0x3FFFF) >> 4 | (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// The operand lists of the instruction for N/2 accumulators. C: "+r" or "+f".
#define QUEST_D8(C, d, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define QUEST_D16(C, d, i) QUEST_D8(C, d, i), QUEST_D8(C, d, i + 8)
#define QUEST_D32(C, d, i) QUEST_D16(C, d, i), QUEST_D16(C, d, i + 16)
#define QUEST_D64(C, d, i) QUEST_D32(C, d, i), QUEST_D32(C, d, i + 32)
#define QUEST_D128(C, d, i) QUEST_D64(C, d, i), QUEST_D64(C, d, i + 64)
#define QUEST_P8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QUEST_P16 QUEST_P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QUEST_P32 QUEST_P16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QUEST_P64                                                                                                                        \
  QUEST_P32                                                                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
  "%58, %59, %60, %61, %62, %63"
#define QUEST_P128                                                                                                                       \
  QUEST_P64                                                                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "     \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// NAME: the instruction, SIGNS: what it has behind its operands; COUNT = N/2 accumulators of TYPE; A0 ... A3, B, S: the numbers that follow
// theirs. accumulate 0: d = a b^T.
#define QUEST_WGMMA_OF(TYPE, C, SIGNS, NAME, COUNT, A0, A1, A2, A3, B, S)                                                                \
  static __device__ __forceinline__ void mma(TYPE(&d)[COUNT], const uint32_t(&a)[4], uint64_t b_tile, int32_t accumulate) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S ", 0;\n" NAME " {" QUEST_P##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B \
                                                                                          ", p" SIGNS ";\n}"                             \
                 : QUEST_D##COUNT(C, d, 0)                                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(accumulate));                                            \
  }
#define QUEST_WGMMA(NAME, COUNT, A0, A1, A2, A3, B, S) QUEST_WGMMA_OF(int32_t, "+r", "", NAME, COUNT, A0, A1, A2, A3, B, S)
// M: the number of the metadata.
#define QUEST_WGMMA_SPARSE(NAME, COUNT, A0, A1, A2, A3, B, M, S)                                                                         \
  static __device__ __forceinline__ void mma(int32_t(&d)[COUNT], const uint32_t(&a)[5], uint64_t b_tile, int32_t accumulate) {           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S ", 0;\n" NAME " {" QUEST_P##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B \
                                                                                          ", %" M ", 0, p;\n}"                           \
                 : QUEST_D##COUNT("+r", d, 0)                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(a[4]), "r"(accumulate));                                 \
  }
#define QUEST_WGMMA_SHARED(NAME, COUNT, A, B, S)                                                                         \
  static __device__ __forceinline__ void mma(int32_t(&d)[COUNT], uint64_t a_tile, uint64_t b_tile, int32_t accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" S ", 0;\n" NAME " {" QUEST_P##COUNT "}, %" A ", %" B ", p;\n}"     \
                 : QUEST_D##COUNT("+r", d, 0)                                                                            \
                 : "l"(a_tile), "l"(b_tile), "r"(accumulate));                                                           \
  }
#define QUEST_WGMMA_FAMILY(SHAPE, TYPES, KIND)                                                                   \
  QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n256" SHAPE TYPES, 128, "128", "129", "130", "131", "132", "133") \
  QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n128" SHAPE TYPES, 64, "64", "65", "66", "67", "68", "69")        \
  QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n64" SHAPE TYPES, 32, "32", "33", "34", "35", "36", "37")         \
  QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n32" SHAPE TYPES, 16, "16", "17", "18", "19", "20", "21")         \
  QUEST_WGMMA("wgmma.mma_async.sync.aligned.m64n16" SHAPE TYPES, 8, "8", "9", "10", "11", "12", "13")

#define QUEST_WGMMA_REAL(NAME, COUNT, A0, A1, A2, A3, B, S) QUEST_WGMMA_OF(float, "+f", ", 1, 1, 0", NAME, COUNT, A0, A1, A2, A3, B, S)
#define QUEST_WGMMA_REALS(TYPES)                                                                                       \
  QUEST_WGMMA_REAL("wgmma.mma_async.sync.aligned.m64n256k16.f32" TYPES, 128, "128", "129", "130", "131", "132", "133") \
  QUEST_WGMMA_REAL("wgmma.mma_async.sync.aligned.m64n128k16.f32" TYPES, 64, "64", "65", "66", "67", "68", "69")

// kWords: registers of a. kBytes: of each row of b.
struct WgmmaInt8 {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  QUEST_WGMMA_FAMILY("k32", ".s32.s8.s8", )
};

// Bytes that are never negative, up to 255.
struct WgmmaUnsigned {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  QUEST_WGMMA_FAMILY("k32", ".s32.u8.u8", )
};

struct WgmmaSparseInt8 {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 5, kBytes = 64;
  QUEST_WGMMA_SPARSE("wgmma.mma_async.sp.sync.aligned.m64n256k64.s32.s8.u8", 128, "128", "129", "130", "131", "132", "133", "134")
  QUEST_WGMMA_SPARSE("wgmma.mma_async.sp.sync.aligned.m64n128k64.s32.s8.u8", 64, "64", "65", "66", "67", "68", "69", "70")
  QUEST_WGMMA_SPARSE("wgmma.mma_async.sp.sync.aligned.m64n64k64.s32.s8.u8", 32, "32", "33", "34", "35", "36", "37", "38")
  QUEST_WGMMA_SPARSE("wgmma.mma_async.sp.sync.aligned.m64n16k64.s32.s8.u8", 8, "8", "9", "10", "11", "12", "13", "14")
};

struct WgmmaBits {
  using Accumulator = int32_t;
  static constexpr bool kPlanes = true;
  static constexpr int kWords = 4, kBytes = 32;
  QUEST_WGMMA_FAMILY("k256", ".s32.b1.b1.and.popc", )
  QUEST_WGMMA_SHARED("wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc", 128, "128", "129", "130")
  QUEST_WGMMA_SHARED("wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc", 64, "64", "65", "66")
  QUEST_WGMMA_SHARED("wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc", 32, "32", "33", "34")
  QUEST_WGMMA_SHARED("wgmma.mma_async.sync.aligned.m64n32k256.s32.b1.b1.and.popc", 16, "16", "17", "18")
  QUEST_WGMMA_SHARED("wgmma.mma_async.sync.aligned.m64n16k256.s32.b1.b1.and.popc", 8, "8", "9", "10")
};

struct WgmmaBFloat16 {
  using Accumulator = float;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  QUEST_WGMMA_REALS(".bf16.bf16")
};
struct WgmmaFloat16 {
  using Accumulator = float;
  static constexpr bool kPlanes = false;
  static constexpr int kWords = 4, kBytes = 32;
  QUEST_WGMMA_REALS(".f16.f16")
};

#undef QUEST_WGMMA_FAMILY
#undef QUEST_WGMMA_REALS
#undef QUEST_WGMMA_REAL
#undef QUEST_WGMMA_SHARED
#undef QUEST_WGMMA_SPARSE
#undef QUEST_WGMMA
#undef QUEST_WGMMA_OF
#undef QUEST_P128
#undef QUEST_P64
#undef QUEST_P32
#undef QUEST_P16
#undef QUEST_P8
#undef QUEST_D128
#undef QUEST_D64
#undef QUEST_D32
#undef QUEST_D16
#undef QUEST_D8

}  // namespace quest::cuda
