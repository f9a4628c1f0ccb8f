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

// One tensor of an optimizer's step, all of it in the weight's memory order. The standardized
// weight, where there is one, is rows of `columns` elements; others are cut every `columns`.
struct SgdTensor {
  int64_t elements, columns;
  const float* gradient;
  float* weight;
  float* momentum;     // null without momentum
  void* standardized;  // null where the weight is used as it is
};

// As torch.optim.SGD's. fresh: momentum is written before it is read. project: gradients are those
// of the standardized weights, which were made with `eps`.
struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, fresh, project;
  double eps;
};

struct Kernels {
  const char* isa;

  // weight and bias hold `channels` floats.
  void (*group_norm_relu)(const GroupNormShape&, Element, const void* input, const float* weight,
                          const float* bias, double eps, void* output, float* mean, float* rstd);
  // The same with known statistics: one pass.
  void (*group_norm_relu_apply)(const GroupNormShape&, Element, const void* input,
                                const float* mean, const float* rstd, const float* weight,
                                const float* bias, void* output);
  // input += other, and the statistics of the sum.
  void (*add_group_statistics)(const GroupNormShape&, Element, void* input, const void* other,
                               double eps, float* mean, float* rstd);
  // total += part, `count` elements.
  void (*add)(int64_t count, Element, void* total, const void* part);
  // grad_skip, if any, is added to grad_input.
  void (*group_norm_relu_backward)(const GroupNormShape&, Element, const void* grad_output,
                                   const void* input, const float* mean, const float* rstd,
                                   const float* weight, const float* bias, const void* grad_skip,
                                   void* grad_input, float* grad_weight, float* grad_bias);

  // weight (rows, columns); mean and rstd hold `rows` floats. The second Element is that of the
  // result, or of the gradient that comes back for it: the weight's, or any for a float32 weight.
  void (*standardize_weight)(int64_t rows, int64_t columns, Element, Element, const void* weight,
                             double eps, void* output, float* mean, float* rstd);
  void (*standardize_weight_backward)(int64_t rows, int64_t columns, Element, Element,
                                      const void* grad_output, const void* weight,
                                      const float* mean, const float* rstd, void* grad_weight);

  // One call steps all `count` tensors; the element type is that of the standardized weights.
  void (*sgd)(const SgdTensor*, int64_t count, Element, const SgdOptions&);
  // The sum of squares of each row of each tensor's projected gradient.
  void (*sgd_gradient_squares)(const SgdTensor*, int64_t count, double eps,
                               double* const* squares);
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
