// The instructions that CUDA C++ has no name for, one small function each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quest::cuda {

// ---- conversions: two floats to two 16-bit floats in one word, `low` in its low half
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float float16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Bit by bit a where the mask is set, else b. (Of & and | the compiler makes two instructions.)
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t word;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(word) : "r"(mask), "r"(a), "r"(b));
  return word;
}

// Two integers as unsigned numbers of 4 bits, those beyond 0 ... 15 as the nearest: the lowest bits of the word, `low` first, below
// `above`.
__device__ __forceinline__ uint32_t pack_nibbles(uint32_t low, uint32_t high, uint32_t above) {
  uint32_t word;
  asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(above));
  return word;
}

// The same to numbers of 2 bits.
__device__ __forceinline__ uint32_t pack_two_bits(uint32_t low, uint32_t high, uint32_t above) {
  uint32_t word;
  asm("cvt.pack.sat.u2.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(above));
  return word;
}

// ---- the special function unit, to a unit or two in the last place; subnormal numbers are 0
__device__ __forceinline__ float exp2_approximate(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// Of subnormal numbers too.
__device__ __forceinline__ float sqrt_approximate(float x) {
  float value;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// ---- global memory

// 16 bytes that nobody reads again: not kept in the first cache, and memory is asked for whole lines of 128 bytes where lanes read half of
// one (a product for few rows took up to 12 % longer without).
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 words;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(global)
               : "memory");
  return words;
}

// The line of memory that holds this address to the second cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory"); }

// A pointer that the compiler is to keep, not to reckon anew wherever it is used.
template <typename T>
__device__ __forceinline__ T* keep(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// The compiler is to have this value here, not to reckon it where it is used: before a wait, not behind it.
template <typename T>
__device__ __forceinline__ void settle(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// The same for a pointer to global memory, which the compiler still knows it to be.
template <typename T>
__device__ __forceinline__ void settle_global(T*& pointer) {
  settle(pointer);
  __builtin_assume(__isGlobal(pointer));
}

// Barrier `id` (1 ... 15) among `threads` threads of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- shared memory
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t buffer[];  // what the widest swizzle of the copy engine wants
  return buffer;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Copies 16 bytes from global to shared memory without registers; writes zeros when not `valid` (then `global` is not read).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// The same for 4 bytes, through the first cache.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed groups are in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets bytes 4 (l % 4) ... of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* shared) { ldmatrix_x4(words, shared_address(shared)); }

__device__ __forceinline__ uint32_t load_shared_16(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_32(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ __forceinline__ uint2 load_shared_64(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address) : "memory");
  return words;
}

__device__ __forceinline__ uint4 load_shared_128(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// An addition to a word of shared memory by lane 0; gives what was there. The number of the lane, 0, is added so that the compiler does not
// take the values of whatever lanes are here for equal: it would find out which they are, and share what comes back.
__device__ __forceinline__ uint32_t shared_add(uint32_t* shared, uint32_t value) {
  uint32_t before;
  asm volatile(
      "{\n.reg .b32 lane, sum;\n"
      "mov.u32 lane, %%laneid;\n"
      "add.u32 sum, %2, lane;\n"
      "atom.shared.add.u32 %0, [%1], sum;\n}"
      : "=r"(before)
      : "r"(shared_address(shared)), "r"(value)
      : "memory");
  return before;
}

// ---- neighbours in a stream (programmatic dependent launch, sm_90)

// A kernel that was launched as `dependent` (check.h) may start while the one before it still runs, and waits here until that has ended and
// its writes are seen. Before that it must not touch memory, but may bring it to the second cache.
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once a thread of every block has been here, or the block has ended, the next kernel starts to start, which takes it about half a
// microsecond. Its blocks go wherever there is room, and wait there: started too early, they crowd on the few multiprocessors that have
// some.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- d[16, 8] += a[16, K] b[8, K]^T for rows of 32 bytes, whatever their elements. All kinds have the same fragments: with g = lane
// / 4 and t = lane % 4, a holds bytes 4t ... of row g, of row g + 8, and the same at byte 16 on; b bytes 4t ... and 16 + 4t ... of row g;
// d columns 2t, 2t + 1 of row g, then of row g + 8.
struct MmaInt8 {  // 32 int8
  using Accumulator = int32_t;
  static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaNibbles {  // 64 unsigned nibbles; emulated from compute capability 9.0 on (plan.h: plan_native_int4)
  using Accumulator = int32_t;
  static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaBits {  // 256 bits: counts the positions where both are set. (xor would be emulated on Hopper.)
  using Accumulator = int32_t;
  static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaBFloat16 {  // 16 bfloat16
  using Accumulator = float;
  // The smallest positive number is 2^-kSmallest, the largest power of two 2^kLargest; a power of two, twice.
  static constexpr int kSmallest = 133, kLargest = 127;
  static __host__ __device__ constexpr uint32_t pair_of_power(int exponent) {
    return static_cast<uint32_t>(exponent + kLargest) * 0x00800080u;
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  static __device__ __forceinline__ float to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaFloat16 {  // 16 float16
  using Accumulator = float;
  static constexpr int kSmallest = 24, kLargest = 15;
  static __host__ __device__ constexpr uint32_t pair_of_power(int exponent) {
    return static_cast<uint32_t>(exponent + kLargest) * 0x04000400u;
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_float16(low, high); }
  static __device__ __forceinline__ float to_float(uint32_t bits) { return float16_to_float(static_cast<uint16_t>(bits)); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace quest::cuda
