"""The namespace torch.ops.bit_kernels; each op's file defines its own schema in it."""

import torch
from torch import Tensor

library = torch.library.Library("bit_kernels", "DEF")

# What PyTorch and the kernels raise for arguments that don't fit.
REFUSALS = (ArithmeticError, LookupError, RuntimeError, ValueError)


def call_kernel(op, *args):
    """The op without its autograd layer, which costs more than a small kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def apply_node(function, *args):
    """torch.autograd.Function.apply without its look-out for torch.func, which `choose` has done:
    it costs more than a small kernel."""
    return super(torch.autograd.Function, function).apply(*args)


@torch.compiler.assume_constant_result  # torch 2.11's compiler can't look into it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs a convolution of `tensor` in, or None where it doesn't."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not _has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
