// GroupNorm and ReLU on a CPU, forward and backward, in both memory layouts.
//
//   y = max(0, (x - mean) * rstd * weight + bias)       (the max only with relu)
//
// Statistics may be known beforehand: a residual sum takes those of its result as it passes.
//
// What is normalised together is read twice, the second time from cache where it fits: 2 passes
// over memory forward (read x, write y), 3 backward (read x and dy, write dx). The ReLU's mask is
// recomputed from x by the formula of the forward.
//
// Work is cut into chunks whose bounds depend on the shape alone, and chunks are combined in
// order, so that any number of threads gives the same bits. Threads take whole groups (samples
// in channels_last) as far as these divide evenly, and share the chunks of those that are left.
#pragma once

#include <type_traits>

#include "../common/parallel.h"
#include "../common/vec.h"
#include "../common/welford.h"
#include "kernels.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units that threads take whole; the rest is shared.
inline int64_t whole_units(int64_t units, bool parallel) {
  return parallel ? units - units % num_threads() : units;
}

// What outputs are cut at: 0 with the ReLU, nothing without.
struct Floor {
  Vec value;
  explicit Floor(bool relu) : value(broadcast(relu ? 0 : -kInfinity)) {}
};

// What the elements of one channel need: y = (x - mean) * scale + bias, cut at `floor`.
struct Affine {
  Vec mean, scale, bias, floor;
  Vec linear(Vec x) const { return multiply_add(x - mean, scale, bias); }
  Vec output(Vec x) const {
    Vec y = linear(x);
    return y < floor ? floor : y;  // a NaN stays
  }
  Vec active(Vec x, Vec gradient) const { return linear(x) <= floor ? Vec{} : gradient; }
};

// What turns the gradient of the output into that of the input.
struct Gradient {
  Affine affine;
  Vec slope, offset;  // dx = scale * g + slope * (x - mean) + offset
  Vec input(Vec x, Vec grad_output) const {
    Vec g = affine.active(x, grad_output);
    return multiply_add(affine.scale, g, multiply_add(slope, x - affine.mean, offset));
  }
};

// slope and offset of a group from sum(g * weight) and sum(g * weight * (x - mean)).
struct GroupGradient {
  float slope, offset;
  GroupGradient(double sum, double sum_centred, float rstd, double count)
      : slope(static_cast<float>(-rstd * double{rstd} * rstd * sum_centred / count)),
        offset(static_cast<float>(-rstd * sum / count)) {}
};

// ---- contiguous: a group is one run of memory, a channel a run of `pixels` in it

template <class T>
struct Contiguous {
  const GroupNormShape& shape;
  const int64_t width = shape.channels / shape.groups, size = width * shape.pixels;
  const int64_t ahead = elements_ahead<T>(size);

  // A channel of one sample: `channel` counts over all samples, `in_sample` within its own.
  struct Channel {
    int64_t channel, in_sample, group;
  };
  Channel channel_of(int64_t channel) const {
    return {channel, channel % shape.channels, channel / width};
  }
  template <class Body>
  void for_channels(int64_t group, const Body& body) const {
    const int64_t first = group * width, in_sample = group % shape.groups * width;
    for (int64_t c = 0; c < width; ++c) body(Channel{first + c, in_sample + c, group});
  }

  // A run of one channel's output.
  template <bool kStream>
  void apply(Channel c, int64_t begin, int64_t end, const T* x, const float* mean,
             const float* rstd, const float* weight, const float* bias, T* y) const {
    const Affine f = affine(c, mean, rstd, weight, bias, Floor(shape.relu));
    const T* in = x + c.channel * shape.pixels + begin;
    write_run<kStream>(y + c.channel * shape.pixels + begin, end - begin, [&](int64_t i, auto part) {
      prefetch(in + i + ahead);
      return f.output(part.load(in + i));
    });
  }

  // The output of the groups from `first` on, whose statistics are known.
  template <bool kStream>
  void apply_from(int64_t first, const T* x, const float* mean, const float* rstd,
                  const float* weight, const float* bias, T* y) const {
    const int64_t channels = (shape.samples * shape.groups - first) * width;
    const int64_t runs = divide_up(shape.pixels, kMomentsChunk);
    parallel_for(channels * runs, channels * shape.pixels >= kParallelElements,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t start = i % runs * kMomentsChunk;
                     apply<kStream>(channel_of(first * width + i / runs), start,
                                    minimum(start + kMomentsChunk, shape.pixels), x, mean, rstd,
                                    weight, bias, y);
                   }
                   if (kStream) finish_streaming();
                 });
  }

  // The statistics of the groups from `first` on. before(begin, end) is called for the elements
  // that are about to be read.
  template <class Before>
  void statistics_from(int64_t first, const T* x, double eps, float* mean, float* rstd,
                       const Before& before) const {
    const int64_t count = shape.samples * shape.groups - first;
    const int64_t chunks = divide_up(size, kMomentsChunk);
    Moments* part = new Moments[count * chunks];
    parallel_for(count * chunks, count * size >= kParallelElements,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t start = i % chunks * kMomentsChunk;
                     const int64_t at = (first + i / chunks) * size + start;
                     const int64_t n = minimum(kMomentsChunk, size - start);
                     before(at, at + n);
                     part[i] = chunk_moments(x + at, n);
                   }
                 });
    for (int64_t group = 0; group < count; ++group) {
      Moments all = {0, 0, 0};
      for (int64_t k = 0; k < chunks; ++k) all = merge(all, part[group * chunks + k]);
      mean[first + group] = static_cast<float>(all.mean);
      rstd[first + group] = reciprocal_root(all, eps);
    }
    delete[] part;
  }

  template <bool kStream>
  void forward(const T* x, const float* weight, const float* bias, double eps, T* y, float* mean,
               float* rstd) const {
    const int64_t groups = shape.samples * shape.groups;
    const bool parallel = groups * size >= kParallelElements;
    const int64_t whole = whole_units(groups, parallel);
    parallel_for(whole, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const Moments m = moments(x + group * size, size);
        mean[group] = static_cast<float>(m.mean);
        rstd[group] = reciprocal_root(m, eps);
        for_channels(group, [&](Channel c) {
          apply<kStream>(c, 0, shape.pixels, x, mean, rstd, weight, bias, y);
        });
      }
      if (kStream) finish_streaming();
    });
    if (whole == groups) return;
    statistics_from(whole, x, eps, mean, rstd, [](int64_t, int64_t) {});
    apply_from<kStream>(whole, x, mean, rstd, weight, bias, y);
  }

  // sum(g) and sum(g * (x - mean)) over a run.
  struct Sums {
    double plain, centred;
    void operator+=(Sums other) {
      plain += other.plain;
      centred += other.centred;
    }
  };
  static Sums sums(const Affine& f, const T* x, const T* dy, int64_t n) {
    constexpr int kUnroll = 4;
    Vec plain[kUnroll] = {}, centred[kUnroll] = {};
    auto add = [&](int u, Vec input, Vec grad) {
      Vec g = f.active(input, grad);
      plain[u] += g;
      centred[u] = multiply_add(g, input - f.mean, centred[u]);
    };
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes)
      for (int u = 0; u < kUnroll; ++u) add(u, load(x + i + u * kLanes), load(dy + i + u * kLanes));
    for (; i + kLanes <= n; i += kLanes) add(0, load(x + i), load(dy + i));
    // Lanes past the end, or counted before, carry no gradient.
    if (i < n && n >= kLanes)
      add(1, load(x + n - kLanes), last_lanes(load(dy + n - kLanes), n - i));
    else if (i < n)
      add(1, load_first(x + i, n - i), load_first(dy + i, n - i));
    return {sum_lanes((plain[0] + plain[1]) + (plain[2] + plain[3])),
            sum_lanes((centred[0] + centred[1]) + (centred[2] + centred[3]))};
  }

  // sums: (samples, 2, channels), sum(g) and sum(g * (x - mean)) of each channel.
  template <bool kStream, bool kSkip>
  void backward(const T* dy, const T* x, const float* mean, const float* rstd,
                const float* weight, const float* bias, const T* skip, T* dx,
                double* channel_sums) const {
    const int64_t runs = divide_up(shape.pixels, kMomentsChunk);
    const Floor floor(shape.relu);
    auto run_sums = [&](Channel c, int64_t run) {
      const int64_t start = run * kMomentsChunk, at = c.channel * shape.pixels + start;
      return sums(affine(c, mean, rstd, weight, bias, floor), x + at, dy + at,
                  minimum(kMomentsChunk, shape.pixels - start));
    };
    auto keep = [&](Channel c, Sums all) {
      double* out = channel_sums + (c.channel - c.in_sample) * 2 + c.in_sample;
      out[0] = all.plain;
      out[shape.channels] = all.centred;
    };
    auto group_gradient = [&](int64_t group) {
      double plain = 0, centred = 0;
      const int64_t first = group % shape.groups * width;
      const double* in = channel_sums + group / shape.groups * 2 * shape.channels;
      for (int64_t c = first; c < first + width; ++c) {
        plain += in[c] * weight[c];
        centred += in[c + shape.channels] * weight[c];
      }
      return GroupGradient(plain, centred, rstd[group], static_cast<double>(size));
    };
    auto apply = [&](Channel c, const GroupGradient& of_group, int64_t begin, int64_t end) {
      const int64_t at = c.channel * shape.pixels + begin;
      const Gradient f = {affine(c, mean, rstd, weight, bias, floor), broadcast(of_group.slope),
                          broadcast(of_group.offset)};
      write_run<kStream>(dx + at, end - begin, [&](int64_t i, auto part) {
        prefetch(x + at + i + ahead);
        prefetch(dy + at + i + ahead);
        const Vec g = f.input(part.load(x + at + i), part.load(dy + at + i));
        return kSkip ? g + part.load(skip + at + i) : g;
      });
    };

    const int64_t groups = shape.samples * shape.groups;
    const bool parallel = groups * size >= kParallelElements;
    const int64_t whole = whole_units(groups, parallel);
    parallel_for(whole, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        for_channels(group, [&](Channel c) {
          Sums all = {0, 0};
          for (int64_t run = 0; run < runs; ++run) all += run_sums(c, run);
          keep(c, all);
        });
        const GroupGradient of_group = group_gradient(group);
        for_channels(group, [&](Channel c) { apply(c, of_group, 0, shape.pixels); });
      }
      if (kStream) finish_streaming();
    });

    const int64_t first = whole * width, rest = (groups - whole) * width;
    if (rest == 0) return;
    Sums* part = new Sums[rest * runs];
    parallel_for(rest * runs, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        part[i] = run_sums(channel_of(first + i / runs), i % runs);
    });
    for (int64_t c = 0; c < rest; ++c) {
      Sums all = {0, 0};
      for (int64_t run = 0; run < runs; ++run) all += part[c * runs + run];
      keep(channel_of(first + c), all);
    }
    delete[] part;
    parallel_for(rest * runs, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Channel c = channel_of(first + i / runs);
        const int64_t start = i % runs * kMomentsChunk;
        apply(c, group_gradient(c.group), start, minimum(start + kMomentsChunk, shape.pixels));
      }
      if (kStream) finish_streaming();
    });
  }

 private:
  static Affine affine(Channel c, const float* mean, const float* rstd, const float* weight,
                       const float* bias, Floor floor) {
    return {broadcast(mean[c.group]), broadcast(rstd[c.group] * weight[c.in_sample]),
            broadcast(bias[c.in_sample]), floor.value};
  }
};

// ---- channels_last: a pixel is one run of memory, read in rows of all channels

template <class T>
struct ChannelsLast {
  const GroupNormShape& shape;
  const int64_t channels = shape.channels, width = channels / shape.groups;
  const int64_t chunk = chunk_pixels(), chunks = divide_up(shape.pixels, chunk);

  int64_t chunk_pixels() const {
    const int64_t pixels = 32768 / channels;
    return pixels < 64 ? 64 : pixels > 256 ? 256 : pixels;
  }
  int64_t chunk_size(int64_t k) const { return minimum(chunk, shape.pixels - k * chunk); }

  // body(channel, part, element) along `pixels` rows. Row by row: memory is read in order, and
  // several rows at once would share cache sets, being a power of two apart.
  template <class Body>
  void walk(int64_t pixels, const Body& body) const {
    for (int64_t p = 0; p < pixels; ++p)
      for_vectors(channels, [&](int64_t c, auto part) { body(c, part, p * channels + c); });
  }

  // total = the sum over `pixels` rows of two numbers a channel, body(channel, part, element)
  // giving both. A few rows are summed at a time: float32 sums of long rows drift.
  template <class Body>
  void sum_rows(int64_t pixels, float* block, float* total, const Body& body) const {
    constexpr int64_t kBlock = 16;
    zero(total);
    for (int64_t first = 0; first < pixels; first += kBlock) {
      zero(block);
      walk(minimum(kBlock, pixels - first), [&](int64_t c, auto part, int64_t i) {
        const Pair pair = body(c, part, first * channels + i);
        part.template store<false>(block + c, part.load(block + c) + pair.first);
        part.template store<false>(block + channels + c,
                                   part.load(block + channels + c) + pair.second);
      });
      add(block, total);
    }
  }
  struct Pair {
    Vec first, second;
  };
  template <class Number>
  void zero(Number* sums) const {
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  }
  template <class Number>
  void add(const float* sums, Number* total) const {
    for (int64_t c = 0; c < 2 * channels; ++c) total[c] += sums[c];
  }

  // out: one Moments a group. scratch: 5 * channels.
  void chunk_moments_of(const T* x, int64_t pixels, float* scratch, Moments* out) const {
    float *shift = scratch, *sum = shift + channels, *squares = sum + channels;
    // About a mean of four pixels, so that one that stands out does not cost the others' digits.
    const int64_t step = pixels / 4 * channels;
    for_vectors(channels, [&](int64_t c, auto part) {
      const Vec two = part.load(x + c) + part.load(x + c + step);
      const Vec other_two = part.load(x + c + 2 * step) + part.load(x + c + 3 * step);
      part.template store<false>(shift + c, (two + other_two) * broadcast(0.25f));
    });
    sum_rows(pixels, squares + channels, sum, [&](int64_t c, auto part, int64_t i) {
      const Vec d = part.load(x + i) - part.load(shift + c);
      return Pair{d, d * d};
    });
    const Vec per_pixel = broadcast(1.0f / pixels);
    for_vectors(channels, [&](int64_t c, auto part) {
      const Vec s = part.load(sum + c), offset = s * per_pixel;
      part.template store<false>(shift + c, part.load(shift + c) + offset);
      part.template store<false>(squares + c, relu(part.load(squares + c) - s * offset));
    });
    for (int64_t g = 0; g < shape.groups; ++g) {
      const float *means = shift + g * width, *deviations = squares + g * width;
      const float mean = sum_run(means, [](auto v) { return v; }) / width;
      const float within = sum_run(deviations, [](auto v) { return v; });
      const float between = sum_run(means, [mean](auto v) { return (v - mean) * (v - mean); });
      out[g] = {double(pixels * width), mean, double{within} + double(pixels) * between};
    }
  }

  // The sum of f(value) over the channels of a group.
  template <class F>
  float sum_run(const float* values, const F& f) const {
    int64_t i = 0;
    float sum = 0;
    if (width >= kLanes) {
      Vec sums{};
      for (; i + kLanes <= width; i += kLanes) sums += f(load(values + i));
      sum = sum_lanes(sums);
    }
    for (; i < width; ++i) sum += f(values[i]);
    return sum;
  }

  // parameters: mean, scale, bias of each channel of one sample (then slope and offset).
  void fill_affine(const float* mean, const float* rstd, const float* weight, const float* bias,
                   float* parameters) const {
    for (int64_t g = 0; g < shape.groups; ++g)
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        parameters[c] = mean[g];
        parameters[channels + c] = rstd[g] * weight[c];
        parameters[2 * channels + c] = bias[c];
      }
  }
  template <class P>
  Affine affine(const float* parameters, int64_t c, P part, Floor floor) const {
    return {part.load(parameters + c), part.load(parameters + channels + c),
            part.load(parameters + 2 * channels + c), floor.value};
  }

  // The output of chunk k of sample n.
  template <bool kStream>
  void apply(int64_t n, int64_t k, const T* x, const float* parameters, T* y) const {
    const Floor floor(shape.relu);
    const int64_t at = (n * shape.pixels + k * chunk) * channels;
    walk(chunk_size(k), [&](int64_t c, auto part, int64_t i) {
      const Affine f = affine(parameters, c, part, floor);
      part.template store<kStream>(y + at + i, f.output(part.load(x + at + i)));
    });
  }

  // The output of the samples from `first` on, whose statistics are known.
  template <bool kStream>
  void apply_from(int64_t first, const T* x, const float* mean, const float* rstd,
                  const float* weight, const float* bias, T* y) const {
    const int64_t count = (shape.samples - first) * chunks;
    const bool parallel = (shape.samples - first) * channels * shape.pixels >= kParallelElements;
    parallel_for(count, parallel, [&](int64_t begin, int64_t end) {
      Scratch parameters(3 * channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i / chunks;
        if (i == begin || i % chunks == 0)
          fill_affine(mean + n * shape.groups, rstd + n * shape.groups, weight, bias,
                      parameters.data);
        apply<kStream>(n, i % chunks, x, parameters.data, y);
      }
      if (kStream) finish_streaming();
    });
  }

  // part: one Moments a group for each chunk of a sample.
  void combine(const Moments* part, double eps, float* mean, float* rstd) const {
    for (int64_t g = 0; g < shape.groups; ++g) {
      Moments all = {0, 0, 0};
      for (int64_t k = 0; k < chunks; ++k) all = merge(all, part[k * shape.groups + g]);
      mean[g] = static_cast<float>(all.mean);
      rstd[g] = reciprocal_root(all, eps);
    }
  }

  // The statistics of the samples from `first` on. before(begin, end) is called for the elements
  // that are about to be read.
  template <class Before>
  void statistics_from(int64_t first, const T* x, double eps, float* mean, float* rstd,
                       const Before& before) const {
    const int64_t count = shape.samples - first, groups = shape.groups;
    Moments* part = new Moments[count * chunks * groups];
    parallel_for(count * chunks, count * channels * shape.pixels >= kParallelElements,
                 [&](int64_t begin, int64_t end) {
                   Scratch scratch(5 * channels);
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t n = first + i / chunks, k = i % chunks;
                     const int64_t at = (n * shape.pixels + k * chunk) * channels;
                     before(at, at + chunk_size(k) * channels);
                     chunk_moments_of(x + at, chunk_size(k), scratch.data, part + i * groups);
                   }
                 });
    for (int64_t n = 0; n < count; ++n)
      combine(part + n * chunks * groups, eps, mean + (first + n) * groups,
              rstd + (first + n) * groups);
    delete[] part;
  }

  template <bool kStream>
  void forward(const T* x, const float* weight, const float* bias, double eps, T* y, float* mean,
               float* rstd) const {
    const int64_t sample_size = channels * shape.pixels, groups = shape.groups;
    const bool parallel = shape.samples * sample_size >= kParallelElements;
    const int64_t whole = whole_units(shape.samples, parallel);
    parallel_for(whole, parallel, [&](int64_t begin, int64_t end) {
      Scratch scratch(5 * channels);
      Moments* part = new Moments[chunks * groups];
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t k = 0; k < chunks; ++k)
          chunk_moments_of(x + n * sample_size + k * chunk * channels, chunk_size(k),
                           scratch.data, part + k * groups);
        combine(part, eps, mean + n * groups, rstd + n * groups);
        fill_affine(mean + n * groups, rstd + n * groups, weight, bias, scratch.data);
        // Backwards: what was read last is still in the cache.
        for (int64_t k = chunks - 1; k >= 0; --k) apply<kStream>(n, k, x, scratch.data, y);
      }
      delete[] part;
      if (kStream) finish_streaming();
    });
    if (whole == shape.samples) return;
    statistics_from(whole, x, eps, mean, rstd, [](int64_t, int64_t) {});
    apply_from<kStream>(whole, x, mean, rstd, weight, bias, y);
  }

  // total: 2 * channels, sum(g) and sum(g * (x - mean)) over the pixels of a chunk.
  void chunk_sums(const T* x, const T* dy, int64_t pixels, const float* parameters, float* block,
                  float* total) const {
    const Floor floor(shape.relu);
    sum_rows(pixels, block, total, [&](int64_t c, auto part, int64_t i) {
      const Affine f = affine(parameters, c, part, floor);
      const Vec input = part.load(x + i), g = f.active(input, part.load(dy + i));
      return Pair{g, g * (input - f.mean)};
    });
  }

  template <bool kStream, bool kSkip>
  void backward(const T* dy, const T* x, const float* mean, const float* rstd,
                const float* weight, const float* bias, const T* skip, T* dx,
                double* channel_sums) const {
    const int64_t sample_size = channels * shape.pixels, groups = shape.groups;
    const Floor floor(shape.relu);
    // parameters: 5 * channels; the last two of them are filled here.
    auto fill_gradient = [&](int64_t n, float* parameters) {
      const double *plain = channel_sums + n * 2 * channels, *centred = plain + channels;
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0, sum_centred = 0;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          sum += plain[c] * weight[c];
          sum_centred += centred[c] * weight[c];
        }
        const GroupGradient of_group(sum, sum_centred, rstd[n * groups + g],
                                     static_cast<double>(width * shape.pixels));
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          parameters[3 * channels + c] = of_group.slope;
          parameters[4 * channels + c] = of_group.offset;
        }
      }
    };
    auto apply = [&](int64_t n, int64_t k, const float* parameters) {
      const int64_t at = n * sample_size + k * chunk * channels;
      walk(chunk_size(k), [&](int64_t c, auto part, int64_t i) {
        const Gradient f = {affine(parameters, c, part, floor),
                            part.load(parameters + 3 * channels + c),
                            part.load(parameters + 4 * channels + c)};
        const Vec g = f.input(part.load(x + at + i), part.load(dy + at + i));
        part.template store<kStream>(dx + at + i, kSkip ? g + part.load(skip + at + i) : g);
      });
    };

    const bool parallel = shape.samples * sample_size >= kParallelElements;
    const int64_t whole = whole_units(shape.samples, parallel);
    parallel_for(whole, parallel, [&](int64_t begin, int64_t end) {
      Scratch parameters(5 * channels), block(2 * channels), sums(2 * channels);
      for (int64_t n = begin; n < end; ++n) {
        double* total = channel_sums + n * 2 * channels;
        fill_affine(mean + n * groups, rstd + n * groups, weight, bias, parameters.data);
        zero(total);
        for (int64_t k = 0; k < chunks; ++k) {
          const int64_t at = n * sample_size + k * chunk * channels;
          chunk_sums(x + at, dy + at, chunk_size(k), parameters.data, block.data, sums.data);
          add(sums.data, total);
        }
        fill_gradient(n, parameters.data);
        for (int64_t k = chunks - 1; k >= 0; --k) apply(n, k, parameters.data);
      }
      if (kStream) finish_streaming();
    });

    const int64_t rest = shape.samples - whole;
    if (rest == 0) return;
    Scratch sums(rest * chunks * 2 * channels);
    parallel_for(rest * chunks, parallel, [&](int64_t begin, int64_t end) {
      Scratch parameters(3 * channels), block(2 * channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = whole + i / chunks;
        const int64_t at = n * sample_size + i % chunks * chunk * channels;
        if (i == begin || i % chunks == 0)
          fill_affine(mean + n * groups, rstd + n * groups, weight, bias, parameters.data);
        chunk_sums(x + at, dy + at, chunk_size(i % chunks), parameters.data, block.data,
                   sums.data + i * 2 * channels);
      }
    });
    for (int64_t n = whole; n < shape.samples; ++n) {
      zero(channel_sums + n * 2 * channels);
      for (int64_t k = 0; k < chunks; ++k)
        add(sums.data + ((n - whole) * chunks + k) * 2 * channels, channel_sums + n * 2 * channels);
    }
    parallel_for(rest * chunks, parallel, [&](int64_t begin, int64_t end) {
      Scratch parameters(5 * channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = whole + i / chunks;
        if (i == begin || i % chunks == 0) {
          fill_affine(mean + n * groups, rstd + n * groups, weight, bias, parameters.data);
          fill_gradient(n, parameters.data);
        }
        apply(n, i % chunks, parameters.data);
      }
      if (kStream) finish_streaming();
    });
  }
};

// ---- entry points

// Whether the output is streamed. A line that is streamed in part and stored in part is written
// twice, so runs must be whole lines, or so long that their ends don't matter.
template <class T>
bool streams(const GroupNormShape& shape, const T* output) {
  const int64_t size = shape.samples * shape.channels * shape.pixels * sizeof(T);
  const int64_t run = (shape.channels_last ? shape.channels : shape.pixels) * sizeof(T);
  if (size < kStreamBytes) return false;
  if (run % kLineBytes == 0 && to_line(output) == 0) return true;
  return !shape.channels_last && run >= 128 * kLineBytes;
}

// Calls body(kernel, stream) with the kernel of the shape's layout and whether it streams.
template <class T, class Body>
void with_kernel(const GroupNormShape& shape, const T* output, const Body& body) {
  auto run = [&](auto kernel) {
    if (streams(shape, output))
      body(kernel, std::true_type{});
    else
      body(kernel, std::false_type{});
  };
  shape.channels_last ? run(ChannelsLast<T>{shape}) : run(Contiguous<T>{shape});
}

template <class T>
void add_run(T* total, const T* part, int64_t n) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    lanes.template store<false>(total + i, lanes.load(total + i) + lanes.load(part + i));
  });
}

// The gains' and biases' gradients from the sums of each channel of each sample.
void sum_samples(const GroupNormShape& shape, const double* sums, const float* rstd,
                 float* grad_weight, float* grad_bias) {
  const int64_t channels = shape.channels, width = channels / shape.groups;
  const bool parallel = shape.samples * 2 * channels >= kParallelElements;
  parallel_for(channels, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t group = c / width;
      double weight_sum = 0, bias_sum = 0;
      for (int64_t n = 0; n < shape.samples; ++n) {
        const double *plain = sums + n * 2 * channels, *centred = plain + channels;
        bias_sum += plain[c];
        weight_sum += centred[c] * rstd[n * shape.groups + group];
      }
      grad_weight[c] = static_cast<float>(weight_sum);
      grad_bias[c] = static_cast<float>(bias_sum);
    }
  });
}

}  // namespace

void group_norm_relu(const GroupNormShape& shape, Element element, const void* input,
                     const float* weight, const float* bias, double eps, void* output,
                     float* mean, float* rstd) {
  with_element(element, [&](auto of) {
    using T = typename decltype(of)::type;
    const T* x = static_cast<const T*>(input);
    T* y = static_cast<T*>(output);
    with_kernel(shape, y, [&](auto kernel, auto stream) {
      kernel.template forward<stream>(x, weight, bias, eps, y, mean, rstd);
    });
  });
}

void group_norm_relu_apply(const GroupNormShape& shape, Element element, const void* input,
                           const float* mean, const float* rstd, const float* weight,
                           const float* bias, void* output) {
  with_element(element, [&](auto of) {
    using T = typename decltype(of)::type;
    const T* x = static_cast<const T*>(input);
    T* y = static_cast<T*>(output);
    with_kernel(shape, y, [&](auto kernel, auto stream) {
      kernel.template apply_from<stream>(0, x, mean, rstd, weight, bias, y);
    });
  });
}

void add(int64_t count, Element element, void* total, const void* part) {
  with_element(element, [&](auto of) {
    using T = typename decltype(of)::type;
    parallel_for(count, count >= kParallelElements, [&](int64_t begin, int64_t end) {
      add_run(static_cast<T*>(total) + begin, static_cast<const T*>(part) + begin, end - begin);
    });
  });
}

void add_group_statistics(const GroupNormShape& shape, Element element, void* input,
                          const void* other, double eps, float* mean, float* rstd) {
  with_element(element, [&](auto of) {
    using T = typename decltype(of)::type;
    T* x = static_cast<T*>(input);
    auto sum = [&](int64_t begin, int64_t end) {
      add_run(x + begin, static_cast<const T*>(other) + begin, end - begin);
    };
    if (shape.channels_last)
      ChannelsLast<T>{shape}.statistics_from(0, x, eps, mean, rstd, sum);
    else
      Contiguous<T>{shape}.statistics_from(0, x, eps, mean, rstd, sum);
  });
}

void group_norm_relu_backward(const GroupNormShape& shape, Element element,
                              const void* grad_output, const void* input, const float* mean,
                              const float* rstd, const float* weight, const float* bias,
                              const void* grad_skip, void* grad_input, float* grad_weight,
                              float* grad_bias) {
  double* sums = new double[shape.samples * 2 * shape.channels];
  with_element(element, [&](auto of) {
    using T = typename decltype(of)::type;
    const T *dy = static_cast<const T*>(grad_output), *x = static_cast<const T*>(input);
    const T* skip = static_cast<const T*>(grad_skip);
    T* dx = static_cast<T*>(grad_input);
    with_kernel(shape, dx, [&](auto kernel, auto stream) {
      if (skip != nullptr)
        kernel.template backward<stream, true>(dy, x, mean, rstd, weight, bias, skip, dx, sums);
      else
        kernel.template backward<stream, false>(dy, x, mean, rstd, weight, bias, skip, dx, sums);
    });
  });
  sum_samples(shape, sums, rstd, grad_weight, grad_bias);
  delete[] sums;
}

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
