"""The public functions, gathered."""

from bit_kernels.ops.group_norm_relu import group_norm_relu
from bit_kernels.ops.mixup import mixup
from bit_kernels.ops.standardize_weight import standardize_weight

__all__ = ["group_norm_relu", "mixup", "standardize_weight"]
