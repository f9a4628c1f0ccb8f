// The CUDA kernels as the rest of the library sees them: plain functions on raw device pointers.
//
// Each starts its work on a stream of a device, which becomes the current one, and returns; it
// neither allocates nor waits, so that it can be captured in a CUDA graph. The result is null, or
// what is wrong, in words that stay valid until the thread's next call.
#pragma once

#include <cstdint>

#include "../common/element.h"

namespace bit_kernels {

// A (C,) vector of float32 or of the input's type, or null.
struct ChannelVector {
  const void* data;
  bool is_float32;
};

// Elements lie as (samples, pixels, channels): channels_last.
struct GroupNormShape {
  int64_t samples, pixels, channels, groups;
  Element element;
};

struct GroupNormForward {
  GroupNormShape shape;
  const void* input;
  ChannelVector weight, bias;
  float eps;
  bool relu;
  void* output;
  float *mean, *rstd;  // (samples, groups)
};

struct GroupNormBackward {
  GroupNormShape shape;
  const void *grad_output, *input;
  const float *mean, *rstd;
  ChannelVector weight, bias;
  bool relu;
  const void* grad_skip;  // added to grad_input, may be null
  void* grad_input;
  float *grad_weight, *grad_bias;  // (channels,)
  float* workspace;                // 2 * samples * channels
};

// How the kernels divide a shape: what a block works on, and the grid.
struct GroupNormCut {
  int64_t channels, rows, vector, blocks, threads, shared, cluster;
};

// One weight of an optimizer's step: rows of memory, one an output channel, or one row where it is
// not standardized.
struct SgdTensor {
  const float* gradient;
  float* weight;
  float* momentum;     // null without
  void* standardized;  // null without
  int64_t rows, columns;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, fresh, project;
  double eps;
};

extern "C" {
// What either of the next two would do with aligned tensors.
const char* bit_kernels_group_norm_relu_cut(const GroupNormShape*, bool backward, int device,
                                            GroupNormCut*);
const char* bit_kernels_group_norm_relu(const GroupNormForward*, int device, void* stream);
const char* bit_kernels_group_norm_relu_backward(const GroupNormBackward*, int device,
                                                 void* stream);
const char* bit_kernels_sgd(const SgdTensor*, int64_t count, Element standardized,
                            const SgdOptions*, int device, void* stream);
// norms[t]: that of the projected gradient of tensor t. squares: one float for each row of all.
const char* bit_kernels_sgd_gradient_norm(const SgdTensor*, int64_t count, double eps,
                                          float* squares, float* norms, int device, void* stream);
}

}  // namespace bit_kernels
