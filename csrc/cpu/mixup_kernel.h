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

constexpr int64_t kShuffleBytes = 16;

// Whole pixels of `channels` bytes are turned around, as many at a time as 16 bytes hold.
class Reversal {
 public:
  Reversal(int64_t columns, int64_t channels) : columns_(columns), channels_(channels) {
    pixels_ = channels <= kShuffleBytes ? kShuffleBytes / channels : 0;
    // The last `pixels_` pixels of 16 bytes, in reverse order, come first.
    for (int64_t i = 0; i < kShuffleBytes; ++i) {
      const int64_t pixel = i / channels + 1;
      order_[i] = pixel <= pixels_ ? kShuffleBytes - pixel * channels + i % channels : 0;
    }
  }
  // Bytes that `run` may write.
  int64_t size() const { return columns_ * channels_ + kShuffleBytes; }

  void run(const uint8_t* from, uint8_t* to) const {
    int64_t left = columns_;
#if defined(__SSSE3__)
    const __m128i order = _mm_loadu_si128((const __m128i*)order_);
    // Bytes written past the pixels turned around are overwritten by the next.
    for (; pixels_ > 0 && left * channels_ >= kShuffleBytes; left -= pixels_) {
      const __m128i in = _mm_loadu_si128((const __m128i*)(from + left * channels_ - kShuffleBytes));
      _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(in, order));
      to += pixels_ * channels_;
    }
#endif
    for (; left > 0; --left)
      for (int64_t c = 0; c < channels_; ++c) *to++ = from[(left - 1) * channels_ + c];
  }

 private:
  int64_t columns_, channels_, pixels_;
  uint8_t order_[kShuffleBytes];
};

template <bool kStream, class T>
void mixup_rows_as(const MixupBatch& batch, int64_t begin, int64_t end) {
  const int64_t n = batch.columns * batch.channels;
  const Reversal reversal(batch.columns, batch.channels);
  const Scratch centre(n + kLanes), scale(n + kLanes);  // a part of a vector is loaded whole
  for (int64_t i = 0; i < n; ++i) {
    centre.data[i] = batch.centre[i % batch.channels];
    scale.data[i] = batch.scale[i % batch.channels];
  }
  const Scratch turned((2 * reversal.size() + 3) / 4);
  uint8_t* spare[2] = {reinterpret_cast<uint8_t*>(turned.data),
                       reinterpret_cast<uint8_t*>(turned.data) + reversal.size()};
  auto row_of = [&](int64_t image, int64_t row, uint8_t* spare) -> const uint8_t* {
    const MixupImage& x = batch.images[image];
    const uint8_t* from = x.corner + row * x.stride;
    if (!x.flip) return from;
    reversal.run(from, spare);
    return spare;
  };

  T* y = static_cast<T*>(batch.output) + begin * n;
  for (int64_t at = begin; at < end; ++at, y += n) {
    const int64_t i = at / batch.rows, row = at % batch.rows, other = batch.partner[i];
    const uint8_t* a = row_of(i, row, spare[0]);
    if (other == i || batch.lam[i] == 1) {
      write_run<kStream>(y, n, [&](int64_t k, auto part) {
        return (part.load(a + k) - load(centre.data + k)) * load(scale.data + k);
      });
      continue;
    }
    const uint8_t* b = row_of(other, row, spare[1]);
    const Vec lam = broadcast(batch.lam[i]), rest = broadcast(1 - batch.lam[i]);
    write_run<kStream>(y, n, [&](int64_t k, auto part) {
      const Vec mixed = multiply_add(part.load(b + k), rest, part.load(a + k) * lam);
      return (mixed - load(centre.data + k)) * load(scale.data + k);
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
