// Mean and squared deviations of long rows in one read, without E[x^2] - E[x]^2.
#pragma once

#include "vec.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {

// Count, mean and sum of squared deviations of a set of numbers.
struct Moments {
  double count, mean, deviations;
};

// Chan, Golub and LeVeque: the moments of the union of two sets.
inline Moments merge(Moments a, Moments b) {
  if (a.count == 0) return b;
  double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share,
          a.deviations + b.deviations + delta * delta * a.count * share};
}

// Elements whose sums are taken about one shift before they are merged. Short, so that float32
// sums stay exact to a few roundings; 16 kB of float32 stay in the first-level cache.
constexpr int64_t kMomentsChunk = 4096;

template <class T>
Moments chunk_moments(const T* x, int64_t n) {
  constexpr int kUnroll = 4;
  const int64_t first = n < kUnroll * kLanes ? n : kUnroll * kLanes;
  Vec head{};
  int64_t i = 0;
  for (; i + kLanes <= first; i += kLanes) head += load(x + i);
  if (i < first) head += load_first(x + i, first - i);
  const float shift = sum_lanes(head) / first;

  const Vec shifts = broadcast(shift);
  Vec sum[kUnroll] = {}, squares[kUnroll] = {};
  for (i = 0; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      Vec d = load(x + i + u * kLanes) - shifts;
      sum[u] += d;
      squares[u] = multiply_add(d, d, squares[u]);
    }
  }
  for (; i < n; i += kLanes) {
    Vec d = (i + kLanes <= n ? load(x + i) : load_first(x + i, n - i, shift)) - shifts;
    sum[0] += d;
    squares[0] = multiply_add(d, d, squares[0]);
  }
  float s = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  float q = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  float offset = s / n, deviations = q - s * offset;
  // Not std::max: a NaN must stay.
  return {static_cast<double>(n), double{shift} + offset, deviations < 0 ? 0 : deviations};
}

template <class T>
Moments moments(const T* x, int64_t n) {
  Moments all = {0, 0, 0};
  for (int64_t i = 0; i < n; i += kMomentsChunk)
    all = merge(all, chunk_moments(x + i, n - i < kMomentsChunk ? n - i : kMomentsChunk));
  return all;
}

inline float reciprocal_root(const Moments& m, double eps) {
  const double variance = m.count > 0 ? m.deviations / m.count : 0;
  return static_cast<float>(1.0 / __builtin_sqrt(variance + eps));
}

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
