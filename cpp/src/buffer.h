// Scratch memory aligned for vector loads.
#pragma once

#include <cstdint>
#include <new>

#include "kernels.h"
#include "quest/packing.h"

namespace quest {

// `count` elements of a plain type, uninitialised, rounded up to whole cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(round_up(count* static_cast<int64_t>(sizeof(T)), kScratchAlignment), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{kScratchAlignment};
  T* data_;
};

// Rows are handed to threads in pieces of at least this many elements: some ten microseconds of work, against one or two to wake a thread.
inline constexpr int64_t kGrainElements = 32768;

inline int64_t row_grain(int64_t k) { return k < kGrainElements ? kGrainElements / (k > 0 ? k : 1) : 1; }

}  // namespace quest
