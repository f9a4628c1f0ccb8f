"""The namespace torch.ops.bit_kernels; each op's file defines its own schema in it."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bit_kernels import _library
from bit_kernels.backends import choose

library = torch.library.Library("bit_kernels", "DEF")

# Of ops whose kernels read tables of addresses: torch.compile's own CUDA graphs, which allow no memory
# that outlives them, leave these out.
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)

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


def gpu_kernels(op: str) -> ModuleType:
    """bit_kernels/triton/<op>.py, imported where a call is served by it: Triton takes its time."""
    return importlib.import_module(f"bit_kernels.triton.{op}")


def implement(schema: str, op: str, plain: Callable, on_gpu: Callable | None = None) -> None:
    """Registers what `schema` runs where no C++ kernel is registered for a device.

    op: which it belongs to, for the choice of a backend.
    plain: in PyTorch's own operations, for any device.
    on_gpu: with the Triton kernels; checks its arguments.
    """
    library.impl(schema, plain, "CompositeExplicitAutograd")
    if on_gpu is None or _library.why_not_triton is not None:
        return

    def serve(first, *args):
        decides = first if isinstance(first, Tensor) else first[0]
        chosen = plain if choose(op, decides) == "reference" else on_gpu
        return chosen(first, *args)

    library.impl(schema, serve, "CUDA")
    if _library.interpreted:
        library.impl(schema, serve, "CPU")
