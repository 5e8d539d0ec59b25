// What the C++ tests share: random numbers, threads, comparison, and a run under every instruction set of the machine.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "quest/check.h"
#include "quest/parallel.h"

namespace quest::testing {

// SplitMix64 (Steele, Lea, Flood, 2014): a seed gives the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * M_PI * uniform()); }
  std::vector<float> normals(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(normal());
    return values;
  }
  std::vector<uint8_t> codes(int64_t count, int32_t levels) {
    std::vector<uint8_t> values(count);
    for (uint8_t& value : values) value = static_cast<uint8_t>(below(levels));
    return values;
  }

 private:
  uint64_t state_;
};

// A ParallelFor that ignores the grain: `threads` ranges, a thread each; the first exception is passed on.
inline ParallelFor threads_for(int threads) {
  return [threads](int64_t begin, int64_t end, int64_t, const RangeBody& body) {
    std::vector<std::thread> pool;
    std::exception_ptr error;
    std::mutex mutex;
    for (int t = 0; t < threads; ++t) {
      const int64_t from = begin + (end - begin) * t / threads;
      const int64_t to = begin + (end - begin) * (t + 1) / threads;
      if (from == to) continue;
      pool.emplace_back([&, from, to] {
        try {
          body(from, to);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
      });
    }
    for (std::thread& thread : pool) thread.join();
    if (error) std::rethrow_exception(error);
  };
}

// Equal bytes; else the first differing coordinate of the [*, columns] matrix, with both values.
template <typename T>
::testing::AssertionResult bitwise_equal(const std::vector<T>& expected, const std::vector<T>& got, int64_t columns) {
  if (expected.size() != got.size()) {
    return ::testing::AssertionFailure() << "sizes differ: expected " << expected.size() << ", got " << got.size();
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&expected[i], &got[i], sizeof(T)) == 0) continue;
    return ::testing::AssertionFailure() << "first difference at row " << i / columns << ", column " << i % columns << ": expected "
                                         << +expected[i] << ", got " << +got[i];
  }
  return ::testing::AssertionSuccess();
}

// The text of the quest::Error that `body` throws; "" where it throws none.
template <typename Body>
std::string error_text(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_CONTAINS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << "in: " << (text)

// body(isa) under every instruction set that this machine has.
template <typename Body>
void for_each_isa(const Body& body) {
  const Isa chosen = cpu_isa();
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_available(isa)) continue;
    SCOPED_TRACE(to_string(isa));
    use_isa(isa);
    body(isa);
  }
  use_isa(chosen);
}

inline float half_value(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Element i of a tensor of dtype.
inline float element(const std::vector<uint8_t>& data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, data.data() + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data.data() + 2 * i, 2);
  if (dtype == DType::kFloat16) return half_value(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Where kEvenOdd puts a column of its row.
constexpr int64_t even_odd_column(int64_t column) { return column / 64 * 64 + column % 2 * 32 + column % 64 / 2; }

// The neighbouring element of dtype towards zero, for making values of a 16-bit dtype: truncation is as good as rounding for inputs.
inline std::vector<uint8_t> to_dtype(const std::vector<float>& values, DType dtype) {
  std::vector<uint8_t> data(values.size() * element_size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16
    if (dtype == DType::kFloat16) {
      const int32_t exponent = static_cast<int32_t>(bits >> 23 & 255) - 112;
      half = static_cast<uint16_t>(bits >> 16 & 0x8000);
      const bool nan = (bits >> 23 & 255) == 255 && (bits & 0x7FFFFF) != 0;
      if (exponent > 30) {  // infinite in float16
        half = static_cast<uint16_t>(half | 0x7C00 | (nan ? 512 : 0));
      } else if (exponent > 0) {
        half = static_cast<uint16_t>(half | exponent << 10 | (bits >> 13 & 1023));
      }
    }
    if (dtype == DType::kFloat32) {
      std::memcpy(data.data() + 4 * i, &bits, 4);
    } else {
      std::memcpy(data.data() + 2 * i, &half, 2);
    }
  }
  return data;
}

inline const std::vector<DType> kDTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// Half the distance between neighbours of a dtype around 1: the relative error of one rounding.
inline double rounding(DType dtype) { return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8; }

// Every grid that exists.
inline std::vector<Grid> all_grids() {
  std::vector<Grid> grids;
  for (int32_t b = 1; b <= 8; ++b) grids.push_back({GridKind::kInt, b});
  for (int32_t b = 2; b <= 8; ++b) grids.push_back({GridKind::kIntZero, b});
  for (int32_t b = 2; b <= 8; ++b) grids.push_back({GridKind::kGauss, b});
  grids.push_back({GridKind::kFp4, 4});
  grids.push_back({GridKind::kTernary, 2});
  return grids;
}

}  // namespace quest::testing
