// Which build of the kernels this processor runs, and their loop over torch's threads.
#include <torch/csrc/stable/ops.h>

#include "../common/isa.h"
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
  const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
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
