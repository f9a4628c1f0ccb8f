// torch.ops.bit_kernels.group_norm_relu on the CPU: checks, memory layout, registration.
// The kernel is in group_norm_relu_kernel.h, the op's definition in bit_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/checks.h"
#include "kernels.h"
#include "ops.h"

namespace bit_kernels {
namespace {

GroupNormShape shape_of(const char* op, const Tensor& input, int64_t groups, bool channels_last,
                        bool relu) {
  STD_TORCH_CHECK(input.dim() >= 2, op, ": input must have at least 2 dimensions (N, C, ...), has ",
                  input.dim());
  const int64_t samples = input.size(0), channels = input.size(1);
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0, op, ": num_groups is ",
                  groups, "; it must divide the ", channels, " channels of the input");
  int64_t pixels = 1;
  for (int64_t d = 2; d < input.dim(); ++d) pixels *= input.size(d);
  // One pixel a channel is the same memory in both layouts, and rows of channels vectorise.
  return {samples, channels, groups, pixels, channels_last || pixels == 1, relu};
}

GroupNormShape shape_of(const char* op, const Tensor& input, const Tensor& mean,
                        const Tensor& rstd, MemoryFormat format, bool relu) {
  STD_TORCH_CHECK(mean.dim() == 2, op, ": mean must have shape (N, num_groups)");
  const GroupNormShape shape =
      shape_of(op, input, mean.size(1), format != MemoryFormat::Contiguous, relu);
  check_statistics(op, "mean", mean, input, shape.samples * shape.groups);
  check_statistics(op, "rstd", rstd, input, shape.samples * shape.groups);
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_relu(const Tensor& given, int64_t num_groups,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps,
                                                   bool relu) {
  constexpr const char* op = "bit_kernels::group_norm_relu";
  const Element element = element_of(op, "input", given);
  const MemoryFormat format = memory_format(given);
  const GroupNormShape shape =
      shape_of(op, given, num_groups, format != MemoryFormat::Contiguous, relu);
  const Parameter scale(op, "weight", weight, given, 1);
  const Parameter shift(op, "bias", bias, given, 0);

  const Tensor input = torch::stable::contiguous(given, format);
  Tensor output = torch::stable::empty_like(input);
  Tensor mean = empty_floats({shape.samples, num_groups});
  Tensor rstd = empty_floats({shape.samples, num_groups});
  kernels().group_norm_relu(shape, element, input.const_data_ptr(), scale.data(), shift.data(),
                            eps, output.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                            rstd.mutable_data_ptr<float>());
  return {output, mean, rstd};
}

Tensor group_norm_relu_apply(const Tensor& given, const Tensor& mean, const Tensor& rstd,
                             const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, bool relu) {
  constexpr const char* op = "bit_kernels::group_norm_relu_apply";
  const Element element = element_of(op, "input", given);
  const MemoryFormat format = memory_format(given);
  const GroupNormShape shape = shape_of(op, given, mean, rstd, format, relu);
  const Parameter scale(op, "weight", weight, given, 1);
  const Parameter shift(op, "bias", bias, given, 0);

  const Tensor input = torch::stable::contiguous(given, format);
  Tensor output = torch::stable::empty_like(input);
  kernels().group_norm_relu_apply(shape, element, input.const_data_ptr(),
                                  mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                                  scale.data(), shift.data(), output.mutable_data_ptr());
  return output;
}

std::tuple<Tensor, Tensor> add_group_statistics(Tensor input, const Tensor& other_given,
                                                int64_t num_groups, double eps) {
  constexpr const char* op = "bit_kernels::add_group_statistics";
  const Element element = element_of(op, "input", input);
  check_like(op, "other", other_given, input);
  const MemoryFormat format = memory_format(input);
  const GroupNormShape shape =
      shape_of(op, input, num_groups, format != MemoryFormat::Contiguous, false);
  // Where it doesn't lie in order, the sum is taken in a copy and brought back.
  const Tensor sum = torch::stable::contiguous(input, format);
  const Tensor other = torch::stable::contiguous(other_given, format);
  Tensor mean = empty_floats({shape.samples, num_groups});
  Tensor rstd = empty_floats({shape.samples, num_groups});
  kernels().add_group_statistics(shape, element, sum.mutable_data_ptr(), other.const_data_ptr(),
                                 eps, mean.mutable_data_ptr<float>(),
                                 rstd.mutable_data_ptr<float>());
  if (sum.const_data_ptr() != input.const_data_ptr()) torch::stable::copy_(input, sum);
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward(
    const Tensor& grad_given, const Tensor& given, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool relu,
    const std::optional<Tensor>& skip_given) {
  constexpr const char* op = "bit_kernels::group_norm_relu_backward";
  const Element element = element_of(op, "input", given);
  check_like(op, "grad_output", grad_given, given);
  if (skip_given) check_like(op, "grad_skip", *skip_given, given);
  const MemoryFormat format = memory_format(given);
  const GroupNormShape shape = shape_of(op, given, mean, rstd, format, relu);
  const Parameter scale(op, "weight", weight, given, 1);
  const Parameter shift(op, "bias", bias, given, 0);

  const Tensor input = torch::stable::contiguous(given, format);
  const Tensor grad_output = torch::stable::contiguous(grad_given, format);
  std::optional<Tensor> skip;
  if (skip_given) skip = torch::stable::contiguous(*skip_given, format);
  Tensor grad_input = torch::stable::empty_like(input);
  Tensor grad_weight = empty_floats({shape.channels});
  Tensor grad_bias = empty_floats({shape.channels});
  kernels().group_norm_relu_backward(
      shape, element, grad_output.const_data_ptr(), input.const_data_ptr(),
      mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), scale.data(), shift.data(),
      skip ? skip->const_data_ptr() : nullptr, grad_input.mutable_data_ptr(),
      grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>());
  return {grad_input, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, CPU, m) {
  m.impl("group_norm_relu", TORCH_BOX(&group_norm_relu));
  m.impl("group_norm_relu_apply", TORCH_BOX(&group_norm_relu_apply));
  m.impl("add_group_statistics", TORCH_BOX(&add_group_statistics));
  m.impl("group_norm_relu_backward", TORCH_BOX(&group_norm_relu_backward));
}

}  // namespace bit_kernels
