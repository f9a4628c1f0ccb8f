// Which of a library's builds this processor runs.
#pragma once

#include <cstdlib>
#include <string>

namespace bit_kernels {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  // For tests and bug reports: a slower build than the processor's best.
  const char* limit = std::getenv("BIT_KERNELS_ISA");
  const std::string wanted = limit ? limit : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted == "avx512") return Isa::kAvx512;
  if (has_avx2 && wanted != "baseline") return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace bit_kernels
