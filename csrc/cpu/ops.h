// The CPU implementations of the ops that other ops are made of.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace bit_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> group_norm_relu(const Tensor& input, int64_t num_groups,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps,
                                                   bool relu);
Tensor group_norm_relu_apply(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                             const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, bool relu);
std::tuple<Tensor, Tensor> add_group_statistics(Tensor input, const Tensor& other,
                                                int64_t num_groups, double eps);
std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool relu,
    const std::optional<Tensor>& grad_skip);

std::tuple<Tensor, Tensor, Tensor> standardize_weight(const Tensor& weight, double eps,
                                                      std::optional<ScalarType> dtype);
Tensor standardize_weight_backward(const Tensor& grad_output, const Tensor& weight,
                                   const Tensor& mean, const Tensor& rstd);

// Of a 2-d convolution: two numbers each.
struct ConvGeometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ConvGeometry& geometry);
// The gradients of input, weight and bias, each if it is needed.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output,
                                                        const Tensor& input, const Tensor& weight,
                                                        const ConvGeometry& geometry,
                                                        std::array<bool, 3> needs);

}  // namespace bit_kernels
