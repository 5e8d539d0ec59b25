#include "quest/packing.h"

#include <atomic>
#include <limits>

#include "buffer.h"
#include "kernels.h"
#include "quest/check.h"

namespace quest {
namespace {

PackTask pack_task(const char* op, Grid grid, Layout layout, const uint8_t* codes, const uint8_t* packed, int64_t rows, int64_t k) {
  check_packing(op, grid, layout, rows, k);
  PackTask task{};
  task.codes = const_cast<uint8_t*>(codes);  // each direction writes one of the two alone
  task.packed = const_cast<uint8_t*>(packed);
  task.layout = layout;
  task.bits = grid.bits;
  task.k = k;
  task.row_bytes = row_bytes(layout, k);
  task.plane_stride = rows * task.row_bytes;
  return task;
}

}  // namespace

int64_t row_bytes(Layout layout, int64_t k) {
  switch (layout) {
    case Layout::kCodes:
    case Layout::kValues: break;
    case Layout::kPacked: return packed_row_bytes(k);
    case Layout::kPlanes: return plane_row_bytes(k);
    case Layout::kEvenOdd: return round_up(k, kEvenOddColumns);
  }
  return k;
}

void check_packing(const char* op, Grid grid, Layout layout, int64_t rows, int64_t k) {
  check_grid(grid);
  check(rows >= 0 && k >= 0, op, ": expected a shape of sizes >= 0, got [", rows, ", ", k, "]");
  check(layout == Layout::kPacked || layout == Layout::kPlanes, op, ": expected layout packed or planes, got ", to_string(layout),
        "; codes and values are not packed");
  check(layout != Layout::kPacked || grid.bits <= 4, op, ": expected at most 4 bits for layout packed, got grid ", to_string(grid),
        "; use layout planes, or keep one code a byte");
}

void throw_out_of_range(Grid grid, int32_t code, int64_t position, int64_t k) {
  throw Error(concat("pack: expected codes from 0 to ", level_count(grid) - 1, " for grid ", to_string(grid), ", got ", code, " at row ",
                     position / k, ", column ", position % k, "; quantize with this grid, or name the grid of the codes"));
}

void pack(Grid grid, Layout layout, const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t k, const ParallelFor& parallel_for) {
  const PackTask task = pack_task("pack", grid, layout, codes, packed, rows, k);
  if (rows == 0 || k == 0) return;
  const Kernels& kernel = kernels();
  const int32_t levels = level_count(grid);
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) {
    const int64_t found = kernel.find_above(codes + begin * k, (end - begin) * k, levels);
    if (found < 0) {
      kernel.pack_rows(task, begin, end);
      return;
    }
    int64_t expected = first_bad;
    while (begin * k + found < expected && !first_bad.compare_exchange_weak(expected, begin * k + found)) {
    }
  });
  const int64_t bad = first_bad;
  if (bad != kNone) throw_out_of_range(grid, codes[bad], bad, k);
}

void unpack(Grid grid, Layout layout, const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t k, const ParallelFor& parallel_for) {
  const PackTask task = pack_task("unpack", grid, layout, codes, packed, rows, k);
  if (rows == 0 || k == 0) return;
  const Kernels& kernel = kernels();
  parallel_for(0, rows, row_grain(k), [&](int64_t begin, int64_t end) { kernel.unpack_rows(task, begin, end); });
}

}  // namespace quest
