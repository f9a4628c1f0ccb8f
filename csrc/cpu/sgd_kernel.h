// One step of SGD over many tensors on a CPU, with the backward of weight standardization before it
// and the new standardized weights behind it.
//
// A tensor that is standardized is rows of memory, one an output channel. Its row is read once:
//   sums of the row          -> mean, rstd, mean(g), mean(g * wh)
//   projection, decay, momentum, the new weight and momentum
//   statistics of the new row, and the row standardized
// and stays in cache between these. Others are cut into lines, which need no sums.
//
// Memory passes: read g, w and m; write w, m and the standardized weight, nothing more.
#pragma once

#include "../common/parallel.h"
#include "../common/vec.h"
#include "../common/welford.h"
#include "kernels.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {
namespace {

// Calls body(tensor's number, first row, last row) so that each thread gets equally many elements
// of all tensors together: the rows that begin in its share of them.
template <class Body>
void for_rows(const SgdTensor* tensors, int64_t count, const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) total += tensors[t].elements;
  parallel_for(total, total >= kParallelElements, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (int64_t t = 0; t < count && offset < end; ++t) {
      const int64_t elements = tensors[t].elements, columns = tensors[t].columns;
      auto first_row_from = [&](int64_t element) {
        const int64_t inside = element < 0 ? 0 : element < elements ? element : elements;
        return (inside + columns - 1) / columns;
      };
      if (offset + elements > begin)
        body(t, first_row_from(begin - offset), first_row_from(end - offset));
      offset += elements;
    }
  });
}

// What the backward of standardization needs of one row: moments of w, the sum of g, and the sum of
// g * (w - mean).
struct RowSums {
  Moments moments;
  double plain, centred;
};

inline RowSums merge(const RowSums& a, const RowSums& b) {
  if (a.moments.count == 0) return b;
  const Moments m = merge(a.moments, b.moments);
  return {m, a.plain + b.plain,
          a.centred + (a.moments.mean - m.mean) * a.plain + b.centred +
              (b.moments.mean - m.mean) * b.plain};
}

// As chunk_moments in common/welford.h: sums about a shift near the mean, exact to few roundings.
inline RowSums chunk_sums(const float* g, const float* w, int64_t n) {
  constexpr int kUnroll = 2;
  const int64_t first = n < 4 * kLanes ? n : 4 * kLanes;
  Vec head{};
  for_vectors(first, [&](int64_t i, auto part) { head += part.load(w + i); });
  const float shift = sum_lanes(head) / first;
  const Vec shifts = broadcast(shift);
  Vec sum[kUnroll] = {}, squares[kUnroll] = {}, plain[kUnroll] = {}, centred[kUnroll] = {};
  auto add = [&](int u, Vec gradient, Vec d) {
    sum[u] += d;
    squares[u] = multiply_add(d, d, squares[u]);
    plain[u] += gradient;
    centred[u] = multiply_add(gradient, d, centred[u]);
  };
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u)
      add(u, load(g + i + u * kLanes), load(w + i + u * kLanes) - shifts);
  }
  for (; i + kLanes <= n; i += kLanes) add(0, load(g + i), load(w + i) - shifts);
  if (i < n) add(0, load_first(g + i, n - i), load_first(w + i, n - i, shift) - shifts);
  const float s = sum_lanes(sum[0] + sum[1]), q = sum_lanes(squares[0] + squares[1]);
  const double total = sum_lanes(plain[0] + plain[1]), offset = double{s} / n;
  const double deviations = q - s * offset;
  return {{static_cast<double>(n), shift + offset, deviations < 0 ? 0 : deviations},
          total,
          sum_lanes(centred[0] + centred[1]) - offset * total};
}

// The gradient of the raw weight, from that of the standardized one:
//   rstd * (g - mean(g)) - rstd^3 * mean(g * (w - mean)) * (w - mean)
struct Projection {
  Vec shift, scale, slope, mean_gradient;

  Vec operator()(Vec gradient, Vec weight) const {
    return multiply_add(scale, gradient - mean_gradient, slope * (weight - shift));
  }
};

inline Projection projection(const float* g, const float* w, int64_t columns, double eps) {
  RowSums all = {};
  for (int64_t i = 0; i < columns; i += kMomentsChunk)
    all = merge(all, chunk_sums(g + i, w + i,
                                columns - i < kMomentsChunk ? columns - i : kMomentsChunk));
  const double rstd = reciprocal_root(all.moments, eps);
  return {broadcast(static_cast<float>(all.moments.mean)), broadcast(static_cast<float>(rstd)),
          broadcast(static_cast<float>(-rstd * rstd * rstd * all.centred / columns)),
          broadcast(static_cast<float>(all.plain / columns))};
}

struct AsItIs {
  Vec operator()(Vec gradient, Vec) const { return gradient; }
};

// torch.optim.SGD's rule, on vectors.
struct Rule {
  bool decays, maximize, nesterov, fresh;
  Vec decay, momentum, taken, rate;

  explicit Rule(const SgdOptions& options)
      : decays(options.weight_decay != 0),
        maximize(options.maximize),
        nesterov(options.nesterov),
        fresh(options.fresh),
        decay(broadcast(static_cast<float>(options.weight_decay))),
        momentum(broadcast(static_cast<float>(options.momentum))),
        taken(broadcast(static_cast<float>(1 - options.dampening))),
        rate(broadcast(static_cast<float>(-options.lr))) {}
};

// How far ahead memory is asked for where there are no rows, in elements.
constexpr int64_t kLinesAhead = 512;

// `n` elements, their gradients as `project` makes them. Memory is asked for those `ahead`.
template <class Project>
void update(const float* g, float* w, float* m, int64_t n, int64_t ahead, Rule rule,
            const Project project) {
  auto one = [=](int64_t i, auto part) {
    const Vec weight = part.load(w + i);
    Vec step = project(part.load(g + i), weight);
    if (rule.maximize) step = -step;
    if (rule.decays) step = multiply_add(rule.decay, weight, step);
    if (m != nullptr) {
      Vec velocity = step;
      if (!rule.fresh)
        velocity = multiply_add(rule.momentum, part.load(m + i), rule.taken * step);
      part.template store<false>(m + i, velocity);
      step = rule.nesterov ? multiply_add(rule.momentum, velocity, step) : velocity;
    }
    part.template store<false>(w + i, multiply_add(rule.rate, step, weight));
  };
  constexpr int64_t kLine = kLineBytes / sizeof(float);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch(g + i + ahead);
    prefetch(w + i + ahead);
    for (int64_t k = 0; k < kLine; k += kLanes) one(i + k, Whole{});
  }
  for_vectors(n - i, [&](int64_t k, auto part) { one(i + k, part); });
}

// Rows go through each stage a few at a time: what a stage needs of one row, some sums and a root,
// is then computed while the next row's loads are on their way. While one block is in cache, memory
// is asked for the next: gradients and weights by the update, momenta by the last stage.
constexpr int64_t kBlockRows = 16, kBlockElements = 2048;

template <bool kStream, class T>
void step_rows(const SgdTensor& tensor, int64_t begin, int64_t end, const SgdOptions& options) {
  const int64_t columns = tensor.columns;
  const int64_t fitting = columns < kBlockElements ? kBlockElements / columns : 1;
  const int64_t block = fitting < kBlockRows ? fitting : kBlockRows;
  const int64_t ahead = columns <= 4 * kBlockElements ? block * columns : 0;
  const Rule rule(options);
  float* const momentum = tensor.momentum;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t rows = end - from < block ? end - from : block;
    const float* g = tensor.gradient + from * columns;
    float* w = tensor.weight + from * columns;
    float* m = momentum == nullptr ? nullptr : momentum + from * columns;
    T* standardized = static_cast<T*>(tensor.standardized) + from * columns;
    if (options.project) {
      Projection projections[kBlockRows];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * columns;
        projections[r] = projection(g + at, w + at, columns, options.eps);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * columns;
        update(g + at, w + at, m == nullptr ? nullptr : m + at, columns, ahead, rule,
               projections[r]);
      }
    } else {
      update(g, w, m, rows * columns, ahead, rule, AsItIs{});
    }
    // The same steps as standardize_weight's, to the same bits.
    float shift[kBlockRows], scale[kBlockRows];
    for (int64_t r = 0; r < rows; ++r) {
      const Moments now = moments(w + r * columns, columns);
      shift[r] = static_cast<float>(now.mean);
      scale[r] = reciprocal_root(now, options.eps);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Vec shifts = broadcast(shift[r]), scales = broadcast(scale[r]);
      const float* row = w + r * columns;
      const float* next = (m == nullptr ? w : m) + r * columns + ahead;
      write_run<kStream>(standardized + r * columns, columns, [&](int64_t i, auto part) {
        prefetch(next + i);
        return (part.load(row + i) - shifts) * scales;
      });
    }
  }
  if (kStream) finish_streaming();
}

}  // namespace

void sgd(const SgdTensor* tensors, int64_t count, Element standardized,
         const SgdOptions& options) {
  with_element(standardized, [&](auto of) {
    using T = typename decltype(of)::type;
    int64_t written = 0;
    for (int64_t t = 0; t < count; ++t)
      if (tensors[t].standardized != nullptr) written += tensors[t].elements * sizeof(T);
    for_rows(tensors, count, [&](int64_t t, int64_t begin, int64_t end) {
      const SgdTensor& tensor = tensors[t];
      if (tensor.standardized == nullptr) {
        const int64_t first = begin * tensor.columns;
        const int64_t last = end * tensor.columns;
        update(tensor.gradient + first, tensor.weight + first,
               tensor.momentum == nullptr ? nullptr : tensor.momentum + first,
               (last < tensor.elements ? last : tensor.elements) - first, kLinesAhead,
               Rule(options), AsItIs{});
        return;
      }
      const bool whole_lines = tensor.columns * sizeof(T) % kLineBytes == 0 &&
                               to_line(static_cast<T*>(tensor.standardized)) == 0;
      const auto run = written >= kStreamBytes && whole_lines ? step_rows<true, T>
                                                              : step_rows<false, T>;
      run(tensor, begin, end, options);
    });
  });
}

void sgd_gradient_squares(const SgdTensor* tensors, int64_t count, double eps,
                          double* const* squares) {
  for_rows(tensors, count, [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t columns = tensors[t].columns;
    for (int64_t row = begin; row < end; ++row) {
      const float* g = tensors[t].gradient + row * columns;
      const float* w = tensors[t].weight + row * columns;
      const Projection project = projection(g, w, columns, eps);
      double sum = 0;
      for (int64_t at = 0; at < columns; at += kMomentsChunk) {
        const int64_t end_of_chunk = columns - at < kMomentsChunk ? columns : at + kMomentsChunk;
        Vec chunk{};
        int64_t i = at;
        for (; i + kLanes <= end_of_chunk; i += kLanes) {
          const Vec gradient = project(load(g + i), load(w + i));
          chunk = multiply_add(gradient, gradient, chunk);
        }
        if (i < end_of_chunk) {  // lanes beyond the row are filled with what is projected to 0
          const int64_t left = end_of_chunk - i;
          const Vec gradient = project(load_first(g + i, left, project.mean_gradient[0]),
                                       load_first(w + i, left, project.shift[0]));
          chunk = multiply_add(gradient, gradient, chunk);
        }
        sum += sum_lanes(chunk);
      }
      squares[t][row] = sum;
    }
  });
}

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
