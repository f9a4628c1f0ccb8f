// Kernels with one fault each, which the headers here must find. Each sums what its threads offer.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace bit_kernels {
namespace {

constexpr int kThreads = 64;

enum Fault {
  kNone,
  kNoBarrier,
  kBarrierInABranch,
  kBarriersOfTwoBranches,
  kShuffleWithoutAll,
  kNoWaitForCopies,
  kCopyOutside,
  kCopyMisaligned,
  kWriteOutside,
  kRemoteTooEarly,
  kRemoteAfterItsEnd,
  kRemoteOutside,
  kNoClusterBarrier,
  kArriveWithoutWait,
  kEndWithoutWait,
  kOverwritten,
};

__device__ float sum_over_block(float value, Fault fault) {
  float* values = reinterpret_cast<float*>(shared_memory);
  values[threadIdx.x] = value;
  if (fault == kBarrierInABranch) {
    if (threadIdx.x < kThreads / 2) __syncthreads();
  } else if (fault == kBarriersOfTwoBranches) {
    if (threadIdx.x < kThreads / 2)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += values[t];
  return sum;
}

__global__ void faulty(Fault fault, const float* input, float* output) {
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x, other = 1 - rank;
  float* values = reinterpret_cast<float*>(shared_memory);
  float* staged = values + kThreads + 4;
  int place = threadIdx.x;
  if (fault == kCopyOutside) place += 1000;
  const char* from = reinterpret_cast<const char*>(input + threadIdx.x);
  if (fault == kCopyMisaligned) from += 2;
  __pipeline_memcpy_async(staged + place, from, sizeof(float));
  __pipeline_commit();
  if (fault == kNoWaitForCopies) {
    output[blockIdx.x * kThreads + threadIdx.x] = staged[threadIdx.x];
    return;
  }
  __pipeline_wait_prior(0);
  if (fault == kWriteOutside && threadIdx.x == 0) values[-1] = 0;

  float value = staged[threadIdx.x];
  if (fault != kShuffleWithoutAll || threadIdx.x != 3) value += __shfl_xor_sync(~0u, value, 1) * 0;
  float* total = values + kThreads;
  const float sum = sum_over_block(value, fault);
  if (fault == kOverwritten) sum_over_block(value + 1, fault);  // while others still read
  if (threadIdx.x == 0) total[0] = sum;
  if (fault == kRemoteTooEarly) {
    __syncthreads();
    cluster.map_shared_rank(total, other);
  }
  if (fault == kNoClusterBarrier) {
    __syncthreads();
    cluster.sync();
    if (threadIdx.x == 0) total[0] = sum + 1;  // read on the other side without a barrier
  } else {
    cluster.sync();
  }
  if (fault == kRemoteOutside) cluster.map_shared_rank(values - 1, other);
  if (fault == kRemoteAfterItsEnd && rank == 0) return;
  const float both = sum + *cluster.map_shared_rank(total, other);
  cluster.barrier_arrive();
  if (fault == kArriveWithoutWait) cluster.barrier_arrive();
  if (fault == kEndWithoutWait) return;
  cluster.barrier_wait();
  output[blockIdx.x * kThreads + threadIdx.x] = both;
}


__global__ void nothing() {}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int cluster, int threads,
                   int64_t shared, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" const char* run_faulty(int fault, const float* input, float* output) {
  constexpr int64_t kShared = 2 * kThreads * sizeof(float) + 16;
  return launch(faulty, 2, 2, kThreads, kShared, static_cast<Fault>(fault), input, output);
}

extern "C" const char* run_nothing(int blocks, int cluster, int threads, int64_t shared) {
  return launch(nothing, blocks, cluster, threads, shared);
}

}  // namespace bit_kernels
