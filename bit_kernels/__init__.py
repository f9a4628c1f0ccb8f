"""Fused kernels for networks with GroupNorm and weight-standardized convolutions.

`StdConv2d` and `GroupNorm` are drop-ins for nn.Conv2d and nn.GroupNorm, `norm_relu_conv` runs one
after the other and keeps only what goes in for backward, `optim.SGD` keeps the weights standardized
in its step, `functional` holds the functions beneath them, `backends()` tells what serves them on
this machine.
"""

from bit_kernels import functional, optim
from bit_kernels.backends import backends
from bit_kernels.modules import GroupNorm, StdConv2d, norm_relu_conv

__all__ = ["GroupNorm", "StdConv2d", "backends", "functional", "norm_relu_conv", "optim"]
__version__ = "0.1.0"
