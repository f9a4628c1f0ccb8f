// The CPU kernels on raw pointers, as each instruction set's build offers them.
#pragma once

#include <cstdint>

#include "../common/element.h"

namespace bit_kernels {

// input (samples, channels, pixels), or (samples, pixels, channels) with channels_last.
// Statistics are (samples, groups), float32.
struct GroupNormShape {
  int64_t samples, channels, groups, pixels;
  bool channels_last, relu;
};

struct Kernels {
  const char* isa;

  // weight and bias hold `channels` floats.
  void (*group_norm_relu)(const GroupNormShape&, Element, const void* input, const float* weight,
                          const float* bias, double eps, void* output, float* mean, float* rstd);
  void (*group_norm_relu_backward)(const GroupNormShape&, Element, const void* grad_output,
                                   const void* input, const float* mean, const float* rstd,
                                   const float* weight, const float* bias, void* grad_input,
                                   float* grad_weight, float* grad_bias);

  // weight (rows, columns); mean and rstd hold `rows` floats.
  void (*standardize_weight)(int64_t rows, int64_t columns, Element, const void* weight,
                             double eps, void* output, float* mean, float* rstd);
  void (*standardize_weight_backward)(int64_t rows, int64_t columns, Element,
                                      const void* grad_output, const void* weight,
                                      const float* mean, const float* rstd, void* grad_weight);
};

// The fastest build that this processor runs, chosen once.
const Kernels& kernels();

// One image where a crop of it begins: rows of `columns * channels` bytes, `stride` bytes apart.
// A flipped one is read from right to left.
struct MixupImage {
  const uint8_t* corner;
  int64_t stride;
  bool flip;
};

// output[i] = (lam * images[i] + (1 - lam) * images[partner[i]] - centre) * scale, where centre and
// scale hold `channels` floats and output is (samples, rows, columns, channels).
struct MixupBatch {
  int64_t rows, columns, channels;
  const MixupImage* images;
  const int64_t* partner;
  const float* lam;
  const float* centre;
  const float* scale;
  Element element;
  void* output;
  bool stream;  // past the caches
};

// Not among `Kernels`: mixup is in a library of its own, which takes NumPy arrays and knows nothing
// of torch. Writes rows begin to end - 1 of all the output's samples * rows.
using MixupRows = void(const MixupBatch&, int64_t begin, int64_t end);

}  // namespace bit_kernels
