// torch.ops.bit_kernels.standardize_weight on the CPU: checks, memory layout, registration.
// The kernel is in standardize_weight_kernel.h, the op's definition in bit_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/checks.h"
#include "kernels.h"
#include "ops.h"

namespace bit_kernels {
namespace {

struct Rows {
  int64_t rows, columns;
};

Rows rows_of(const char* op, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() >= 2, op,
                  ": weight must have at least 2 dimensions (C_out, C_in, ...), has ",
                  weight.dim());
  int64_t columns = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) columns *= weight.size(d);
  return {weight.size(0), columns};
}

void check_results(const char* op, Element weight, Element result) {
  STD_TORCH_CHECK(weight == result || weight == Element::kFloat32, op,
                  ": a weight of a half type gives results of its own dtype only");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> standardize_weight(const Tensor& given, double eps,
                                                      std::optional<ScalarType> dtype) {
  constexpr const char* op = "bit_kernels::standardize_weight";
  const Element element = element_of(op, "weight", given);
  const Rows shape = rows_of(op, given);
  // In either layout an output channel's kernel is one run of memory.
  const Tensor weight = torch::stable::contiguous(given, memory_format(given));
  Tensor output = empty_like(weight, dtype.value_or(weight.scalar_type()));
  const Element result = element_of(op, "dtype", output);
  check_results(op, element, result);
  Tensor mean = empty_floats({shape.rows}), rstd = empty_floats({shape.rows});
  kernels().standardize_weight(shape.rows, shape.columns, element, result, weight.const_data_ptr(),
                               eps, output.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                               rstd.mutable_data_ptr<float>());
  return {output, mean, rstd};
}

Tensor standardize_weight_backward(const Tensor& grad_given, const Tensor& given,
                                   const Tensor& mean, const Tensor& rstd) {
  constexpr const char* op = "bit_kernels::standardize_weight_backward";
  const Element element = element_of(op, "weight", given);
  const Rows shape = rows_of(op, given);
  const Element result = element_of(op, "grad_output", grad_given);
  check_results(op, element, result);
  check_shape(op, "grad_output", grad_given, given);
  check_statistics(op, "mean", mean, given, shape.rows);
  check_statistics(op, "rstd", rstd, given, shape.rows);
  const Tensor weight = torch::stable::contiguous(given, memory_format(given));
  const Tensor grad_output = torch::stable::contiguous(grad_given, memory_format(given));
  Tensor grad_weight = torch::stable::empty_like(weight);
  kernels().standardize_weight_backward(shape.rows, shape.columns, element, result,
                                        grad_output.const_data_ptr(), weight.const_data_ptr(),
                                        mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                                        grad_weight.mutable_data_ptr());
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(bit_kernels, CPU, m) {
  m.impl("standardize_weight", TORCH_BOX(&standardize_weight));
  m.impl("standardize_weight_backward", TORCH_BOX(&standardize_weight_backward));
}

}  // namespace bit_kernels
