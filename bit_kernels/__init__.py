"""Fused kernels for networks with GroupNorm and weight-standardized convolutions.

`StdConv2d` and `GroupNorm` are drop-ins for nn.Conv2d and nn.GroupNorm, `norm_relu_conv` runs one
after the other in half the memory, `convert` puts them into anybody's network, `freeze` makes one
ready for inference, `functional` holds the functions beneath them, `backends()` tells what serves
them on this machine.
"""

from bit_kernels import functional
from bit_kernels.backends import backends
from bit_kernels.convert import convert
from bit_kernels.freeze import freeze
from bit_kernels.modules import GroupNorm, StdConv2d, norm_relu_conv

__all__ = [
    "GroupNorm",
    "StdConv2d",
    "backends",
    "convert",
    "freeze",
    "functional",
    "norm_relu_conv",
]
__version__ = "0.1.0"
