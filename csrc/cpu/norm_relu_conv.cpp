// torch.ops.bit_kernels.norm_relu_conv on the CPU: the kernels of group_norm_relu and
// standardize_weight around PyTorch's convolution, in one call from Python each way. A call of many
// parts from Python costs as much as the kernels of a small map, and more once a convolution has
// emptied the caches.
//
// The op's definition is in bit_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "ops.h"

namespace bit_kernels {
namespace {

struct Conv {
  Tensor weight;
  std::optional<Tensor> bias, standardized;
  ConvGeometry geometry;
  double eps;  // negative: the weight is used as it is
};

constexpr int64_t kNumbers = 9;  // of the geometry of one convolution

std::vector<Conv> convs_of(const char* op, const std::vector<Tensor>& tensors,
                           const std::vector<int64_t>& geometry,
                           const std::vector<double>& weight_eps) {
  std::vector<Conv> convs;
  size_t next = 0;
  auto tensor = [&] {
    STD_TORCH_CHECK(next < tensors.size(), op, ": conv_tensors holds too few tensors");
    return tensors[next++];
  };
  STD_TORCH_CHECK(geometry.size() == kNumbers * weight_eps.size(), op, ": geometry has ",
                  geometry.size(), " numbers; it must have ", kNumbers, " for each convolution");
  for (size_t i = 0; i < weight_eps.size(); ++i) {
    const int64_t* g = geometry.data() + kNumbers * i;
    Conv conv;
    conv.weight = tensor();
    if (g[7]) conv.bias = tensor();
    if (g[8]) conv.standardized = tensor();
    conv.geometry = {{g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, g[6]};
    conv.eps = weight_eps[i];
    convs.push_back(conv);
  }
  return convs;
}

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// total += part, where total lies in `format`.
void add(const char* op, const char* name, const Tensor& total, const Tensor& part,
         MemoryFormat format) {
  check_like(op, name, part, total);
  const Tensor other = torch::stable::contiguous(part, format);
  kernels().add(total.numel(), element_of(op, name, total), total.mutable_data_ptr(),
                other.const_data_ptr());
}

struct UsedWeight {
  Tensor weight, mean, rstd;
  bool standardized_here;
};

UsedWeight used_weight(const Conv& conv, ScalarType dtype) {
  if (conv.standardized) return {in_dtype(*conv.standardized, dtype), {}, {}, false};
  if (conv.eps < 0) return {in_dtype(conv.weight, dtype), {}, {}, false};
  auto [weight, mean, rstd] = standardize_weight(conv.weight, conv.eps, dtype);
  return {weight, mean, rstd, true};
}

using Outputs = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor>;

Outputs norm_relu_conv(const Tensor& input, const std::optional<Tensor>& known_mean,
                       const std::optional<Tensor>& known_rstd,
                       const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, std::vector<Tensor> conv_tensors,
                       int64_t num_groups, double eps, bool relu, std::vector<int64_t> geometry,
                       std::vector<double> weight_eps, int64_t next_groups, double next_eps) {
  constexpr const char* op = "bit_kernels::norm_relu_conv";
  const std::vector<Conv> convs = convs_of(op, conv_tensors, geometry, weight_eps);
  Tensor normal, mean, rstd;
  if (known_mean && known_rstd) {
    normal = group_norm_relu_apply(input, *known_mean, *known_rstd, weight, bias, relu);
    mean = empty_floats({0});
    rstd = empty_floats({0});
  } else {
    std::tie(normal, mean, rstd) = group_norm_relu(input, num_groups, weight, bias, eps, relu);
  }
  const ScalarType dtype = normal.scalar_type();
  const MemoryFormat format = memory_format(input);
  std::vector<Tensor> outputs;
  for (const Conv& conv : convs) {
    std::optional<Tensor> shift;
    if (conv.bias) shift = in_dtype(*conv.bias, dtype);
    const Tensor output =
        convolution(normal, used_weight(conv, dtype).weight, shift, conv.geometry);
    outputs.push_back(torch::stable::contiguous(output, format));
  }
  if (residual && next_groups > 0) {
    const auto [next_mean, next_rstd] =
        add_group_statistics(outputs[0], *residual, next_groups, next_eps);
    return {outputs, mean, rstd, next_mean, next_rstd};
  }
  if (residual) add(op, "residual", outputs[0], *residual, format);
  return {outputs, mean, rstd, empty_floats({0}), empty_floats({0})};
}

// grad_outputs: one for each convolution; needs: of the input, weight, bias and each of
// conv_tensors. The gradients that are needed, in that order.
std::vector<Tensor> norm_relu_conv_backward(
    std::vector<Tensor> grad_outputs, const std::optional<Tensor>& grad_skip, const Tensor& input,
    const Tensor& mean, const Tensor& rstd, std::vector<int64_t> needs,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    std::vector<Tensor> conv_tensors, bool relu, std::vector<int64_t> geometry,
    std::vector<double> weight_eps) {
  constexpr const char* op = "bit_kernels::norm_relu_conv_backward";
  const std::vector<Conv> convs = convs_of(op, conv_tensors, geometry, weight_eps);
  STD_TORCH_CHECK(grad_outputs.size() == convs.size() && needs.size() == 3 + conv_tensors.size(),
                  op, ": there must be a gradient for each convolution, and a need for each tensor");
  const MemoryFormat format = memory_format(input);
  const bool needs_normal = needs[0] || needs[1] || needs[2];
  bool needs_kernel = false;
  for (size_t i = 0, at = 3; i < convs.size(); ++i) {
    needs_kernel = needs_kernel || needs[at];
    at += 1 + convs[i].bias.has_value() + convs[i].standardized.has_value();
  }
  // For the input's gradient alone a convolution needs its input's shape, not its values.
  Tensor normal =
      needs_kernel ? group_norm_relu_apply(input, mean, rstd, weight, bias, relu) : input;

  std::optional<Tensor> grad_normal;
  std::vector<Tensor> of_convs;
  for (size_t i = 0, at = 3; i < convs.size(); ++i) {
    const Conv& conv = convs[i];
    const bool needs_weight = needs[at++], needs_bias = conv.bias && needs[at++];
    if (conv.standardized) ++at;
    if (!needs_normal && !needs_weight && !needs_bias) continue;
    const UsedWeight used = used_weight(conv, input.scalar_type());
    auto [grad_input, grad_weight, grad_bias] =
        convolution_backward(grad_outputs[i], normal, used.weight, conv.geometry,
                             {needs_normal, needs_weight, needs_bias});
    if (needs_normal) grad_input = torch::stable::contiguous(grad_input, format);
    if (needs_normal && grad_normal)
      add(op, "grad_output", *grad_normal, grad_input, format);
    else if (needs_normal)
      grad_normal = grad_input;
    if (needs_weight && used.standardized_here)
      grad_weight = standardize_weight_backward(grad_weight, conv.weight, used.mean, used.rstd);
    if (needs_weight)
      of_convs.push_back(torch::stable::contiguous(
          in_dtype(grad_weight, conv.weight.scalar_type()), memory_format(conv.weight)));
    if (needs_bias) of_convs.push_back(in_dtype(grad_bias, conv.bias->scalar_type()));
  }
  normal = input;  // frees the activation before the last allocation

  std::vector<Tensor> found;
  if (needs_normal) {
    const auto [grad_input, grad_weight, grad_bias] = group_norm_relu_backward(
        *grad_normal, input, mean, rstd, weight, bias, relu, grad_skip);
    if (needs[0]) found.push_back(grad_input);
    if (needs[1]) found.push_back(in_dtype(grad_weight, weight->scalar_type()));
    if (needs[2]) found.push_back(in_dtype(grad_bias, bias->scalar_type()));
  }
  found.insert(found.end(), of_convs.begin(), of_convs.end());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, CPU, m) {
  m.impl("norm_relu_conv", TORCH_BOX(&norm_relu_conv));
  m.impl("norm_relu_conv_backward", TORCH_BOX(&norm_relu_conv_backward));
}

}  // namespace bit_kernels
