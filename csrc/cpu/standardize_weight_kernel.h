// Weight standardization on a CPU: each output channel's kernel is one row of memory.
//
//   y = (w - mean) * rstd,   dw = rstd * (dy - mean(dy) - y * mean(dy * y))
//
// A row stays in cache between its two reads: 2 passes over memory forward, 3 backward.
#pragma once

#include "../common/parallel.h"
#include "../common/vec.h"
#include "../common/welford.h"
#include "kernels.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {
namespace {

template <bool kStream, class T, class Y>
void standardize_rows(int64_t begin, int64_t end, int64_t columns, const T* weight, double eps,
                      Y* output, float* mean, float* rstd) {
  const int64_t ahead = elements_ahead<T>(columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* w = weight + row * columns;
    Y* y = output + row * columns;
    const Moments m = moments(w, columns);
    mean[row] = static_cast<float>(m.mean);
    rstd[row] = reciprocal_root(m, eps);
    const Vec shift = broadcast(mean[row]), scale = broadcast(rstd[row]);
    write_run<kStream>(y, columns,
                        [&](int64_t i, auto part) {
                          prefetch(w + i + ahead);
                          return (part.load(w + i) - shift) * scale;
                        });
  }
  if (kStream) finish_streaming();
}

template <bool kStream, class T, class Y>
void standardize_rows_backward(int64_t begin, int64_t end, int64_t columns, const Y* grad_output,
                               const T* weight, const float* mean, const float* rstd,
                               T* grad_weight) {
  const int64_t ahead = elements_ahead<T>(columns);
  for (int64_t row = begin; row < end; ++row) {
    const Y* dy = grad_output + row * columns;
    const T* w = weight + row * columns;
    const Vec shift = broadcast(mean[row]);
    double plain = 0, centred = 0;
    for (int64_t at = 0; at < columns; at += kMomentsChunk) {
      const int64_t n = columns - at < kMomentsChunk ? columns - at : kMomentsChunk;
      Vec g_sum[2] = {}, gw_sum[2] = {};
      auto add = [&](int u, Vec g, Vec w) {
        g_sum[u] += g;
        gw_sum[u] = multiply_add(g, w - shift, gw_sum[u]);
      };
      int64_t i = at;
      for (; i + 2 * kLanes <= at + n; i += 2 * kLanes)
        for (int u = 0; u < 2; ++u) add(u, load(dy + i + u * kLanes), load(w + i + u * kLanes));
      for_vectors(at + n - i, [&](int64_t k, auto part) {
        add(0, part.load(dy + i + k), part.load(w + i + k));
      });
      plain += sum_lanes(g_sum[0] + g_sum[1]);
      centred += sum_lanes(gw_sum[0] + gw_sum[1]);
    }
    const double scale = rstd[row];
    const Vec scales = broadcast(rstd[row]);
    const Vec slope = broadcast(static_cast<float>(-scale * scale * scale * centred / columns));
    const Vec mean_gradient = broadcast(static_cast<float>(plain / columns));
    write_run<kStream>(grad_weight + row * columns, columns, [&](int64_t i, auto part) {
      prefetch(w + i + ahead);
      prefetch(dy + i + ahead);
      const Vec d = part.load(w + i) - shift;
      return multiply_add(scales, part.load(dy + i) - mean_gradient, slope * d);
    });
  }
  if (kStream) finish_streaming();
}

// Whether rows are streamed: whole lines of a large output.
template <class T>
bool streams_rows(int64_t rows, int64_t columns, const T* output) {
  const int64_t row = columns * sizeof(T);
  return rows * row >= kStreamBytes && row % kLineBytes == 0 && to_line(output) == 0;
}

// Calls body(weight's element, result's): the same, or any beside a float32 weight.
template <class Body>
void with_elements(Element weight, Element result, const Body& body) {
  if (weight == result)
    with_element(weight, [&](auto of) { body(of, of); });
  else
    with_element(result, [&](auto of) { body(Of<float>{}, of); });
}

}  // namespace

void standardize_weight(int64_t rows, int64_t columns, Element element, Element result,
                        const void* weight, double eps, void* output, float* mean, float* rstd) {
  with_elements(element, result, [&](auto of_weight, auto of_result) {
    using T = typename decltype(of_weight)::type;
    using Y = typename decltype(of_result)::type;
    Y* out = static_cast<Y*>(output);
    const auto run = streams_rows(rows, columns, out) ? standardize_rows<true, T, Y>
                                                      : standardize_rows<false, T, Y>;
    parallel_for(rows, rows * columns >= kParallelElements, [&](int64_t begin, int64_t end) {
      run(begin, end, columns, static_cast<const T*>(weight), eps, out, mean, rstd);
    });
  });
}

void standardize_weight_backward(int64_t rows, int64_t columns, Element element, Element result,
                                 const void* grad_output, const void* weight, const float* mean,
                                 const float* rstd, void* grad_weight) {
  with_elements(element, result, [&](auto of_weight, auto of_result) {
    using T = typename decltype(of_weight)::type;
    using Y = typename decltype(of_result)::type;
    T* out = static_cast<T*>(grad_weight);
    const auto run = streams_rows(rows, columns, out) ? standardize_rows_backward<true, T, Y>
                                                      : standardize_rows_backward<false, T, Y>;
    parallel_for(rows, rows * columns >= kParallelElements, [&](int64_t begin, int64_t end) {
      run(begin, end, columns, static_cast<const Y*>(grad_output), static_cast<const T*>(weight),
          mean, rstd, out);
    });
  });
}

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
