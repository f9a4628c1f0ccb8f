"""The public functions, gathered."""

from bit_kernels.ops.group_norm_relu import group_norm_relu
from bit_kernels.ops.mixup import mixup
from bit_kernels.ops.norm_relu_conv import Conv as Conv
from bit_kernels.ops.norm_relu_conv import Norm as Norm
from bit_kernels.ops.norm_relu_conv import norm_relu_conv
from bit_kernels.ops.sgd import sgd
from bit_kernels.ops.standardize_weight import standardize_weight

__all__ = ["group_norm_relu", "mixup", "norm_relu_conv", "sgd", "standardize_weight"]
