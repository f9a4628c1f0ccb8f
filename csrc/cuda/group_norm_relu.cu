// GroupNorm and ReLU in channels_last on CUDA devices, forward and backward, everything read once.
//
//   y = max(0, (x - mean) * rstd * weight + bias)       (the max only with relu)
//
// What is normalised together stays on the chip: a cluster of blocks shares one slice, some whole
// groups of one sample, and each block keeps some of its rows (pixels) in shared memory:
//
//            channels of a slice          forward                       backward
//            +-----------------+          mean, then deviations from    sums of g, g * (x - mean) of
//   block 0  |  rows of pixels |          it, of a block's own rows     a channel in its own rows
//   block 1  |                 |          moments of all blocks merged  sums of all blocks added
//      ...   +-----------------+          y written                     dx written
//
// Memory passes: 2 forward (read x, write y), 3 backward (read x and dy, write dx). The gradients
// of weight and bias are written as sums of each sample, which a second small kernel adds up. The
// ReLU's mask is recomputed from x by the formula of the forward. Every sum has a fixed order.
#include "device.cuh"
#include "group_norm_relu_plan.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bit_kernels {
namespace {

struct Moments {
  float mean, deviations;  // deviations: the sum of their squares
};

struct Normal {
  float mean, rstd;
};

struct Slope {
  float slope, offset;  // dx = scale * g + slope * (x - mean) + offset
};

// What a block keeps in shared memory behind its elements: scratch_floats of the plan.
struct Scratch {
  float *partial, *weight, *bias, *totals, *weighted;
  Moments* moments;
  Normal* normal;
  Slope* slope;

  __device__ explicit Scratch(const Plan& plan) {
    partial = reinterpret_cast<float*>(shared_memory + plan.data_bytes);
    weight = partial + plan.partial_floats();
    bias = weight + plan.width;
    totals = bias + plan.width;
    weighted = totals + plan.sums * plan.width;  // backward only
    float* rest = totals + plan.sums * plan.sums * plan.width;
    normal = reinterpret_cast<Normal*>(rest);
    moments = reinterpret_cast<Moments*>(rest + 2 * plan.slice_groups());
    slope = reinterpret_cast<Slope*>(moments);
  }
};

// What the elements of one channel need. Forward and backward ask linear() alone what is active.
struct Affine {
  float mean, scale, shift;
  __device__ float linear(float x) const { return fmaf(x - mean, scale, shift); }
  __device__ float output(float x, bool relu) const {
    const float y = linear(x);
    return relu && y < 0 ? 0 : y;  // a NaN stays
  }
  __device__ float active(float x, float gradient, bool relu) const {
    return relu && linear(x) <= 0 ? 0 : gradient;
  }
};

// What one block works on.
template <class T, int kVector>
struct Slice {
  const Plan& plan;
  Cluster cluster;
  int64_t sample, first_channel;
  int rows;
  int64_t offset;  // of its first element in the tensor

  __device__ explicit Slice(const Plan& plan) : plan(plan), cluster(plan.cluster) {
    const unsigned slice = blockIdx.x / plan.cluster;
    sample = slice / plan.slices;
    first_channel = slice % plan.slices * static_cast<int64_t>(plan.width);
    rows = plan.rows_of(cluster.rank());
    const int64_t first_row = static_cast<int64_t>(cluster.rank()) * plan.rows;
    offset = (sample * plan.pixels + first_row) * plan.channels + first_channel;
  }

  // Calls body(channel, lane) with the first channel of each of this thread's vectors.
  template <class Body>
  __device__ void for_vectors(const Body& body) const {
    const int lane = threadIdx.x / plan.span;
    if (lane >= plan.lanes) return;
    for (int column = threadIdx.x % plan.span; column < plan.columns; column += plan.span)
      body(column * kVector, lane);
  }

  // Calls body(v, group) for each of the channels of a vector.
  template <class Body>
  __device__ void for_groups(int channel, const Body& body) const {
    int group = channel / plan.depth, inside = channel % plan.depth;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      body(v, group);
      if (++inside == plan.depth) {
        inside = 0;
        ++group;
      }
    }
  }

  // Begins to copy this thread's elements of all rows.
  __device__ void fetch(const T* from, T* to) const {
    for_vectors([&](int channel, int lane) {
      const T* source = from + offset + channel + lane * plan.channels;
      T* target = to + channel + lane * plan.width;
#pragma unroll 4
      for (int row = lane; row < rows; row += plan.lanes) {
        copy_async<kVector>(target, source);
        source += plan.lanes * plan.channels;
        target += plan.lanes * plan.width;
      }
    });
  }

  __device__ void fetch(ChannelVector parameter, float otherwise, float* to) const {
    for (int c = threadIdx.x; c < plan.width; c += blockDim.x) {
      const int64_t channel = first_channel + c;
      to[c] = parameter.data == nullptr ? otherwise
              : parameter.is_float32    ? static_cast<const float*>(parameter.data)[channel]
                                        : to_float(static_cast<const T*>(parameter.data)[channel]);
    }
  }

  // totals[s * width + c]: the sum over this block's rows of what `add` adds to sums[s] for channel
  // c. Called by all threads; there for all of them when it returns.
  template <int kSums, class Add>
  __device__ void sum_channels(float* partial, float* totals, const Add& add) const {
    const int lane = threadIdx.x / plan.span, place = threadIdx.x % plan.span;
    const int stride = kVector * plan.span;
    for (int first = 0; first < plan.columns; first += plan.span) {
      const int column = first + place;
      const bool works = lane < plan.lanes && column < plan.columns;
      float sums[kSums][kVector] = {};
      if (works) add(column * kVector, lane, sums);
      // Lanes of one warp, where a warp has some: a power of two then.
      for (int away = kWarp / 2; away * plan.lanes_in_warp >= kWarp; away /= 2) {
#pragma unroll
        for (int s = 0; s < kSums; ++s)
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            sums[s][v] += __shfl_xor_sync(kWholeWarp, sums[s][v], away);
      }
      if (works && lane % plan.lanes_in_warp == 0) {
        float* mine = partial + lane / plan.lanes_in_warp * stride + place;
#pragma unroll
        for (int s = 0; s < kSums; ++s)
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            mine[s * plan.partials * stride + v * plan.span] = sums[s][v];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kSums * stride; i += blockDim.x) {
        const int s = i / stride, at = i % stride;
        const int channel = (first + at % plan.span) * kVector + at / plan.span;
        if (channel >= plan.width) continue;
        float total = 0;
        for (int p = 0; p < plan.partials; ++p)
          total += partial[(s * plan.partials + p) * stride + at];
        totals[s * plan.width + channel] = total;
      }
      __syncthreads();
    }
  }

  // Calls body(group, sum of `values` over its channels) for each group, in one thread.
  template <class Body>
  __device__ void sum_groups(const float* values, const Body& body) const {
    const int lane = threadIdx.x % kWarp;
    for (int g = threadIdx.x / kWarp; g < plan.slice_groups(); g += blockDim.x / kWarp) {
      float sum = 0;
      for (int c = lane; c < plan.depth; c += kWarp) sum += values[g * plan.depth + c];
      sum = warp_sum(sum);
      if (lane == 0) body(g, sum);
    }
  }

  // The constants of a vector's channels.
  __device__ void affine(int channel, const Scratch& scratch, Affine (&of)[kVector]) const {
    for_groups(channel, [&](int v, int group) {
      const Normal normal = scratch.normal[group];
      of[v] = {normal.mean, normal.rstd * scratch.weight[channel + v], scratch.bias[channel + v]};
    });
  }

  // Chan, Golub and LeVeque: the moments of all blocks' rows of a group, merged in their order.
  __device__ Normal merge(const Moments* of_block, int group, float eps) const {
    float count = 0;
    Moments all = {0, 0};
    for (int rank = 0; rank < cluster.blocks(); ++rank) {
      const Moments part = cluster.of(rank, of_block)[group];
      const float more = static_cast<float>(plan.rows_of(rank)) * plan.depth;
      if (more == 0) break;
      const float away = part.mean - all.mean, share = more / (count + more);
      all.mean += away * share;
      all.deviations += part.deviations + away * away * count * share;
      count += more;
    }
    return {all.mean, 1 / sqrtf(all.deviations / count + eps)};
  }
};

template <class T, int kVector>
__global__ void __launch_bounds__(kMostThreads, 2)
    forward(const __grid_constant__ Plan plan, const T* __restrict__ input, ChannelVector weight,
            ChannelVector bias, float eps, bool relu, T* __restrict__ output,
            float* __restrict__ mean, float* __restrict__ rstd) {
  const Slice<T, kVector> slice(plan);
  T* const x = reinterpret_cast<T*>(shared_memory);
  const Scratch scratch(plan);
  slice.fetch(input, x);
  slice.fetch(weight, 1, scratch.weight);
  slice.fetch(bias, 0, scratch.bias);
  wait_for_copies();
  __syncthreads();

  // Sums about the group's first element: what all have in common costs no digits.
  const auto first_of = [&](int group) { return to_float(x[group * plan.depth]); };
  slice.template sum_channels<1>(
      scratch.partial, scratch.totals, [&](int channel, int lane, float (&sums)[1][kVector]) {
        if (lane >= slice.rows) return;
        float firsts[kVector];
        slice.for_groups(channel, [&](int v, int group) { firsts[v] = first_of(group); });
#pragma unroll 4
        for (int row = lane; row < slice.rows; row += plan.lanes) {
          float values[kVector];
          load<kVector>(x + row * plan.width + channel, values);
#pragma unroll
          for (int v = 0; v < kVector; ++v) sums[0][v] += values[v] - firsts[v];
        }
      });
  const float count = static_cast<float>(slice.rows) * plan.depth;
  slice.sum_groups(scratch.totals, [&](int group, float sum) {
    scratch.moments[group].mean = slice.rows == 0 ? 0 : first_of(group) + sum / count;
  });
  __syncthreads();
  slice.template sum_channels<1>(
      scratch.partial, scratch.totals, [&](int channel, int lane, float (&sums)[1][kVector]) {
        float means[kVector];
        slice.for_groups(channel,
                         [&](int v, int group) { means[v] = scratch.moments[group].mean; });
#pragma unroll 4
        for (int row = lane; row < slice.rows; row += plan.lanes) {
          float values[kVector];
          load<kVector>(x + row * plan.width + channel, values);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const float away = values[v] - means[v];
            sums[0][v] = fmaf(away, away, sums[0][v]);
          }
        }
      });
  slice.sum_groups(scratch.totals, [&](int group, float sum) {
    scratch.moments[group].deviations = sum;
  });
  slice.cluster.sync();

  for (int group = threadIdx.x; group < plan.slice_groups(); group += blockDim.x) {
    const Normal normal = slice.merge(scratch.moments, group, eps);
    scratch.normal[group] = normal;
    if (slice.cluster.rank() == 0) {
      const int64_t at = slice.sample * plan.groups + slice.first_channel / plan.depth + group;
      mean[at] = normal.mean;
      rstd[at] = normal.rstd;
    }
  }
  slice.cluster.arrive();
  __syncthreads();

  slice.for_vectors([&](int channel, int lane) {
    Affine of[kVector];
    slice.affine(channel, scratch, of);
    T* target = output + slice.offset + channel + lane * plan.channels;
#pragma unroll 4
    for (int row = lane; row < slice.rows; row += plan.lanes) {
      float values[kVector];
      load<kVector>(x + row * plan.width + channel, values);
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[v] = of[v].output(values[v], relu);
      store<kVector>(target, values);
      target += plan.lanes * plan.channels;
    }
  });
  slice.cluster.wait();
}

template <class T, int kVector>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    backward(const __grid_constant__ Plan plan, const T* __restrict__ grad_output,
             const T* __restrict__ input, const float* __restrict__ mean,
             const float* __restrict__ rstd, ChannelVector weight, ChannelVector bias, bool relu,
             const T* __restrict__ grad_skip, T* __restrict__ grad_input,
             float* __restrict__ weight_sums, float* __restrict__ bias_sums) {
  const Slice<T, kVector> slice(plan);
  T* const x = reinterpret_cast<T*>(shared_memory);
  T* const g = x + static_cast<int64_t>(plan.rows) * plan.width;
  const Scratch scratch(plan);
  slice.fetch(input, x);
  slice.fetch(grad_output, g);
  slice.fetch(weight, 1, scratch.weight);
  slice.fetch(bias, 0, scratch.bias);
  for (int group = threadIdx.x; group < plan.slice_groups(); group += blockDim.x) {
    const int64_t at = slice.sample * plan.groups + slice.first_channel / plan.depth + group;
    scratch.normal[group] = {mean[at], rstd[at]};
  }
  wait_for_copies();
  __syncthreads();

  // Of each channel: the sums of the gradient behind the ReLU, and of it times (x - mean).
  slice.template sum_channels<2>(
      scratch.partial, scratch.totals, [&](int channel, int lane, float (&sums)[2][kVector]) {
        Affine of[kVector];
        slice.affine(channel, scratch, of);
#pragma unroll 2
        for (int row = lane; row < slice.rows; row += plan.lanes) {
          float values[kVector], grads[kVector];
          load<kVector>(x + row * plan.width + channel, values);
          load<kVector>(g + row * plan.width + channel, grads);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const float active = of[v].active(values[v], grads[v], relu);
            sums[0][v] += active;
            sums[1][v] = fmaf(active, values[v] - of[v].mean, sums[1][v]);
          }
        }
      });
  slice.cluster.sync();

  for (int c = threadIdx.x; c < plan.width; c += blockDim.x) {
    float plain = 0, centred = 0;
    for (int rank = 0; rank < slice.cluster.blocks(); ++rank) {
      const float* totals = slice.cluster.of(rank, scratch.totals);
      plain += totals[c];
      centred += totals[plan.width + c];
    }
    scratch.weighted[c] = plain * scratch.weight[c];
    scratch.weighted[plan.width + c] = centred * scratch.weight[c];
    if (slice.cluster.rank() == 0) {
      const int64_t at = slice.sample * plan.channels + slice.first_channel + c;
      weight_sums[at] = centred * scratch.normal[c / plan.depth].rstd;
      bias_sums[at] = plain;
    }
  }
  slice.cluster.arrive();
  __syncthreads();

  const float count = static_cast<float>(plan.pixels) * plan.depth;
  slice.sum_groups(scratch.weighted, [&](int group, float sum) {
    scratch.slope[group].offset = -scratch.normal[group].rstd * (sum / count);
  });
  slice.sum_groups(scratch.weighted + plan.width, [&](int group, float sum) {
    const float r = scratch.normal[group].rstd;
    scratch.slope[group].slope = -r * r * (r * (sum / count));
  });
  __syncthreads();

  slice.for_vectors([&](int channel, int lane) {
    Affine of[kVector];
    slice.affine(channel, scratch, of);
    Slope line[kVector];
    slice.for_groups(channel, [&](int v, int group) { line[v] = scratch.slope[group]; });
    int64_t at = slice.offset + channel + lane * plan.channels;
#pragma unroll 2
    for (int row = lane; row < slice.rows; row += plan.lanes) {
      float values[kVector], grads[kVector], skip[kVector] = {};
      if (grad_skip != nullptr) load<kVector>(grad_skip + at, skip);
      load<kVector>(x + row * plan.width + channel, values);
      load<kVector>(g + row * plan.width + channel, grads);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float active = of[v].active(values[v], grads[v], relu);
        const float rest = fmaf(line[v].slope, values[v] - of[v].mean, line[v].offset);
        values[v] = fmaf(of[v].scale, active, rest) + skip[v];
      }
      store<kVector>(grad_input + at, values);
      at += plan.lanes * plan.channels;
    }
  });
  slice.cluster.wait();
}

// grad_weight and grad_bias from the sums (samples, channels): a warp's lanes take neighbouring
// channels, the warps of a block different samples.
constexpr int kReduceThreads = 1024;

__global__ void __launch_bounds__(kReduceThreads)
    reduce_samples(int64_t samples, int64_t channels, const float* __restrict__ weight_sums,
                   const float* __restrict__ bias_sums, float* __restrict__ grad_weight,
                   float* __restrict__ grad_bias) {
  const bool is_bias = blockIdx.x % 2 == 1;
  const float* sums = is_bias ? bias_sums : weight_sums;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x / 2) * kWarp + lane;
  float sum = 0;
  if (channel < channels)
    for (int64_t n = warp; n < samples; n += warps) sum += sums[n * channels + channel];
  float* of_warps = reinterpret_cast<float*>(shared_memory);
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  float total = 0;
  for (int w = 0; w < warps; ++w) total += of_warps[w * kWarp + lane];
  (is_bias ? grad_bias : grad_weight)[channel] = total;
}

// ---- launches

template <class Body>
const char* with_type(Element element, bool vectors, const Body& body) {
  switch (element) {
    case Element::kBFloat16: return vectors ? body.template operator()<__nv_bfloat16, 8>()
                                            : body.template operator()<__nv_bfloat16, 1>();
    case Element::kFloat16: return vectors ? body.template operator()<__half, 8>()
                                           : body.template operator()<__half, 1>();
    default: return vectors ? body.template operator()<float, 4>()
                            : body.template operator()<float, 1>();
  }
}

Grid grid_of(const Plan& plan) {
  return {plan.samples * plan.slices * plan.cluster, plan.threads, shared_bytes(plan),
          plan.cluster};
}

}  // namespace

extern "C" const char* bit_kernels_group_norm_relu_cut(const GroupNormShape* shape, bool backward,
                                                       int number, GroupNormCut* cut) {
  Device device;
  if (const char* wrong = in_words(device.read(number))) return wrong;
  Plan plan;
  if (const char* wrong = choose_plan(*shape, backward, true, device, &plan)) return wrong;
  const Grid grid = grid_of(plan);
  *cut = {plan.width,  plan.rows,    plan.width / plan.columns, grid.blocks, grid.threads,
          grid.shared, grid.cluster};
  return nullptr;
}

extern "C" const char* bit_kernels_group_norm_relu(const GroupNormForward* a, int number,
                                                   void* stream) {
  Device device;
  if (const char* wrong = in_words(device.read(number))) return wrong;
  Plan plan;
  const bool aligned = is_aligned(a->input) && is_aligned(a->output);
  if (const char* wrong = choose_plan(a->shape, false, aligned, device, &plan)) return wrong;
  return with_type(a->shape.element, plan.columns < plan.width, [&]<class T, int kVector>() {
    return launch(forward<T, kVector>, grid_of(plan), stream, plan,
                  static_cast<const T*>(a->input), a->weight, a->bias, a->eps, a->relu,
                  static_cast<T*>(a->output), a->mean, a->rstd);
  });
}

extern "C" const char* bit_kernels_group_norm_relu_backward(const GroupNormBackward* a,
                                                            int number, void* stream) {
  Device device;
  if (const char* wrong = in_words(device.read(number))) return wrong;
  Plan plan;
  const bool aligned = is_aligned(a->input) && is_aligned(a->grad_output) &&
                       is_aligned(a->grad_input) && is_aligned(a->grad_skip);
  if (const char* wrong = choose_plan(a->shape, true, aligned, device, &plan)) return wrong;
  float* const weight_sums = a->workspace;
  float* const bias_sums = a->workspace + plan.samples * plan.channels;
  const char* wrong =
      with_type(a->shape.element, plan.columns < plan.width, [&]<class T, int kVector>() {
        return launch(backward<T, kVector>, grid_of(plan), stream, plan,
                      static_cast<const T*>(a->grad_output), static_cast<const T*>(a->input),
                      a->mean, a->rstd, a->weight, a->bias, a->relu,
                      static_cast<const T*>(a->grad_skip), static_cast<T*>(a->grad_input),
                      weight_sums, bias_sums);
      });
  if (wrong != nullptr) return wrong;
  const Grid reduce = {2 * divide_up(plan.channels, kWarp), kReduceThreads,
                       int64_t{kReduceThreads} * 4};
  return launch(reduce_samples, reduce, stream, plan.samples, plan.channels, weight_sums, bias_sums,
                a->grad_weight, a->grad_bias);
}

}  // namespace bit_kernels
