// The part of CUDA that csrc/cuda uses, as C++ for the host, to test kernels without a device.
//
// A block's threads, and those of all blocks of its cluster, are fibres on one thread of the host.
// One warp after another runs as far as it comes without the others: until its threads have ended or
// wait at a barrier of the block or cluster. A barrier that is missing between two warps then shows:
// one reads what the other has not written yet, or has overwritten already. Whatever order they run
// in, results must be the same bits: shim_order() turns it around or mixes it.
//
// Stricter than a device: what is undefined there fails here, with the line of the source.
//   - a barrier or shuffle that some threads of the block, cluster or mask never reach, or that
//     they reach on different lines
//   - a copy to shared memory that is misaligned, outside of it, or not waited for
//   - another block's shared memory before all of the cluster run, after its end, or outside it
//   - writes around a block's shared memory; reads of what was never written there give NaN
//   - launches with more threads, shared memory or blocks in a cluster than the device offers
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint2 { alignas(8) unsigned x; unsigned y; };
struct uint4 { alignas(16) unsigned x; unsigned y, z, w; };
struct float2 { alignas(8) float x; float y; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel sees of itself; the fibre that runs has its own.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace bit_kernels {
inline unsigned char* shared_memory;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrComputeCapabilityMajor,
  shimAttributes
};
struct cudaFuncAttributes {
  int ptxVersion;  // of all functions the same
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace shim {

constexpr int kWarpSize = 32, kMostThreads = 1024, kMostClusterBlocks = 8;
constexpr size_t kSharedByDefault = 48 * 1024;
constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every type

enum class Wait { kNothing, kBlock, kWarp, kCluster, kEnd };

struct Copy { void* to; const void* from; size_t bytes; };

struct Thread {
  int number, block;  // in its block; of its cluster
  Wait wait;
  unsigned line;
  ucontext_t start;
  jmp_buf there;
  bool begun;
  // shuffles
  unsigned mask;
  int partner;
  uint32_t offered, received;
  // cluster barriers
  bool arrived, must_wait;
  int64_t phase;
  std::vector<std::vector<Copy>> copies;  // the last of them not committed yet
};

struct Block {
  dim3 index;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  size_t bytes;
  int ended;
};

struct Launch { int64_t blocks; int threads, cluster; int64_t shared; };

// The device, and how it is to run.
inline int attributes[shimAttributes] = {132, 227 * 1024, 228 * 1024, 1024, 9};
inline int ptx = 90;
inline int order = 0;
inline int64_t first_cluster = 0;
inline std::vector<Launch> launches;
inline std::map<const void*, size_t> dynamic_shared;

// The cluster that runs.
inline std::vector<Thread> threads;
inline std::vector<Block> blocks;
inline int threads_per_block;
inline int64_t phase;  // cluster barriers that all have passed
inline Thread* current;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::string error;

[[noreturn]] inline void back() { _longjmp(scheduler, 1); }

[[noreturn]] inline void fail(const std::string& what, unsigned line = 0) {
  error = what + (line ? ", line " + std::to_string(line) : "");
  back();
}

// Lets others run until `wait` is over.
__attribute__((noinline)) inline void pause(Wait wait, unsigned line) {
  current->wait = wait;
  current->line = line;
  if (_setjmp(current->there) == 0) back();
}

inline void enter() {
  kernel();
  for (const auto& group : current->copies)
    if (!group.empty()) fail("a thread ended with copies that it never waited for");
  if (current->must_wait) fail("a thread ended after barrier_arrive without barrier_wait");
  Block& block = blocks[current->block];
  current->wait = Wait::kEnd;
  // What was kept here is gone for the rest of the cluster.
  if (++block.ended == threads_per_block) memset(block.shared, kPoison, block.bytes);
  back();
}

inline unsigned char* stack(size_t number) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[number];
}

inline void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  current = &thread;
  thread.wait = Wait::kNothing;
  threadIdx = dim3(thread.number, 0, 0);
  blockIdx = blocks[thread.block].index;
  bit_kernels::shared_memory = blocks[thread.block].shared;
  if (thread.begun) _longjmp(thread.there, 1);
  thread.begun = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack(&thread - threads.data());
  thread.start.uc_stack.ss_size = kStackBytes;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, enter, 0);
  setcontext(&thread.start);
}

inline bool same_line(const Thread& a, const Thread& b) {
  if (a.line == b.line) return true;
  error = "threads wait for each other on lines " + std::to_string(a.line) + " and " +
          std::to_string(b.line);
  return false;
}

// Lets threads of a warp go on whose shuffle is complete; whether there were any.
inline bool release_warp(Thread* lanes, int count) {
  bool any = false;
  for (int lane = 0; lane < count; ++lane) {
    if (lanes[lane].wait != Wait::kWarp) continue;
    const unsigned mask = lanes[lane].mask;
    bool complete = true;
    for (int other = 0; other < kWarpSize; ++other)
      if (mask >> other & 1)
        complete = complete && other < count && lanes[other].wait == Wait::kWarp &&
                   lanes[other].mask == mask;
    if (!complete) continue;
    for (int other = 0; other < count; ++other) {
      if (!(mask >> other & 1)) continue;
      Thread& thread = lanes[other];
      if (!same_line(lanes[lane], thread)) return false;
      if (!(mask >> thread.partner & 1)) {
        error = "a shuffle reads a thread outside its mask, line " + std::to_string(thread.line);
        return false;
      }
      thread.received = lanes[thread.partner].offered;
    }
    for (int other = 0; other < count; ++other)
      if (mask >> other & 1) lanes[other].wait = Wait::kNothing;
    any = true;
  }
  return any;
}

// Runs the threads of a warp as far as they come without others; whether they came anywhere.
inline bool run_warp(Thread* lanes, int count) {
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (int i = 0; i < count; ++i) {
      Thread& thread = lanes[order == 1 ? count - 1 - i : i];
      if (thread.wait != Wait::kNothing) continue;
      ran = any = true;
      resume(thread);
      if (!error.empty()) return any;
    }
    if (release_warp(lanes, count)) ran = true;
    if (!error.empty()) return any;
  }
  return any;
}

// Lets threads go on whose block or cluster has come to a barrier.
inline void release() {
  for (size_t first = 0; first < threads.size(); first += threads_per_block) {
    Thread* const of_block = &threads[first];
    int waiting = 0;
    for (int t = 0; t < threads_per_block; ++t) waiting += of_block[t].wait == Wait::kBlock;
    if (waiting < threads_per_block) continue;
    for (int t = 0; t < threads_per_block; ++t) {
      if (!same_line(of_block[0], of_block[t])) return;
      of_block[t].wait = Wait::kNothing;
    }
  }
  for (Thread& thread : threads)
    if (thread.wait == Wait::kCluster && phase > thread.phase) thread.wait = Wait::kNothing;
}

inline void stuck() {
  std::map<std::pair<int, unsigned>, int> where;
  int ended = 0;
  for (const Thread& thread : threads) {
    if (thread.wait == Wait::kEnd) ++ended;
    else ++where[{static_cast<int>(thread.wait), thread.line}];
  }
  error = "threads wait for others that never come:";
  const char* names[] = {"", "__syncthreads", "a shuffle", "the cluster's barrier"};
  for (const auto& [at, count] : where)
    error += " " + std::to_string(count) + " at " + names[at.first] + " in line " +
             std::to_string(at.second) + ",";
  error += " " + std::to_string(ended) + " have ended";
}

inline void run_cluster(int64_t first_block, int cluster, size_t shared) {
  blocks.assign(cluster, {});
  threads.assign(static_cast<size_t>(cluster) * threads_per_block, {});
  phase = 0;
  for (int b = 0; b < cluster; ++b) {
    Block& block = blocks[b];
    block.index = dim3(static_cast<unsigned>(first_block + b), 0, 0);
    block.memory.assign(shared + 3 * kGuardBytes, kPoison);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.data()) + kGuardBytes;
    block.shared = reinterpret_cast<unsigned char*>((address + kGuardBytes - 1) / kGuardBytes *
                                                    kGuardBytes);
    block.bytes = shared;
  }
  for (size_t t = 0; t < threads.size(); ++t) {
    threads[t].number = static_cast<int>(t) % threads_per_block;
    threads[t].block = static_cast<int>(t) / threads_per_block;
    threads[t].copies.resize(1);
  }
  std::vector<Thread*> warps;
  for (Thread& thread : threads)
    if (thread.number % kWarpSize == 0) warps.push_back(&thread);
  std::mt19937 random(order);
  if (order == 1) std::reverse(warps.begin(), warps.end());
  for (bool ran = true; ran;) {
    ran = false;
    if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
    for (Thread* lanes : warps) {
      ran |= run_warp(lanes, std::min(kWarpSize, threads_per_block - lanes->number));
      if (!error.empty()) return;
    }
    release();
    if (!error.empty()) return;
  }
  for (const Thread& thread : threads)
    if (thread.wait != Wait::kEnd) return stuck();
  for (const Block& block : blocks)
    for (const unsigned char& byte : block.memory)
      if ((&byte < block.shared || &byte >= block.shared + block.bytes) && byte != kPoison) {
        error = "something was written outside of shared memory";
        return;
      }
}

inline cudaError_t refuse(const std::string& what) {
  error = what;
  return cudaErrorInvalidValue;
}

inline cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* function) {
  error.clear();
  int cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) cluster = config.attrs[i].val.clusterDim.x;
  const int64_t grid = config.gridDim.x;
  const int block = static_cast<int>(config.blockDim.x);
  const size_t shared = config.dynamicSmemBytes;
  launches.push_back({grid, block, cluster, static_cast<int64_t>(shared)});
  const auto allowed = dynamic_shared.find(function);
  if (block < 1 || block > kMostThreads) return refuse("a block of too many threads");
  if (shared > (allowed == dynamic_shared.end() ? kSharedByDefault : allowed->second))
    return refuse("a block of more shared memory than was asked for");
  if (cluster < 1 || cluster > kMostClusterBlocks || grid % cluster != 0)
    return refuse("a cluster of " + std::to_string(cluster) + " blocks in a grid of " +
                  std::to_string(grid));
  if (cluster > 1 && attributes[cudaDevAttrComputeCapabilityMajor] < 9)
    return refuse("a cluster on a device without clusters");
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads_per_block = block;
  for (int64_t c = first_cluster; c < grid / cluster; ++c) {
    run_cluster(c * cluster, cluster, shared);
    if (!error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// What a fibre's shared memory pointer is in the block of this rank.
inline void* in_cluster(void* pointer, int rank, unsigned line) {
  const Block& mine = blocks[current->block];
  const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - mine.shared;
  if (offset < 0 || static_cast<size_t>(offset) >= mine.bytes)
    fail("map_shared_rank of an address outside shared memory", line);
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    fail("map_shared_rank of a block outside the cluster", line);
  if (phase == 0) fail("map_shared_rank before all blocks of the cluster are known to run", line);
  if (blocks[rank].ended > 0) fail("map_shared_rank of a block that has begun to end", line);
  return blocks[rank].shared + offset;
}

inline void cluster_arrive(unsigned line) {
  if (current->must_wait) fail("barrier_arrive twice without barrier_wait", line);
  current->arrived = current->must_wait = true;
  current->phase = phase;
  for (const Thread& thread : threads)
    if (!thread.arrived) return;
  ++phase;
  for (Thread& thread : threads) thread.arrived = false;
}

inline void cluster_wait(unsigned line) {
  if (!current->must_wait) fail("barrier_wait without barrier_arrive", line);
  if (phase == current->phase) pause(Wait::kCluster, line);
  current->must_wait = false;
}

}  // namespace shim

// ---- what kernels call

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  shim::pause(shim::Wait::kBlock, at.line());
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  const int lane = shim::current->number % shim::kWarpSize;
  if (!(mask >> lane & 1)) shim::fail("a shuffle by a thread outside its mask", at.line());
  shim::current->mask = mask;
  shim::current->partner = lane ^ lane_mask;
  memcpy(&shim::current->offered, &value, sizeof(T));
  shim::pause(shim::Wait::kWarp, at.line());
  memcpy(&value, &shim::current->received, sizeof(T));
  return value;
}

// ---- what launches call

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = shim::attributes[attribute];
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = shim::ptx;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
  if (bytes > shim::attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin])
    return shim::refuse("more shared memory than a block may have");
  shim::dynamic_shared[function] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::remove_cvref_t<Parameters>> && ...));
  static_assert((sizeof(std::remove_cvref_t<Parameters>) + ... + 0) <= 4096);
  shim::kernel = [=] { kernel(arguments...); };
  return shim::run_grid(*config, reinterpret_cast<const void*>(kernel));
}

inline const char* cudaGetErrorString(cudaError_t) { return shim::error.c_str(); }

// ---- what tests call

#define SHIM_EXPORT extern "C" __attribute__((used, visibility("default")))

SHIM_EXPORT void shim_device(int major, int multiprocessors, int per_block,
                             int per_multiprocessor, int ptx) {
  shim::ptx = ptx;
  shim::attributes[cudaDevAttrComputeCapabilityMajor] = major;
  shim::attributes[cudaDevAttrMultiProcessorCount] = multiprocessors;
  shim::attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = per_block;
  shim::attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor] = per_multiprocessor;
}
// 0: as they are numbered, 1: the other way around, more: at random.
SHIM_EXPORT void shim_order(int order) { shim::order = order; }
// Leaves out what comes before it in every grid.
SHIM_EXPORT void shim_first_cluster(int64_t cluster) { shim::first_cluster = cluster; }
// Blocks, threads, blocks of a cluster and shared memory of launch `i` since the last forget.
SHIM_EXPORT bool shim_launch(int i, int64_t* numbers) {
  if (i >= static_cast<int>(shim::launches.size())) return false;
  const shim::Launch& launch = shim::launches[i];
  numbers[0] = launch.blocks, numbers[1] = launch.threads;
  numbers[2] = launch.cluster, numbers[3] = launch.shared;
  return true;
}
SHIM_EXPORT void shim_forget() { shim::launches.clear(); }
