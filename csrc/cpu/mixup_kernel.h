// Mixup on a CPU: crop, flip, normalise and mix a batch of uint8 images, each byte of the output
// written once and nothing stored in between.
//
//   y[i] = (lam[i] * x[i] + (1 - lam[i]) * x[partner[i]] - centre) * scale
//
// A row of pixels is one run of memory in x and in y, whatever the number of channels: the
// channels' constants are laid out as a row, too. A flipped row is turned around in the first-level
// cache on its way. Threads take rows; any number of them gives the same bits.
#pragma once

#include "../common/vec.h"
#include "kernels.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {
namespace {

// Rows before they are read for which memory is asked: rows of a crop lie apart, and the processor
// doesn't see where the next one begins.
constexpr int64_t kRowsAhead = 2;

// Turns a row of pixels around, as many at a time as 16 bytes hold. It is read from its start, as the
// processor expects when it fetches ahead.
class Reversal {
 public:
  Reversal(int64_t columns, int64_t channels)
      : bytes_(columns * channels), channels_(channels), step_(kPart / channels * channels) {
    for (int64_t k = 0; k < step_; ++k)
      order_[kPart - step_ + k] = step_ - channels - k / channels * channels + k % channels;
  }

  void run(const uint8_t* from, uint8_t* to) const {
    int64_t left = bytes_;
#if defined(__SSSE3__)
    if (step_ > 0) {
      const __m128i order = _mm_load_si128((const __m128i*)order_);
      // Bytes of a part that are no whole pixel are written over by the part after it.
      for (; left >= kPart; from += step_, left -= step_)
        _mm_storeu_si128((__m128i*)(to + left - kPart),
                         _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), order));
    }
#endif
    for (; left > 0; from += channels_, left -= channels_)
      for (int64_t c = 0; c < channels_; ++c) to[left - channels_ + c] = from[c];
  }

 private:
  static constexpr int64_t kPart = 16;

  int64_t bytes_, channels_, step_;  // step_: bytes of the whole pixels in a part, maybe none
  alignas(kPart) uint8_t order_[kPart] = {};
};

// The even or the odd ones of 2 * kLanes elements, the first of which lies at an odd place or not.
template <int kOdd>
struct EverySecond {
  int64_t parity;

  Vec load(const uint8_t* p) const {
    typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
    const Bits both = load_bits(p);
    return __builtin_convertvector((Integers)(kOdd ? both >> 8 : both & 0xffu), Vec);
  }
};

// A row of the channels' constants, where it lies: in the order of its elements, and apart those at
// even and at odd places.
struct Constants {
  const float *all, *even, *odd;

  template <class Elements>
  Vec at(int64_t k, Elements) const { return load(all + k); }
  template <int kOdd>
  Vec at(int64_t k, EverySecond<kOdd> elements) const {
    const int64_t first = elements.parity + kOdd;
    return load((first % 2 ? odd : even) + first / 2 + k / 2);
  }
};

class ConstantsRow {
 public:
  ConstantsRow(const float* of_channel, int64_t channels, int64_t n)
      : all_(n + kBeyond), even_(n / 2 + kBeyond), odd_(n / 2 + kBeyond) {
    for (int64_t i = 0; i < n + kBeyond; ++i)
      all_.data[i] = (i % 2 ? odd_ : even_).data[i / 2] = of_channel[i % channels];
  }
  operator Constants() const { return {all_.data, even_.data, odd_.data}; }

 private:
  static constexpr int64_t kBeyond = 2 * kLanes;  // a part of a vector is loaded whole
  Scratch all_, even_, odd_;
};

// As write_run, of results that no NaN from outside goes into. Two vectors that hold every second
// element become one of halves without a shuffle.
template <bool kStream, class F>
inline void write_numbers(BFloat16* y, int64_t n, const F& f) {
  constexpr int64_t kLine = kLineBytes / sizeof(BFloat16);
  const int64_t begin = kStream && to_line(y) < n ? to_line(y) : 0;
  const int64_t step = kStream ? kLine : 2 * kLanes, end = begin + (n - begin) / step * step;
  const int64_t parity = begin % 2;
  write_run<false>(y, begin, f);
  for (int64_t i = begin; i < end; i += 2 * kLanes) {
    const Bits even = round_to_bfloat16(f(i, EverySecond<0>{parity})) >> 16;
    const Bits odd = round_to_bfloat16(f(i, EverySecond<1>{parity})) & 0xffff0000u;
    Whole{}.store<kStream>(reinterpret_cast<float*>(y + i), (Vec)(even | odd));
  }
  write_run<false>(y + end, n - end, [&](int64_t k, auto part) { return f(end + k, part); });
}
template <bool kStream, class T, class F>
inline void write_numbers(T* y, int64_t n, const F& f) {
  write_run<kStream>(y, n, f);
}

template <bool kStream, class T>
void mixup_rows_as(const MixupBatch& batch, int64_t begin, int64_t end) {
  const int64_t n = batch.columns * batch.channels;
  const Reversal reversal(batch.columns, batch.channels);
  const ConstantsRow centres(batch.centre, batch.channels, n);
  const ConstantsRow scales(batch.scale, batch.channels, n);
  const Constants centre = centres, scale = scales;
  // What is turned around is read a row later: read at once it would wait until the stores before
  // it, the output's, have reached memory.
  const Scratch turned(n);  // in bytes, two rows of each of two images
  auto row_of = [&](int64_t image, int64_t at, int spare) -> const uint8_t* {
    const MixupImage& x = batch.images[image];
    const uint8_t* from = x.corner + at % batch.rows * x.stride;
    if (!x.flip) return from;
    uint8_t* to = reinterpret_cast<uint8_t*>(turned.data) + spare * n;
    reversal.run(from, to);
    return to;
  };
  struct Rows {
    const uint8_t *own, *other;  // no other where nothing is mixed
  };
  auto rows_of = [&](int64_t at) -> Rows {
    const int64_t i = at / batch.rows, other = batch.partner[i];
    const bool alone = other == i || batch.lam[i] == 1;
    const int spare = at % 2 * 2;
    return {row_of(i, at, spare), alone ? nullptr : row_of(other, at, spare + 1)};
  };

  auto ask_for = [&](int64_t image, int64_t at) {
    const MixupImage& x = batch.images[image];
    const uint8_t* from = x.corner + at % batch.rows * x.stride;
    for (int64_t k = 0; k < n; k += kLineBytes) prefetch(from + k);
  };

  T* y = static_cast<T*>(batch.output) + begin * n;
  Rows next = begin < end ? rows_of(begin) : Rows{};
  for (int64_t at = begin; at < end; ++at, y += n) {
    const Rows x = next;
    if (at + 1 < end) next = rows_of(at + 1);
    if (const int64_t later = at + kRowsAhead; later < end) {
      ask_for(later / batch.rows, later);
      ask_for(batch.partner[later / batch.rows], later);
    }
    if (x.other == nullptr) {
      write_numbers<kStream>(y, n, [=](int64_t k, auto part) {
        return (part.load(x.own + k) - centre.at(k, part)) * scale.at(k, part);
      });
      continue;
    }
    const float weight = batch.lam[at / batch.rows];
    const Vec lam = broadcast(weight), rest = broadcast(1 - weight);
    write_numbers<kStream>(y, n, [=](int64_t k, auto part) {
      const Vec own = multiply_add(part.load(x.own + k), lam, -centre.at(k, part));
      return multiply_add(part.load(x.other + k), rest, own) * scale.at(k, part);
    });
  }
  if (kStream) finish_streaming();
}

}  // namespace

void mixup_rows(const MixupBatch& batch, int64_t begin, int64_t end) {
  with_element(batch.element, [&](auto of) {
    using T = typename decltype(of)::type;
    (batch.stream ? mixup_rows_as<true, T> : mixup_rows_as<false, T>)(batch, begin, end);
  });
}

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
