// The threads of the CPU backend belong to the caller: every operation takes a ParallelFor and starts no thread of its own.
#pragma once

#include <cstdint>
#include <functional>

namespace quest {

// parallel_for(begin, end, grain, body): calls body(b, e) on disjoint ranges that cover [begin, end), each of at least `grain` items but
// the last, possibly from several threads at once, and returns when all are done. at::parallel_for has this meaning.
using RangeBody = std::function<void(int64_t, int64_t)>;
using ParallelFor = std::function<void(int64_t begin, int64_t end, int64_t grain, const RangeBody& body)>;

// One thread: the caller's.
inline void serial_for(int64_t begin, int64_t end, int64_t /*grain*/, const RangeBody& body) {
  if (begin < end) body(begin, end);
}

}  // namespace quest
