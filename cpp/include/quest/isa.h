// Which instruction set the CPU kernels use: chosen once, at first use, from what the processor has.
// The environment variable QUEST_CPU_ISA (portable, avx2, avx512) chooses a lower one, for tests and for measuring.
#pragma once

#include <cstdint>

namespace quest {

enum class Isa : int32_t {
  kPortable,  // any processor
  kAvx2,      // AVX2, FMA, F16C, POPCNT
  kAvx512,    // AVX-512 F/BW/VL/DQ with VNNI, VPOPCNTDQ and VBMI (Ice Lake, Zen 4 and later)
};

Isa cpu_isa();
const char* to_string(Isa isa);

}  // namespace quest
