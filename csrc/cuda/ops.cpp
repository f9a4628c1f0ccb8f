// The CUDA kernels as torch.ops.bit_kernels.*_cuda: checks, memory layout, registration.
// The kernels are in the .cu files, the ops' definitions in bit_kernels/ops/_cuda.py.
//
// Nothing here needs CUDA's headers, or a torch that is built with CUDA: the stream is asked for by
// a symbol that is only there in one that is. Tests compile it without BIT_KERNELS_CUDA: the same
// ops then take CPU tensors, and work with the kernels that are compiled for the host.
#include "kernels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/tensor_lists.h"

#ifdef BIT_KERNELS_CUDA
#define BIT_KERNELS_DISPATCH_KEY CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#else
#define BIT_KERNELS_DISPATCH_KEY CPU
#endif

namespace bit_kernels {
namespace {

#ifdef BIT_KERNELS_CUDA

// Makes a tensor's device the current one, and knows PyTorch's stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                    "bit_kernels: this torch is built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  int index() const { return index_; }
  void* stream() const { return stream_; }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#else

struct Device {
  explicit Device(const Tensor&) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
};

#endif

// What a function of kernels.h says: what is wrong, or nothing.
void check_launch(const char* op, const char* wrong) {
  STD_TORCH_CHECK(wrong == nullptr, op, ": ", wrong);
}

Tensor empty_floats_like(const Tensor& tensor, std::vector<int64_t> size) {
  return torch::stable::new_empty(tensor, size, ScalarType::Float);
}

// ---- group_norm_relu

// A weight or bias and, while a launch needs it, its memory.
class Held {
 public:
  Held(const char* op, const char* name, const std::optional<Tensor>& given, const Tensor& input) {
    if (!given) return;
    check_parameter(op, name, *given, input);
    tensor_ = torch::stable::contiguous(*given);
  }
  ChannelVector vector() const {
    if (!tensor_) return {nullptr, false};
    return {tensor_->const_data_ptr(), tensor_->scalar_type() == ScalarType::Float};
  }

 private:
  std::optional<Tensor> tensor_;
};

GroupNormShape shape_of(const char* op, const Tensor& input, int64_t groups, MemoryFormat format) {
  const Element element = element_of(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 2, op, ": input must have at least 2 dimensions (N, C, ...), has ",
                  input.dim());
  const int64_t samples = input.size(0), channels = input.size(1);
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0, op, ": num_groups is ",
                  groups, "; it must divide the ", channels, " channels of the input");
  int64_t pixels = 1;
  for (int64_t d = 2; d < input.dim(); ++d) pixels *= input.size(d);
  // Where channels are innermost: with one pixel or one channel they always are.
  const bool either = pixels <= 1 || channels == 1 || samples == 0;
  STD_TORCH_CHECK(format != MemoryFormat::Contiguous || either, op,
                  ": input is contiguous; it must be channels_last");
  return {samples, pixels, channels, groups, element};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu(const Tensor& given, int64_t num_groups,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps,
                                                   bool relu) {
  constexpr const char* op = "bit_kernels::group_norm_relu_cuda";
  const MemoryFormat format = memory_format(given);
  const GroupNormShape shape = shape_of(op, given, num_groups, format);
  const Held scale(op, "weight", weight, given), shift(op, "bias", bias, given);

  const Device device(given);
  const Tensor input = torch::stable::contiguous(given, format);
  Tensor output = torch::stable::empty_like(input);
  Tensor mean = empty_floats_like(input, {shape.samples, num_groups});
  Tensor rstd = empty_floats_like(input, {shape.samples, num_groups});
  if (input.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::fill_(rstd, 1 / std::sqrt(eps));
    return {output, mean, rstd};
  }
  const GroupNormForward arguments = {
      shape,
      input.const_data_ptr(),
      scale.vector(),
      shift.vector(),
      static_cast<float>(eps),
      relu,
      output.mutable_data_ptr(),
      mean.mutable_data_ptr<float>(),
      rstd.mutable_data_ptr<float>(),
  };
  check_launch(op, bit_kernels_group_norm_relu(&arguments, device.index(), device.stream()));
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward(
    const Tensor& grad_given, const Tensor& given, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool relu,
    const std::optional<Tensor>& skip_given) {
  constexpr const char* op = "bit_kernels::group_norm_relu_backward_cuda";
  STD_TORCH_CHECK(mean.dim() == 2, op, ": mean must have shape (N, num_groups)");
  const MemoryFormat format = memory_format(given);
  const GroupNormShape shape = shape_of(op, given, mean.size(1), format);
  check_like(op, "grad_output", grad_given, given);
  if (skip_given) check_like(op, "grad_skip", *skip_given, given);
  check_statistics(op, "mean", mean, given, shape.samples * shape.groups);
  check_statistics(op, "rstd", rstd, given, shape.samples * shape.groups);
  const Held scale(op, "weight", weight, given), shift(op, "bias", bias, given);

  const Device device(given);
  const Tensor input = torch::stable::contiguous(given, format);
  const Tensor grad_output = torch::stable::contiguous(grad_given, format);
  std::optional<Tensor> skip;
  if (skip_given) skip = torch::stable::contiguous(*skip_given, format);
  Tensor grad_input = torch::stable::empty_like(input);
  Tensor grad_weight = empty_floats_like(input, {shape.channels});
  Tensor grad_bias = empty_floats_like(input, {shape.channels});
  if (input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }
  Tensor workspace = empty_floats_like(input, {2, shape.samples, shape.channels});
  const GroupNormBackward arguments = {
      shape,
      grad_output.const_data_ptr(),
      input.const_data_ptr(),
      mean.const_data_ptr<float>(),
      rstd.const_data_ptr<float>(),
      scale.vector(),
      shift.vector(),
      relu,
      skip ? skip->const_data_ptr() : nullptr,
      grad_input.mutable_data_ptr(),
      grad_weight.mutable_data_ptr<float>(),
      grad_bias.mutable_data_ptr<float>(),
      workspace.mutable_data_ptr<float>(),
  };
  check_launch(op, bit_kernels_group_norm_relu_backward(&arguments, device.index(),
                                                        device.stream()));
  return {grad_input, grad_weight, grad_bias};
}

// ---- sgd

void check_one_device(const char* op, const std::vector<Tensor>& weights) {
  for (const Tensor& weight : weights)
    STD_TORCH_CHECK(weight.get_device_index() == weights[0].get_device_index(), op,
                    ": weights are on different devices");
}

void sgd(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
         const std::vector<Tensor>& momenta, const std::vector<Tensor>& standardized, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
         bool fresh, bool project, double eps) {
  constexpr const char* op = "bit_kernels::sgd_cuda";
  if (weights.empty()) return;
  check_float32(op, "weights", weights);
  check_float32(op, "grads", grads);
  check_one_device(op, weights);
  check_list(op, "grads", grads, weights);
  if (momentum != 0) {
    check_float32(op, "momenta", momenta);
    check_list(op, "momenta", momenta, weights);
  }
  const bool keeps = !standardized.empty();
  STD_TORCH_CHECK(keeps || !project, op,
                  ": project is True; it may be so with standardized weights only");
  Element element = Element::kFloat32;
  if (keeps) {
    check_list(op, "standardized", standardized, weights);
    element = element_of(op, "standardized", standardized[0]);
    for (const Tensor& tensor : standardized)
      STD_TORCH_CHECK(tensor.scalar_type() == standardized[0].scalar_type(), op,
                      ": standardized must all have one dtype");
  }

  const Device device(weights[0]);
  std::vector<Ordered> ordered;
  ordered.reserve(4 * weights.size());
  std::vector<SgdTensor> tensors;
  tensors.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const int64_t elements = weights[t].numel();
    const int64_t columns = keeps ? columns_of(op, weights[t]) : elements;
    if (elements == 0) continue;
    const MemoryFormat format = memory_format(weights[t]);
    auto order = [&](const Tensor& tensor) -> Ordered& {
      return ordered.emplace_back(tensor, format);
    };
    tensors.push_back({
        static_cast<const float*>(order(grads[t]).read()),
        static_cast<float*>(order(weights[t]).written()),
        momentum != 0 ? static_cast<float*>(order(momenta[t]).written()) : nullptr,
        keeps ? order(standardized[t]).written() : nullptr,
        elements / columns,
        columns,
    });
  }
  const SgdOptions options = {lr,       momentum, dampening, weight_decay, nesterov,
                              maximize, fresh,    project,   eps};
  check_launch(op, bit_kernels_sgd(tensors.data(), static_cast<int64_t>(tensors.size()), element,
                                   &options, device.index(), device.stream()));
  for (Ordered& tensor : ordered) tensor.finish();
}

Tensor sgd_gradient_norm(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                         double eps) {
  constexpr const char* op = "bit_kernels::sgd_gradient_norm_cuda";
  STD_TORCH_CHECK(!weights.empty(), op, ": weights is empty; it must have a tensor");
  check_float32(op, "weights", weights);
  check_float32(op, "grads", grads);
  check_one_device(op, weights);
  check_list(op, "grads", grads, weights);

  const Device device(weights[0]);
  std::vector<Ordered> ordered;
  ordered.reserve(2 * weights.size());
  std::vector<SgdTensor> tensors;
  int64_t rows = 0;
  for (size_t t = 0; t < weights.size(); ++t) {
    const MemoryFormat format = memory_format(weights[t]);
    const int64_t columns = columns_of(op, weights[t]);
    const void* weight = ordered.emplace_back(weights[t], format).read();
    const void* gradient = ordered.emplace_back(grads[t], format).read();
    // Only read: the kernel that writes is another one.
    tensors.push_back({static_cast<const float*>(gradient),
                       const_cast<float*>(static_cast<const float*>(weight)), nullptr, nullptr,
                       weights[t].numel() / columns, columns});
    rows += tensors.back().rows;
  }
  Tensor squares = empty_floats_like(weights[0], {rows});
  Tensor norms = empty_floats_like(weights[0], {static_cast<int64_t>(weights.size())});
  check_launch(op, bit_kernels_sgd_gradient_norm(
                       tensors.data(), static_cast<int64_t>(tensors.size()), eps,
                       squares.mutable_data_ptr<float>(), norms.mutable_data_ptr<float>(),
                       device.index(), device.stream()));
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, BIT_KERNELS_DISPATCH_KEY, m) {
  m.impl("group_norm_relu_cuda", TORCH_BOX(&group_norm_relu));
  m.impl("group_norm_relu_backward_cuda", TORCH_BOX(&group_norm_relu_backward));
  m.impl("sgd_cuda", TORCH_BOX(&sgd));
  m.impl("sgd_gradient_norm_cuda", TORCH_BOX(&sgd_gradient_norm));
}

}  // namespace bit_kernels
