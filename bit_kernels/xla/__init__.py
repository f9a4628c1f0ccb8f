"""The ops as JAX functions, for XLA on TPUs, GPUs and CPUs; imports jax and not torch.

Activations are (N, H, W, C) and kernels (kh, kw, C_in, C_out), as in flax. Everything else is as in
`bit_kernels.functional`: the same names, definitions, defaults and statistics in float32.

All of it is plain jnp with gradients of its own; docs/xla.md has the compiler's figures for that and
for Pallas kernels. `jax.grad` works, twice too; `jax.jvp` doesn't.
"""

from bit_kernels.xla.group_norm_relu import group_norm_relu
from bit_kernels.xla.mixup import mixup, mixup_cross_entropy
from bit_kernels.xla.norm_relu_conv import Conv, Norm, convolve, norm_relu_conv
from bit_kernels.xla.sgd import SGDState, sgd, used
from bit_kernels.xla.standardize_weight import project_gradient, standardize_weight

__all__ = [
    "Conv",
    "Norm",
    "SGDState",
    "convolve",
    "group_norm_relu",
    "mixup",
    "mixup_cross_entropy",
    "norm_relu_conv",
    "project_gradient",
    "sgd",
    "standardize_weight",
    "used",
]
