// torch.ops.bit_kernels.sgd on the CPU: checks, memory layout, registration.
// The kernel is in sgd_kernel.h, the op's definition in bit_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/tensor_lists.h"
#include "kernels.h"

namespace bit_kernels {
namespace {

// What is used as it is may be cut at every cache line.
constexpr int64_t kLineFloats = 16;

void sgd(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
         const std::vector<Tensor>& momenta, const std::vector<Tensor>& standardized, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
         bool fresh, bool project, double eps) {
  constexpr const char* op = "bit_kernels::sgd";
  check_float32(op, "weights", weights);
  check_float32(op, "grads", grads);
  check_float32(op, "momenta", momenta);
  check_list(op, "grads", grads, weights);
  if (momentum != 0) check_list(op, "momenta", momenta, weights);
  const bool keeps = !standardized.empty();
  STD_TORCH_CHECK(keeps || !project || weights.empty(), op,
                  ": project is True; it may be so with standardized weights only");
  Element element = Element::kFloat32;
  if (keeps) {
    check_list(op, "standardized", standardized, weights);
    element = element_of(op, "standardized", standardized[0]);
    for (const Tensor& tensor : standardized)
      STD_TORCH_CHECK(tensor.scalar_type() == standardized[0].scalar_type(), op,
                      ": standardized must all have one dtype");
  }

  std::vector<Ordered> ordered;
  ordered.reserve(4 * weights.size());
  std::vector<SgdTensor> tensors;
  tensors.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const MemoryFormat format = memory_format(weights[t]);
    auto order = [&](const Tensor& tensor) -> Ordered& {
      return ordered.emplace_back(tensor, format);
    };
    tensors.push_back({
        weights[t].numel(),
        keeps ? columns_of(op, weights[t]) : kLineFloats,
        static_cast<const float*>(order(grads[t]).read()),
        static_cast<float*>(order(weights[t]).written()),
        momentum != 0 ? static_cast<float*>(order(momenta[t]).written()) : nullptr,
        keeps ? order(standardized[t]).written() : nullptr,
    });
  }
  kernels().sgd(tensors.data(), tensors.size(), element,
                {lr, momentum, dampening, weight_decay, nesterov, maximize, fresh, project, eps});
  for (Ordered& tensor : ordered) tensor.finish();
}

Tensor sgd_gradient_norm(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                         double eps) {
  constexpr const char* op = "bit_kernels::sgd_gradient_norm";
  check_float32(op, "weights", weights);
  check_float32(op, "grads", grads);
  check_list(op, "grads", grads, weights);
  std::vector<Ordered> ordered;
  ordered.reserve(2 * weights.size());
  std::vector<SgdTensor> tensors;
  std::vector<std::vector<double>> squares;
  std::vector<double*> places;
  for (size_t t = 0; t < weights.size(); ++t) {
    const MemoryFormat format = memory_format(weights[t]);
    const int64_t columns = columns_of(op, weights[t]);
    const void* weight = ordered.emplace_back(weights[t], format).read();
    tensors.push_back({weights[t].numel(), columns,
                       static_cast<const float*>(ordered.emplace_back(grads[t], format).read()),
                       // Only read: the kernel that writes is another one.
                       const_cast<float*>(static_cast<const float*>(weight)), nullptr, nullptr});
    squares.emplace_back(weights[t].numel() / columns);
    places.push_back(squares.back().data());
  }
  kernels().sgd_gradient_squares(tensors.data(), tensors.size(), eps, places.data());
  Tensor norms = empty_floats({static_cast<int64_t>(weights.size())});
  float* norm = norms.mutable_data_ptr<float>();
  for (size_t t = 0; t < weights.size(); ++t) {
    double sum = 0;
    for (const double square : squares[t]) sum += square;
    norm[t] = static_cast<float>(std::sqrt(sum));
  }
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, CPU, m) {
  m.impl("sgd", TORCH_BOX(&sgd));
  m.impl("sgd_gradient_norm", TORCH_BOX(&sgd_gradient_norm));
}

}  // namespace bit_kernels
