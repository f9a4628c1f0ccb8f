// A convolution and its backward: PyTorch's own, but matrix products where these are faster.
//
// The gradient of a weight. oneDNN's reaches half the rate of its two other convolutions, and is
// copied twice on its way from oneDNN's memory order to the weight's. In channels_last the same sums
// are one product of two matrices that lie in memory already,
//
//   grad_weight (C_out, kh * kw * C_in) = grad_output (positions, C_out)^T
//                                         @ patches (positions, kh * kw * C_in),
//
// whose result is the weight in its channels_last order. For a kernel of 1x1 without strides the
// patches are the input itself; else they are copied out of it, some output rows at a time.
//
// The output, patches @ weight^T, and for a kernel of 1x1 the gradient of the input, grad_output @
// weight, where there are few positions: oneDNN then spends its time on bringing the weight into its
// own memory order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "kernels.h"
#include "ops.h"

namespace bit_kernels {
namespace {

using Ints = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

// Patches are copied so many bytes at a time, which a shared cache holds, but no fewer positions
// than make the product worth adding to what is there.
constexpr int64_t kPatchBytes = 16 << 20;
constexpr int64_t kPositionsPerChannel = 4;

// Measured on 2 cores of an AMD EPYC: up to so many positions products take 0.6 to 1.06 of the time,
// those over patches if they are of so many channels.
constexpr int64_t kFewPositions = 512, kPatchChannels = 512;

struct Sizes {
  int64_t samples, channels, height, width;  // of the input
  int64_t kernel_height, kernel_width, out_channels, out_height, out_width;

  int64_t positions() const { return samples * out_height * out_width; }
  int64_t patch() const { return kernel_height * kernel_width * channels; }
};

bool is_pointwise(const Sizes& s, const ConvGeometry& g) {
  return s.kernel_height == 1 && s.kernel_width == 1 && g.stride[0] == 1 && g.stride[1] == 1 &&
         g.padding[0] == 0 && g.padding[1] == 0;
}

// The patches of output rows `begin` to `end`, which are counted through all samples.
void copy_patches(const Sizes& s, const ConvGeometry& g, const float* input, int64_t begin,
                  int64_t end, float* patches) {
  const int64_t channels = s.channels, run = s.kernel_width * channels;
  const bool dense = g.dilation[1] == 1;
  const bool parallel = (end - begin) * s.out_width * s.patch() >= kParallelElements;
  parallel_for(end - begin, parallel, [&](int64_t from, int64_t to) {
    for (int64_t row = begin + from; row < begin + to; ++row) {
      const int64_t sample = row / s.out_height;
      const int64_t top = row % s.out_height * g.stride[0] - g.padding[0];
      float* out = patches + (row - begin) * s.out_width * s.patch();
      for (int64_t column = 0; column < s.out_width; ++column) {
        const int64_t left = column * g.stride[1] - g.padding[1];
        for (int64_t ky = 0; ky < s.kernel_height; ++ky, out += run) {
          const int64_t y = top + ky * g.dilation[0];
          if (y < 0 || y >= s.height) {
            memset(out, 0, run * sizeof(float));
            continue;
          }
          const float* line = input + (sample * s.height + y) * s.width * channels;
          if (dense && left >= 0 && left + s.kernel_width <= s.width) {
            memcpy(out, line + left * channels, run * sizeof(float));
            continue;
          }
          for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
            const int64_t x = left + kx * g.dilation[1];
            if (x < 0 || x >= s.width)
              memset(out + kx * channels, 0, channels * sizeof(float));
            else
              memcpy(out + kx * channels, line + x * channels, channels * sizeof(float));
          }
        }
      }
    }
  });
}

// The elements of `tensor` from number `offset` on, as a matrix.
Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride, int64_t offset = 0) {
  return call_aten("aten::as_strided", "", tensor, Ints({rows, columns}),
                   Ints({row_stride, column_stride}),
                   std::optional(tensor.storage_offset() + offset));
}

// With AVX-512 oneDNN's convolutions do more than twice the operations a second; the products of
// PyTorch's library do so on some processors only: on an AMD EPYC, with them, a step of R50x1 took
// 1.6 times its convolutions' time, and takes 1.2 without.
bool products_pay() {
  static const bool pay = best_isa() != Isa::kAvx512;
  return pay;
}

// Whether the convolution is a matrix product of what lies in memory. What doesn't fit isn't:
// PyTorch's own convolution refuses it in its own words.
bool is_matrix(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  if (!products_pay()) return false;
  if (input.dim() != 4 || weight.dim() != 4 || g.stride.size() != 2 || g.padding.size() != 2 ||
      g.dilation.size() != 2)
    return false;
  for (int d = 0; d < 2; ++d)
    if (g.stride[d] < 1 || g.dilation[d] < 1 || g.padding[d] < 0) return false;
  return input.is_cpu() && weight.is_cpu() && input.scalar_type() == ScalarType::Float &&
         weight.scalar_type() == ScalarType::Float && g.groups == 1 &&
         weight.size(1) == input.size(1) && input.numel() > 0 && weight.numel() > 0 &&
         memory_format(input) == MemoryFormat::ChannelsLast;
}

// Whether `weight` lies as a matrix (C_out, kh * kw * C_in).
bool lies_as_matrix(const Tensor& weight) { return lies_in(MemoryFormat::ChannelsLast, weight); }

Sizes sizes_of(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  auto out = [&](int64_t d) {
    const int64_t room = input.size(2 + d) + 2 * g.padding[d] -
                         g.dilation[d] * (weight.size(2 + d) - 1) - 1;
    return room < 0 ? 0 : room / g.stride[d] + 1;
  };
  return {input.size(0),  input.size(1),  input.size(2), input.size(3), weight.size(2),
          weight.size(3), weight.size(0), out(0),        out(1)};
}

bool is_output(const Tensor& tensor, const Sizes& s) {
  return tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 4 &&
         tensor.numel() > 0 && tensor.size(0) == s.samples && tensor.size(1) == s.out_channels &&
         tensor.size(2) == s.out_height && tensor.size(3) == s.out_width;
}

bool has_few_positions(const Sizes& s, const ConvGeometry& g) {
  return s.positions() > 0 && s.positions() <= kFewPositions &&
         (is_pointwise(s, g) || s.channels >= kPatchChannels);
}

// An uninitialised channels_last map.
Tensor empty_map(int64_t samples, int64_t channels, int64_t height, int64_t width) {
  return call_aten("aten::empty_strided", "", Ints({samples, channels, height, width}),
                   Ints({height * width * channels, 1, width * channels, channels}),
                   std::optional(ScalarType::Float), std::nullopt, std::nullopt, std::nullopt);
}

void multiply(const Tensor& left, const Tensor& right, const Tensor& product) {
  call_aten("aten::mm", "out", left, right, product);
}

// patches @ weight^T
Tensor output_by_product(const Tensor& input, const Tensor& weight, const Sizes& s,
                         const ConvGeometry& g) {
  const Tensor dense_input = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const int64_t positions = s.positions(), patch = s.patch(), out = s.out_channels;
  Tensor patches = dense_input;
  if (!is_pointwise(s, g)) {
    patches = empty_floats({positions, patch});
    copy_patches(s, g, dense_input.const_data_ptr<float>(), 0, s.samples * s.out_height,
                 patches.mutable_data_ptr<float>());
  }
  const Tensor result = empty_map(s.samples, out, s.out_height, s.out_width);
  multiply(matrix(patches, positions, patch, patch, 1), matrix(weight, patch, out, 1, patch),
           matrix(result, positions, out, out, 1));
  return result;
}

// grad_output @ weight, of a kernel of 1x1 without strides
Tensor grad_input_by_product(const Tensor& grad_output, const Tensor& weight, const Sizes& s) {
  const Tensor dense_grad = torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast);
  const int64_t positions = s.positions(), out = s.out_channels;
  const Tensor result = empty_map(s.samples, s.channels, s.height, s.width);
  multiply(matrix(dense_grad, positions, out, out, 1),
           matrix(weight, out, s.channels, s.channels, 1),
           matrix(result, positions, s.channels, s.channels, 1));
  return result;
}

// grad_output^T @ patches
Tensor grad_weight_by_product(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Sizes& s, const ConvGeometry& g) {
  const Tensor dense_input = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor dense_grad = torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast);
  const int64_t out = s.out_channels, patch = s.patch();
  const int64_t kh = s.kernel_height, kw = s.kernel_width, c = s.channels;
  const bool point = kh == 1 && kw == 1;
  const Tensor result = call_aten(
      "aten::empty_strided", "", Ints({out, c, kh, kw}),
      Ints({patch, 1, point ? weight.stride(2) : kw * c, point ? weight.stride(3) : c}),
      std::optional(ScalarType::Float), std::nullopt, std::nullopt, std::nullopt);
  const Tensor gradient = matrix(result, out, patch, patch, 1);
  if (is_pointwise(s, g)) {
    multiply(matrix(dense_grad, out, s.positions(), 1, out),
             matrix(dense_input, s.positions(), c, c, 1), gradient);
    return result;
  }
  const int64_t row_bytes = s.out_width * patch * sizeof(float);
  const int64_t enough = kPositionsPerChannel * out / s.out_width + 1;
  const int64_t rows = s.samples * s.out_height;
  const int64_t at_once = std::min(rows, std::max(kPatchBytes / row_bytes + 1, enough));
  const Tensor patches = empty_floats({at_once * s.out_width, patch});
  std::optional<Tensor> part;
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const int64_t end = std::min(begin + at_once, rows);
    const int64_t positions = (end - begin) * s.out_width;
    copy_patches(s, g, dense_input.const_data_ptr<float>(), begin, end,
                 patches.mutable_data_ptr<float>());
    if (begin > 0 && !part) part = empty_floats({out, patch});
    multiply(matrix(dense_grad, out, positions, 1, out, begin * s.out_width * out),
             matrix(patches, positions, patch, patch, 1), begin > 0 ? *part : gradient);
    if (begin > 0)
      kernels().add(out * patch, Element::kFloat32, gradient.mutable_data_ptr(),
                    part->const_data_ptr());
  }
  return torch::stable::contiguous(result, memory_format(weight));
}

}  // namespace

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ConvGeometry& g) {
  if (!bias && is_matrix(input, weight, g) && lies_as_matrix(weight)) {
    const Sizes s = sizes_of(input, weight, g);
    if (has_few_positions(s, g)) return output_by_product(input, weight, s, g);
  }
  return call_aten("aten::convolution", "", input, weight, bias, Ints(g.stride), Ints(g.padding),
                   Ints(g.dilation), false, Ints({0, 0}), g.groups);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output,
                                                        const Tensor& input, const Tensor& weight,
                                                        const ConvGeometry& g,
                                                        std::array<bool, 3> needs) {
  Tensor of_input, of_weight;
  const Sizes s = is_matrix(input, weight, g) ? sizes_of(input, weight, g) : Sizes{};
  if (is_output(grad_output, s)) {
    // oneDNN has the bias's gradient from the weight's.
    if (needs[1] && !needs[2]) {
      of_weight = grad_weight_by_product(grad_output, input, weight, s, g);
      needs[1] = false;
    }
    if (needs[0] && is_pointwise(s, g) && has_few_positions(s, g) && lies_as_matrix(weight)) {
      of_input = grad_input_by_product(grad_output, weight, s);
      needs[0] = false;
    }
    if (!needs[0] && !needs[1] && !needs[2]) return {of_input, of_weight, Tensor()};
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 11> stack = {
      from(grad_output),
      from(input),
      from(weight),
      from(std::optional(std::vector<int64_t>{weight.size(0)})),
      from(Ints(g.stride)),
      from(Ints(g.padding)),
      from(Ints(g.dilation)),
      from(false),
      from(Ints({0, 0})),
      from(g.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(needs.data(), needs.size()))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(),
                                               TORCH_ABI_VERSION));
  const Tensor grad_input = to<Tensor>(stack[0]), grad_weight = to<Tensor>(stack[1]);
  return {of_input.defined() ? of_input : grad_input,
          of_weight.defined() ? of_weight : grad_weight, to<Tensor>(stack[2])};
}

static std::vector<Tensor> convolution_backward_op(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, std::vector<int64_t> needs) {
  constexpr const char* op = "bit_kernels::convolution_backward";
  STD_TORCH_CHECK(needs.size() == 3, op, ": needs must be of input, weight and bias");
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && stride.size() == 2 &&
                      padding.size() == 2 && dilation.size() == 2,
                  op, ": this is the backward of a 2-d convolution");
  const auto [of_input, of_weight, of_bias] = convolution_backward(
      grad_output, input, weight, {stride, padding, dilation, groups},
      {needs[0] != 0, needs[1] != 0, needs[2] != 0});
  std::vector<Tensor> found;
  if (needs[0]) found.push_back(of_input);
  if (needs[1]) found.push_back(of_weight);
  if (needs[2]) found.push_back(of_bias);
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, CPU, m) {
  m.impl("convolution_backward", TORCH_BOX(&convolution_backward_op));
}

}  // namespace bit_kernels
