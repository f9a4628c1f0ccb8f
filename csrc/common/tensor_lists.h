// What the ops of an optimizer ask of their lists of tensors, and the order they work in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"

namespace bit_kernels {

// A tensor in the order that the kernel works in: itself or, where it lies otherwise, a copy.
class Ordered {
 public:
  Ordered(const Tensor& given, MemoryFormat format)
      : given_(given),
        dense_(lies_in(format, given) ? given : torch::stable::contiguous(given, format)) {}
  const void* read() const { return dense_.const_data_ptr(); }
  void* written() {
    written_ = true;
    return dense_.mutable_data_ptr();
  }
  // What was written to a copy reaches the tensor.
  void finish() {
    if (written_ && dense_.get() != given_.get()) torch::stable::copy_(given_, dense_);
  }

 private:
  Tensor given_, dense_;
  bool written_ = false;
};

inline void check_list(const char* op, const char* name, const std::vector<Tensor>& tensors,
                const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(tensors.size() == weights.size(), op, ": ", name, " has ", tensors.size(),
                  " tensors, weights has ", weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    STD_TORCH_CHECK(is_here(tensors[t]) &&
                        tensors[t].get_device_index() == weights[t].get_device_index(),
                    op, ": ", name, " is on another device than its weight");
    STD_TORCH_CHECK(tensors[t].dim() == weights[t].dim(), op, ": ", name, " has ",
                    tensors[t].dim(), " dimensions, its weight ", weights[t].dim());
    for (int64_t d = 0; d < weights[t].dim(); ++d)
      STD_TORCH_CHECK(tensors[t].size(d) == weights[t].size(d), op, ": ", name, " has size ",
                      tensors[t].size(d), " in dimension ", d, ", its weight ",
                      weights[t].size(d));
  }
}

inline void check_float32(const char* op, const char* name, const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors)
    STD_TORCH_CHECK(is_here(tensor) && tensor.scalar_type() == ScalarType::Float, op, ": ", name,
                    " must be float32 ", kDevice, " tensors");
}

// Elements of one output channel's kernel.
inline int64_t columns_of(const char* op, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() >= 2, op,
                  ": a standardized weight must have at least 2 dimensions (C_out, C_in, ...), "
                  "has ", weight.dim());
  const int64_t rows = weight.size(0);
  return rows == 0 || weight.numel() == 0 ? 1 : weight.numel() / rows;
}

}  // namespace bit_kernels
