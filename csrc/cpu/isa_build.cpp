// Every CPU kernel for one instruction set. setup.py compiles this file once for each of them,
// with BIT_KERNELS_ISA its name and the compiler's flags for it.
#include "group_norm_relu_kernel.h"
#include "sgd_kernel.h"
#include "standardize_weight_kernel.h"

#define BIT_KERNELS_STRING_(name) #name
#define BIT_KERNELS_STRING(name) BIT_KERNELS_STRING_(name)

namespace bit_kernels {
namespace BIT_KERNELS_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    BIT_KERNELS_STRING(BIT_KERNELS_ISA),
    group_norm_relu,
    group_norm_relu_apply,
    add_group_statistics,
    add,
    group_norm_relu_backward,
    standardize_weight,
    standardize_weight_backward,
    sgd,
    sgd_gradient_squares,
};

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
