"""Fused kernels for networks with GroupNorm and weight-standardized convolutions.

`StdConv2d` and `GroupNorm` are drop-ins for nn.Conv2d and nn.GroupNorm, `norm_relu_conv` runs one
after the other and keeps only what goes in for backward, `convert` puts them into anybody's network,
`optim.SGD` keeps their weights standardized in its step, `freeze` makes a network ready for
inference. `functional` holds the functions beneath, `backends()` tells what serves them here.

`bit_kernels.xla` has the functions for JAX, and works where there is no torch.
"""

from importlib.util import find_spec

__all__ = [
    "GroupNorm",
    "StdConv2d",
    "backends",
    "convert",
    "freeze",
    "functional",
    "norm_relu_conv",
    "optim",
]
__version__ = "0.1.0"

if find_spec("torch") is not None:
    from bit_kernels import functional, optim
    from bit_kernels.backends import backends
    from bit_kernels.convert import convert
    from bit_kernels.freeze import freeze
    from bit_kernels.modules import GroupNorm, StdConv2d, norm_relu_conv
else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"bit_kernels.{name} needs torch, which is not installed here")
        raise AttributeError(f"module 'bit_kernels' has no attribute {name!r}")
