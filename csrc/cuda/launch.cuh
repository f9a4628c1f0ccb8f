// How kernels are launched: what the device offers, and errors in words.
#pragma once

#include <cstdio>

#include "device.cuh"

namespace bit_kernels {

// What is wrong, for the caller; the buffer is the thread's own.
template <class... Arguments>
const char* complain(const char* format, Arguments... arguments) {
  static thread_local char text[512];
  std::snprintf(text, sizeof(text), format, arguments...);
  return text;
}

inline const char* in_words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  return complain("CUDA refused: %s", cudaGetErrorString(error));
}

// Tells what this file's kernels were compiled for.
static __global__ void compiled_as_this_file() {}

// What the kernels ask of a device; the shared memory in bytes.
struct Device {
  int multiprocessors = 0, shared_per_block = 0, shared_per_multiprocessor = 0, reserved = 0;
  bool has_clusters = false;

  // Of this device, which is the current one after. Current for the runtime that is linked in here:
  // PyTorch has another one.
  cudaError_t read(int device) {
    int major = 0;
    cudaError_t error = cudaSetDevice(device);
    auto ask = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    // A device of a later kind may run code that was compiled, as PTX, for one without clusters.
    cudaFuncAttributes code = {};
    if (error == cudaSuccess)
      error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(compiled_as_this_file));
    has_clusters = major >= 9 && code.ptxVersion >= 90;
    return error;
  }

  bool holds_two_blocks_of(int64_t shared) const {
    return 2 * (shared + reserved) <= shared_per_multiprocessor;
  }
};

// Blocks in a row, `cluster` of them to a cluster.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared;
  int cluster = 1;
};

constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int64_t kSharedWithoutAsking = 48 * 1024;

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, void* stream, Arguments... arguments) {
  if (grid.blocks == 0) return nullptr;
  if (grid.blocks > kMostBlocks)
    return complain("it takes %lld blocks; a grid may have %lld",
                    static_cast<long long>(grid.blocks), static_cast<long long>(kMostBlocks));
  if (grid.shared > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(grid.shared));
    if (error != cudaSuccess) return in_words(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  return in_words(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace bit_kernels
