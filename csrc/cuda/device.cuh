// What the CUDA kernels share: vectors of neighbours in memory, copies to shared memory that run in
// the background, sums over threads, clusters of blocks.
//
// Nothing here or in the kernels is written for a test, but all of it also compiles as C++ for the
// host, against headers of the same names in tests/cuda/shim.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace bit_kernels {

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char shared_memory[];
#endif

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;  // the widest load and store of one thread

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// ---- elements

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

template <int kBytes>
struct Word;
template <>
struct Word<2> { using Type = unsigned short; };
template <>
struct Word<4> { using Type = unsigned int; };
template <>
struct Word<8> { using Type = uint2; };
template <>
struct Word<16> { using Type = uint4; };

// kVector neighbours in one instruction; `from` is aligned to all of them.
template <int kVector, class T>
__device__ inline void load(const T* from, float (&to)[kVector]) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  T elements[kVector];
  memcpy(elements, &bits, sizeof(bits));
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = to_float(elements[v]);
}

template <int kVector, class T>
__device__ inline void store(T* to, const float (&from)[kVector]) {
  using Bits = typename Word<kVector * sizeof(T)>::Type;
  T elements[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) elements[v] = from_float<T>(from[v]);
  Bits bits;
  memcpy(&bits, elements, sizeof(bits));
  *reinterpret_cast<Bits*>(to) = bits;
}

// Begins to copy kVector neighbours to shared memory. The thread that began it may read them there
// after wait_for_copies().
template <int kVector, class T>
__device__ inline void copy_async(T* to, const T* from) {
  if constexpr (kVector * sizeof(T) >= 4)
    __pipeline_memcpy_async(to, from, kVector * sizeof(T));
  else
    *to = *from;
}

__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// ---- sums, the same for every thread and in an order that never changes

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}

// ---- clusters: blocks that run at the same time and read each other's shared memory

class Cluster {
 public:
  // `blocks` of the grid in a row; 1 where the device has no clusters.
  __device__ explicit Cluster(int blocks) : blocks_(blocks) {}

  __device__ int rank() const { return blockIdx.x % blocks_; }
  __device__ int blocks() const { return blocks_; }

  // Where the block of this rank keeps what lies at `mine` here.
  template <class T>
  __device__ T* of(int rank, T* mine) const {
    if (blocks_ == 1) return mine;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
    return mine;
#endif
  }

  // What was written to shared memory before is there for every thread of the cluster after.
  __device__ void sync() const {
    if (blocks_ == 1) return __syncthreads();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }

  // sync() in two halves. A block must not end while others may still read its memory: each thread
  // says when it has read the last time, and waits for all others before it ends.
  __device__ void arrive() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (blocks_ > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
  __device__ void wait() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (blocks_ > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

 private:
  int blocks_;
};

}  // namespace bit_kernels
