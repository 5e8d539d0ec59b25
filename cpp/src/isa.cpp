// The choice of instruction set.
#include "quest/isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels.h"
#include "quest/check.h"

#if defined(__x86_64__)
#define QUEST_X86 1
#endif

namespace quest {

namespace portable {
extern const Kernels kTable;
}
#if QUEST_X86
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

namespace {

Isa best_isa() {
#if QUEST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");  // every processor with AVX2 has F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vbmi");
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa requested_isa() {
  const char* text = std::getenv("QUEST_CPU_ISA");
  if (text == nullptr || *text == '\0') return best_isa();
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(text) != to_string(isa)) continue;
    check(isa_available(isa), "QUEST_CPU_ISA: expected an instruction set of this processor, up to ", to_string(best_isa()), ", got \"",
          text, "\"; choose a lower one or unset it");
    return isa;
  }
  throw Error(concat("QUEST_CPU_ISA: expected one of portable, avx2, avx512, got \"", text, "\"; correct or unset it"));
}

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{requested_isa()};
  return isa;
}

}  // namespace

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: break;
  }
  return "avx512";
}

Isa cpu_isa() { return chosen_isa(); }

bool isa_available(Isa isa) { return isa <= best_isa(); }

void use_isa(Isa isa) {
  check(isa_available(isa), "use_isa: expected an instruction set of this processor, got ", to_string(isa));
  chosen_isa() = isa;
}

const Kernels& kernels() {
#if QUEST_X86
  switch (cpu_isa()) {
    case Isa::kPortable: break;
    case Isa::kAvx2: return avx2::kTable;
    case Isa::kAvx512: return avx512::kTable;
  }
#endif
  return portable::kTable;
}

}  // namespace quest
