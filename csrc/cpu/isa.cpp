// Which build of the kernels this processor runs, and their loop over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#include "../common/parallel.h"
#include "kernels.h"

namespace bit_kernels {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

static const Kernels& choose() {
#if defined(__x86_64__)
  // For tests and bug reports: a slower build than the processor's best.
  const char* limit = std::getenv("BIT_KERNELS_ISA");
  const std::string wanted = limit ? limit : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted == "avx512") return avx512::kKernels;
  if (has_avx2 && wanted != "baseline") return avx2::kKernels;
#endif
  return baseline::kKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for_erased(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace bit_kernels
