// A loop over torch's threads, for kernel files that include nothing of torch.
#pragma once

#include <cstdint>

namespace bit_kernels {

// Below this many elements one thread is faster than waking a second one (as in ATen).
constexpr int64_t kParallelElements = 32768;

int64_t num_threads();
void parallel_for_erased(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

// Calls body(begin, end) for contiguous parts of [0, count), one part a thread.
template <class Body>
void parallel_for(int64_t count, bool parallel, const Body& body) {
  if (!parallel || count < 2) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  parallel_for_erased(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace bit_kernels
