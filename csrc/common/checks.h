// What op implementations ask of their tensors before they touch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <vector>

#include "element.h"

namespace bit_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whose tensors the library takes that this is compiled for.
#ifdef BIT_KERNELS_CUDA
constexpr const char* kDevice = "CUDA";
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
#else
constexpr const char* kDevice = "CPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
#endif

inline Element element_of(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_here(tensor), op, ": ", name, " is not a ", kDevice, " tensor");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name,
                  " has a dtype without a ", kDevice,
                  " kernel; it may be float32, bfloat16 or float16");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == like.dim(), op, ": ", name, " has ", tensor.dim(),
                  " dimensions, the input ", like.dim());
  for (int64_t d = 0; d < like.dim(); ++d)
    STD_TORCH_CHECK(tensor.size(d) == like.size(d), op, ": ", name, " has size ", tensor.size(d),
                    " in dimension ", d, ", the input ", like.size(d));
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == like.get_device_index() &&
                      tensor.scalar_type() == like.scalar_type(),
                  op, ": ", name, " differs from the input in device or dtype");
  check_shape(op, name, tensor, like);
}

inline void check_statistics(const char* op, const char* name, const Tensor& tensor,
                             const Tensor& input, int64_t count) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == input.get_device_index() &&
                      tensor.scalar_type() == ScalarType::Float &&
                      tensor.is_contiguous() && tensor.numel() == count,
                  op, ": ", name, " must be a contiguous float32 ", kDevice, " tensor of ", count,
                  " elements, as the forward returned it");
}

// channels_last where channels are innermost and the tensor is not plainly contiguous: the rule of
// bit_kernels/ops/_layout.py, which the fakes follow.
inline MemoryFormat memory_format(const Tensor& input) {
  const int64_t dims = input.dim();
  if ((dims == 4 || dims == 5) && !input.is_contiguous() && input.stride(1) == 1)
    return dims == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  return MemoryFormat::Contiguous;
}

// Whether the elements lie one after another in the order of `format`.
inline bool lies_in(MemoryFormat format, const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  const bool channels_last = format != MemoryFormat::Contiguous;
  if (channels_last && !fits(1)) return false;
  for (int64_t d = dims - 1; d >= 0; --d)
    if (!(channels_last && d == 1) && !fits(d)) return false;
  return true;
}

// Calls an op of PyTorch's own that has one result.
template <class... Arguments>
Tensor call_aten(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An uninitialised tensor of the shape and strides of `tensor`, in another dtype.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  return call_aten("aten::empty_like", "", tensor, std::optional(dtype), std::nullopt, std::nullopt,
                   std::nullopt, std::nullopt);
}

inline Tensor empty_floats(std::vector<int64_t> size) {
  return torch::stable::empty(size, ScalarType::Float);
}

// What a (C,) parameter beside this input may be.
inline void check_parameter(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& input) {
  const int64_t count = input.size(1);
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == input.get_device_index(), op,
                  ": ", name, " is on another device than the input");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == count, op, ": ", name,
                  " must have shape (", count, ",)");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float ||
                      tensor.scalar_type() == input.scalar_type(),
                  op, ": ", name, " must be float32 or have the input's dtype");
}

// A vector of `count` floats from an optional parameter, which is float32 or of the input's dtype.
class Parameter {
 public:
  Parameter(const char* op, const char* name, const std::optional<Tensor>& tensor,
            const Tensor& input, float otherwise) {
    const int64_t count = input.size(1);
    if (!tensor) {
      filled_.assign(count, otherwise);
      return;
    }
    check_parameter(op, name, *tensor, input);
    tensor_ = tensor->scalar_type() == ScalarType::Float
                  ? *tensor
                  : torch::stable::to(*tensor, ScalarType::Float);
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
  }
  const float* data() const {
    return tensor_ ? tensor_->const_data_ptr<float>() : filled_.data();
  }

 private:
  std::optional<Tensor> tensor_;
  std::vector<float> filled_;
};

}  // namespace bit_kernels
