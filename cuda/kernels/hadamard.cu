// hadamard: y = x blockdiag(H/sqrt(B)), B = 2 ... 32768, one read and one write.
//
// B divides k, so the rows are one flat array of blocks. Strides ascend, as on the CPU: every sum rounds alike. Two kernels.
//
// hadamard_blocks_kernel (B >= 128, aligned rows): B/V threads hold a block, V = 32 or 64 values each. Thread t of T loads the chunks t,
// t + T, t + 2T ... of 8 values, so strides 1, 2, 4 and the largest lie in its registers. Up to B = 512 the strides between are exchanged
// between lanes. Beyond, one exchange through shared memory gives a thread the V values at stride 8: two accesses a value for five or six
// strides, where lanes would need one for each. A second exchange goes back to the chunks, or, where strides between are left, to fewer
// neighbouring values and all strides from 512 on; they are stored from there.
//
// hadamard_kernel (any B, any address): a thread block of 256 threads takes tiles of 2048 values, 8 a thread (chunk.cuh): strides 1 to 4
// are butterflies in a thread's registers, 8 to 128 exchanges between lanes, 256 to 1024 one exchange between the 8 warps through shared
// memory, after which each thread holds the 8 values that differ in the warp alone. For B > 2048 a thread keeps the chunks of all B/2048
// tiles and the remaining strides are again butterflies in registers.
#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/hadamard.cuh"
#include "quest/cuda/rotation.h"

namespace quest::cuda {
namespace {

// ---- blocks of 128 and more values at aligned addresses

template <DType DTYPE, int LOG_BLOCK>
struct BlockShape {
  // 64 values a thread where six strides of one exchange save a second one.
  static constexpr int kLogValues = LOG_BLOCK >= 11 ? 6 : 5;
  static constexpr int kValues = 1 << kLogValues;
  static constexpr int kBlock = 1 << LOG_BLOCK;
  static constexpr int kTeam = kBlock / kValues;              // threads of one block of values
  static constexpr int kThreads = kTeam >= 64 ? kTeam : 128;  // a team of several warps has a thread block for itself
  static constexpr int kTeams = kThreads / kTeam;             // otherwise it needs no barrier
  static constexpr bool kExchanges = LOG_BLOCK >= 10;
  // The thread block stays and loads its next block of values while it transforms one: a multiprocessor has room for one thread block of
  // this size alone, which would leave memory idle meanwhile. (Twice as many float32 values would not fit into the registers.)
  static constexpr bool kPrefetches = LOG_BLOCK == 15 && DTYPE != DType::kFloat32;

  // In shared memory a group is the 8 V values that V values at stride 8 of 8 threads are; it is padded, so that a warp, whose lanes hold 8
  // neighbouring values of several groups, meets every bank once.
  static constexpr int kLogGroup = 3 + kLogValues;
  static constexpr int kGroupFloats = (1 << kLogGroup) + 8;
  static constexpr int kGroups = LOG_BLOCK > kLogGroup ? 1 << (LOG_BLOCK - kLogGroup) : 1;
  static constexpr int kTeamFloats = kExchanges ? kGroupFloats * kGroups : 0;
  static constexpr size_t kSharedBytes = size_t{kTeams} * kTeamFloats * sizeof(float);
};

template <int THREADS>
__device__ __forceinline__ void sync_team() {
  if constexpr (THREADS <= 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Strides FIRST, 2 FIRST ... LAST.
template <int COUNT, int FIRST, int LAST>
__device__ __forceinline__ void butterflies(float (&x)[COUNT]) {
  butterfly<COUNT, FIRST>(x);
  if constexpr (FIRST < LAST) butterflies<COUNT, 2 * FIRST, LAST>(x);
}

template <int COUNT>
__device__ __forceinline__ void load_floats(float* values, const float* source) {
  if constexpr (COUNT == 4) {
    const float4 four = *reinterpret_cast<const float4*>(source);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else if constexpr (COUNT == 2) {
    const float2 two = *reinterpret_cast<const float2*>(source);
    values[0] = two.x, values[1] = two.y;
  } else {
    values[0] = *source;
  }
}

// COUNT values, fewer than a chunk, rounded, to a multiple of their bytes.
template <DType DTYPE, int COUNT>
__device__ __forceinline__ void store_values(uint8_t* target, const float* values) {
  if constexpr (DTYPE == DType::kFloat32) {
    if constexpr (COUNT == 4) {
      *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
    } else if constexpr (COUNT == 2) {
      *reinterpret_cast<float2*>(target) = make_float2(values[0], values[1]);
    } else {
      *reinterpret_cast<float*>(target) = values[0];
    }
  } else {
    auto pack = [](float low, float high) { return DTYPE == DType::kBFloat16 ? pack_bfloat16(low, high) : pack_float16(low, high); };
    if constexpr (COUNT == 4) {
      *reinterpret_cast<uint2*>(target) = make_uint2(pack(values[0], values[1]), pack(values[2], values[3]));
    } else if constexpr (COUNT == 2) {
      *reinterpret_cast<uint32_t*>(target) = pack(values[0], values[1]);
    } else {
      *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(pack(values[0], 0.0f));
    }
  }
}

template <DType DTYPE, int LOG_BLOCK>
__global__ __launch_bounds__((BlockShape<DTYPE, LOG_BLOCK>::kThreads)) void hadamard_blocks_kernel(const void* x, void* y, int64_t blocks,
                                                                                                   float factor) {
  using Shape = BlockShape<DTYPE, LOG_BLOCK>;
  using Raw = RawChunk<DTYPE>;
  constexpr int kValues = Shape::kValues;
  constexpr int kTeam = Shape::kTeam;
  constexpr int kChunks = kValues / kChunk;
  const int thread = threadIdx.x % kTeam;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Shape::kTeams;
  int64_t block = static_cast<int64_t>(blockIdx.x) * Shape::kTeams + threadIdx.x / kTeam;

  Raw raw[kChunks];
  auto load = [&] {
    const uint8_t* source = static_cast<const uint8_t*>(x) + (block * (Shape::kBlock / kChunk) + thread) * Raw::kBytes;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if constexpr (!Shape::kPrefetches) raw[i].clear();
      if (block < blocks) raw[i].load(source + i * kTeam * Raw::kBytes);
    }
  };
  load();
  do {
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) raw[i].to_floats(values + i * kChunk);
    const int64_t at = block;
    const bool exists = block < blocks;
    block += step;
    if constexpr (Shape::kPrefetches) load();

    butterflies<kValues, 1, kChunk / 2>(values);
    if constexpr (!Shape::kExchanges) {
#pragma unroll
      for (int lanes = 1; lanes < kTeam; lanes *= 2) butterfly_lanes(values, lanes);
      butterflies<kValues, kChunk, kValues / 2>(values);
    } else {
      float* const team = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x / kTeam * Shape::kTeamFloats;
      // The chunks. Their halves of 16 bytes swap places in every other four chunks: eight threads in a row meet all banks.
      constexpr int kGroupChunks = (1 << Shape::kLogGroup) / kChunk;
      const int swap = thread >> 2 & 1;
      float* const own = team + thread / kGroupChunks * Shape::kGroupFloats + thread % kGroupChunks * kChunk;
      auto chunk_offset = [](int i) { return i * kTeam / kGroupChunks * Shape::kGroupFloats + i * kTeam % kGroupChunks * kChunk; };
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const float* v = values + i * kChunk;
        *reinterpret_cast<float4*>(own + chunk_offset(i) + 4 * swap) = make_float4(v[0], v[1], v[2], v[3]);
        *reinterpret_cast<float4*>(own + chunk_offset(i) + 4 - 4 * swap) = make_float4(v[4], v[5], v[6], v[7]);
      }
      sync_team<kTeam>();
      // Values at stride 8: of group thread / 8 those from thread % 8 on.
      const int near = thread % 8;
      float* const group = team + thread / 8 * Shape::kGroupFloats;
      float* const columns[2] = {group + near, group + (near ^ 4)};
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = columns[i >> 2 & 1][i * kChunk];
      butterflies<kValues, 1, kValues / 2>(values);
#pragma unroll
      for (int i = 0; i < kValues; ++i) columns[i >> 2 & 1][i * kChunk] = values[i];
      sync_team<kTeam>();
      constexpr int kWidth = kValues / Shape::kGroups;  // neighbouring values, if a thread takes as many of each group
      if constexpr (kWidth >= kChunk) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          float* v = values + i * kChunk;
          const float4 low = *reinterpret_cast<const float4*>(own + chunk_offset(i) + 4 * swap);
          const float4 high = *reinterpret_cast<const float4*>(own + chunk_offset(i) + 4 - 4 * swap);
          v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
          v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        }
        // The strides between chunks that no other step had.
        butterflies<kValues, (kChunk << Shape::kLogGroup) / (kTeam * kChunk), kValues / 2>(values);
      } else {
        const int column = thread * kWidth;
        const float* const source = team + (column ^ (column >> 5 & 1) * 4);
#pragma unroll
        for (int g = 0; g < Shape::kGroups; ++g) {
          load_floats<kWidth>(values + g * kWidth, source + g * Shape::kGroupFloats);
        }
        if constexpr (Shape::kPrefetches) sync_team<kTeam>();  // before the next values come
        butterflies<kValues, kWidth, kValues / 2>(values);
        multiply(values, factor);
        uint8_t* const target = static_cast<uint8_t*>(y) + (at * Shape::kBlock + column) * (Raw::kBytes / kChunk);
#pragma unroll
        for (int g = 0; g < Shape::kGroups; ++g) {
          if (exists) store_values<DTYPE, kWidth>(target + (g << Shape::kLogGroup) * (Raw::kBytes / kChunk), values + g * kWidth);
        }
        continue;
      }
    }
    multiply(values, factor);
    uint8_t* const target = static_cast<uint8_t*>(y) + (at * (Shape::kBlock / kChunk) + thread) * Raw::kBytes;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      Raw out;
      out.from_floats(values + i * kChunk);
      if (exists) out.store(target + i * kTeam * Raw::kBytes);
    }
  } while (Shape::kPrefetches && block < blocks);
}

// False where this GPU has too little shared memory for such a block (sm_86 and sm_89 for the largest).
template <DType DTYPE, int LOG_BLOCK>
bool hadamard_blocks(const char* op, const void* x, void* y, int64_t blocks, float factor, const Device& device, cudaStream_t stream) {
  using Shape = BlockShape<DTYPE, LOG_BLOCK>;
  if (static_cast<int64_t>(Shape::kSharedBytes) > device.shared_bytes) return false;
  const int64_t needed = (blocks + Shape::kTeams - 1) / Shape::kTeams;
  const dim3 grid = grid_of(op, Shape::kPrefetches ? std::min<int64_t>(needed, device.sm_count) : needed);
  launch(op, hadamard_blocks_kernel<DTYPE, LOG_BLOCK>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, x, y, blocks, factor);
  return true;
}

// ---- any block at any address

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kThreads * kChunk;

// The butterflies between warps: strides 256, 512, 1024 below `block`. Value v of warp w moves to the thread that holds v of all warps, and
// back.
__device__ void hadamard_warps(float (&x)[kChunk], float* buffer, int block) {
  const int own = threadIdx.x * kChunk;
  // Words 4 to 7 of odd groups of 4 lanes swap places with words 0 to 3, which spreads 16-byte accesses over all banks.
  float4* vectors = reinterpret_cast<float4*>(buffer);
  const int swap = threadIdx.x >> 2 & 1;
  vectors[own / 4 + swap] = make_float4(x[0], x[1], x[2], x[3]);
  vectors[own / 4 + 1 - swap] = make_float4(x[4], x[5], x[6], x[7]);
  __syncthreads();
  float column[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) column[w] = buffer[w * 32 * kChunk + threadIdx.x];
  butterfly<kWarps, 1>(column);
  if (block > 512) butterfly<kWarps, 2>(column);
  if (block > 1024) butterfly<kWarps, 4>(column);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) buffer[w * 32 * kChunk + threadIdx.x] = column[w];
  __syncthreads();
  // From here to the next tile's first barrier a thread touches its own values alone: one buffer is enough.
  const float4 low = vectors[own / 4 + swap];
  const float4 high = vectors[own / 4 + 1 - swap];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <int TILES>
__global__ __launch_bounds__(kThreads) void hadamard_kernel(const void* x, void* y, DType dtype, int64_t count, int block, float factor,
                                                            bool vectorized) {
  __shared__ __align__(16) float buffer[kTile];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * TILES * kTile + threadIdx.x * kChunk;
  float values[TILES][kChunk];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int64_t index = first + i * kTile;
    const int64_t left = count - index;
    load_chunk(values[i], x, dtype, index, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk), vectorized);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    hadamard_warp(values[i], block);
    if (block > 256) hadamard_warps(values[i], buffer, block);
  }
#pragma unroll
  for (int stride = 1; stride < TILES; stride *= 2) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if ((i & stride) == 0) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const float low = values[i][j], high = values[i + stride][j];
          values[i][j] = low + high;
          values[i + stride][j] = low - high;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int64_t index = first + i * kTile;
    const int64_t left = count - index;
    multiply(values[i], factor);
    store_chunk(y, values[i], dtype, index, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk), vectorized);
  }
}

}  // namespace

void hadamard(const void* x, void* y, DType dtype, int64_t rows, int64_t k, int64_t block, cudaStream_t stream) {
  const char* op = "hadamard";
  check_block(k, block);
  const int64_t count = rows * k;
  if (count == 0) return;
  const Device device = current_device(op);
  const bool vectorized = is_aligned(x, 16) && is_aligned(y, 16);
  const float factor = 1.0f / std::sqrt(static_cast<float>(block));
  if (vectorized && block >= 128) {
    const int64_t blocks = count / block;
    bool done = false;
    with_dtype(dtype, [&](auto type) {
      constexpr DType kType = type();
      switch (block) {
        case 128: done = hadamard_blocks<kType, 7>(op, x, y, blocks, factor, device, stream); break;
        case 256: done = hadamard_blocks<kType, 8>(op, x, y, blocks, factor, device, stream); break;
        case 512: done = hadamard_blocks<kType, 9>(op, x, y, blocks, factor, device, stream); break;
        case 1024: done = hadamard_blocks<kType, 10>(op, x, y, blocks, factor, device, stream); break;
        case 2048: done = hadamard_blocks<kType, 11>(op, x, y, blocks, factor, device, stream); break;
        case 4096: done = hadamard_blocks<kType, 12>(op, x, y, blocks, factor, device, stream); break;
        case 8192: done = hadamard_blocks<kType, 13>(op, x, y, blocks, factor, device, stream); break;
        case 16384: done = hadamard_blocks<kType, 14>(op, x, y, blocks, factor, device, stream); break;
        default: done = hadamard_blocks<kType, 15>(op, x, y, blocks, factor, device, stream);
      }
    });
    if (done) return;
  }
  auto run = [&](auto kernel, int64_t tiles) {
    const int64_t values = tiles * kTile;
    launch(op, kernel, grid_of(op, (count + values - 1) / values), dim3(kThreads), 0, stream, x, y, dtype, count, static_cast<int>(block),
           factor, vectorized);
  };
  switch (block / kTile) {
    case 2: run(hadamard_kernel<2>, 2); break;
    case 4: run(hadamard_kernel<4>, 4); break;
    case 8: run(hadamard_kernel<8>, 8); break;
    case 16: run(hadamard_kernel<16>, 16); break;
    default: run(hadamard_kernel<1>, 1);
  }
}

}  // namespace quest::cuda
