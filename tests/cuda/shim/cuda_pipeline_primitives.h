// Copies to shared memory, made as late as a device may make them: when they are waited for.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes,
                                    std::source_location at = std::source_location::current()) {
  const auto& block = shim::blocks[shim::current->block];
  const auto* target = static_cast<unsigned char*>(to);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    shim::fail("an asynchronous copy of a wrong size", at.line());
  if (target < block.shared || target + bytes > block.shared + block.bytes)
    shim::fail("an asynchronous copy to outside shared memory", at.line());
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % bytes != 0)
    shim::fail("a misaligned asynchronous copy", at.line());
  shim::current->copies.back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { shim::current->copies.emplace_back(); }

// All groups but the last `groups` of those committed.
inline void __pipeline_wait_prior(size_t groups) {
  auto& copies = shim::current->copies;
  while (copies.size() > groups + 1) {
    for (const shim::Copy& copy : copies.front()) memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}
