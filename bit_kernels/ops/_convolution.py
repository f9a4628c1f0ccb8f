"""The backward of a convolution, which others' ops and nodes are made of; not public.

It is aten::convolution_backward. The CPU's implementation, csrc/cpu/convolution.cpp, has the
gradient of a float32 channels_last weight from one matrix product.
"""

import torch

from bit_kernels.ops._layout import empty_output
from bit_kernels.ops._library import library

# needs: of input, weight and bias; those gradients come.
library.define(
    "convolution_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride, "
    "int[] padding, int[] dilation, int groups, int[] needs) -> Tensor[]"
)
convolution_backward = torch.ops.bit_kernels.convolution_backward.default


def plain(grad_output, input, weight, stride, padding, dilation, groups, needs):
    """The same in PyTorch's own operations."""
    found = torch.ops.aten.convolution_backward(
        grad_output, input, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0),
        groups, [bool(need) for need in needs],
    )  # fmt: skip
    return [gradient for gradient, need in zip(found, needs, strict=True) if need]


@torch.library.register_fake("bit_kernels::convolution_backward", lib=library)
def _fake(grad_output, input, weight, stride, padding, dilation, groups, needs):
    found = empty_output(input), empty_output(weight), weight.new_empty(weight.shape[:1])
    return [gradient for gradient, need in zip(found, needs, strict=True) if need]


# Where no kernel is registered for a device, the op itself still runs.
library.impl("convolution_backward", plain, "CompositeExplicitAutograd")
