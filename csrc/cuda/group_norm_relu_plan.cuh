// How group_norm_relu.cu cuts a tensor: which channels and pixels a block works on, with how many
// threads, and why a shape can't be cut.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bit_kernels {
namespace {

constexpr int kMostThreads = 512;      // of a forward block
constexpr int kBackwardThreads = 256;  // its sums and constants take more registers
constexpr int kMostClusterBlocks = 8;  // what every device with clusters can do

// How a tensor is cut.
struct Plan {
  int64_t samples, pixels, channels, groups;
  int depth;     // channels of a group
  int width;     // channels of a slice
  int slices;    // of a sample
  int cluster;   // blocks that share a slice
  int rows;      // of a block; the last blocks of a cluster may have fewer
  int columns;   // vectors of a row
  int threads;   // `span` neighbours take a row's vectors, `lanes` of these different rows
  int span, lanes;
  int lanes_in_warp, partials;  // what of the lanes is summed by shuffles, and is left then
  int sums;                     // of a channel: 1 forward, 2 backward
  int data_bytes;               // of the elements in shared memory

  __host__ __device__ int slice_groups() const { return width / depth; }
  __host__ __device__ int partial_floats() const {
    return sums * partials * span * (width / columns);
  }
  __device__ int rows_of(int rank) const {
    const int64_t left = pixels - static_cast<int64_t>(rank) * rows;
    return left < 0 ? 0 : left < rows ? static_cast<int>(left) : rows;
  }
};

// What a block keeps in shared memory behind its elements, in floats.
__host__ __device__ inline int scratch_floats(const Plan& plan) {
  const int sums = plan.sums * plan.width, parameters = 2 * plan.width;
  return plan.partial_floats() + sums * plan.sums + parameters + 4 * plan.slice_groups();
}

int element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

int64_t shared_bytes(const Plan& plan) {
  return plan.data_bytes + int64_t{4} * scratch_floats(plan);
}

Plan plan_for(const GroupNormShape& shape, bool backward, bool aligned, int64_t slice_groups,
              int cluster) {
  Plan plan = {};
  plan.samples = shape.samples;
  plan.pixels = shape.pixels;
  plan.channels = shape.channels;
  plan.groups = shape.groups;
  plan.depth = static_cast<int>(shape.channels / shape.groups);
  plan.width = static_cast<int>(slice_groups * plan.depth);
  plan.slices = static_cast<int>(shape.groups / slice_groups);
  plan.cluster = cluster;
  plan.rows = static_cast<int>(divide_up(shape.pixels, cluster));
  plan.sums = backward ? 2 : 1;
  const int bytes = element_bytes(shape.element), wide = kVectorBytes / bytes;
  const int vector = aligned && plan.width % wide == 0 && plan.channels % wide == 0 ? wide : 1;
  plan.columns = plan.width / vector;
  const int64_t data = int64_t{plan.sums} * plan.rows * plan.width * bytes;
  plan.data_bytes = static_cast<int>(divide_up(data, kVectorBytes) * kVectorBytes);
  plan.threads = backward || data <= kSharedWithoutAsking ? kBackwardThreads : kMostThreads;
  plan.span = static_cast<int>(minimum(plan.columns, plan.threads));
  plan.lanes = plan.threads / plan.span;
  plan.lanes_in_warp = kWarp % plan.span == 0 ? kWarp / plan.span : 1;
  plan.partials = plan.lanes / plan.lanes_in_warp;
  return plan;
}

// A cut is better the earlier it is so in this list.
struct Merit {
  int64_t worth[6] = {};

  Merit() = default;
  Merit(const Plan& plan, int bytes, int64_t shared, const Device& device)
      : worth{plan.width / plan.columns,  // vectors
              minimum(plan.samples * plan.slices * plan.cluster, device.multiprocessors),
              device.holds_two_blocks_of(shared),  // one computes while the other copies
              minimum(plan.width * bytes, 128),    // whole cache lines
              minimum(shared, 32 * 1024),          // enough for a block to do
              -plan.cluster} {}
  bool operator>(const Merit& other) const {
    for (int i = 0; i < 6; ++i)
      if (worth[i] != other.worth[i]) return worth[i] > other.worth[i];
    return false;
  }
};

constexpr int64_t kSectorBytes = 32;       // what memory is read in
constexpr int64_t kWorthABlock = 8 * 1024;  // a block with less to do costs more than it helps

// The best plan, or why there is none. bit_kernels/ops/_cuda.py asks the same question beforehand.
const char* choose_plan(const GroupNormShape& shape, bool backward, bool aligned,
                        const Device& device, Plan* chosen) {
  const int64_t groups = shape.groups, pixels = shape.pixels;
  if (shape.channels > 0x7fffffff || groups < 1 || shape.channels % groups != 0)
    return complain("num_groups is %lld; it must divide the %lld channels of the input",
                    static_cast<long long>(groups), static_cast<long long>(shape.channels));
  const int64_t depth = shape.channels / groups;
  const int bytes = element_bytes(shape.element);
  const int most_blocks = device.has_clusters ? kMostClusterBlocks : 1;
  bool found = false;
  int64_t least = INT64_MAX;
  Merit best;
  for (int64_t slice_groups = 1; slice_groups <= groups; ++slice_groups) {
    if (groups % slice_groups != 0) continue;
    // Less than what memory is read in would be read more than once.
    if (slice_groups * depth * bytes < kSectorBytes && slice_groups < groups) continue;
    bool fits = false;
    for (int cluster = 1; cluster <= most_blocks && cluster <= pixels; cluster *= 2) {
      // Before any number could be too large for its type.
      const int64_t rows = divide_up(pixels, cluster);
      const int64_t data = (backward ? 2 : 1) * bytes * slice_groups * depth * rows;
      if (fits && data < kWorthABlock) break;
      if (rows > device.shared_per_block || data > device.shared_per_block) {
        least = minimum(least, data);
        continue;
      }
      const Plan plan = plan_for(shape, backward, aligned, slice_groups, cluster);
      const int64_t shared = shared_bytes(plan);
      least = minimum(least, shared);
      if (shared > device.shared_per_block) continue;
      fits = true;
      const Merit merit(plan, bytes, shared, device);
      if (found && !(merit > best)) continue;
      found = true;
      best = merit;
      *chosen = plan;
    }
  }
  if (!found)
    return complain("a slice of %lld pixels takes %lld KiB of shared memory in each of %d block%s; "
                    "this device has %d KiB",
                    static_cast<long long>(pixels), static_cast<long long>(least / 1024),
                    most_blocks, most_blocks == 1 ? "" : "s", device.shared_per_block / 1024);
  return nullptr;
}

}  // namespace
}  // namespace bit_kernels
