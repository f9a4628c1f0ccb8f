"""What "correct" means here: the error rule, memory layouts, an op with its gradients.

Tests of ops run in three modes, each in a process of its own:

    pytest                                           the C++ kernels, on the CPU
    BIT_KERNELS_INTERPRET=1 pytest tests/ops ...     Triton's, by its interpreter, on the CPU
    DEVICE=cuda pytest tests/ops ...                 Triton's, on a GPU
"""

import importlib
import os

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("DEVICE", "cpu")
INTERPRETED = os.environ.get("BIT_KERNELS_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED or DEVICE != "cpu" else "cpp"

of_the_cpu = pytest.mark.skipif(BACKEND != "cpp", reason="about the CPU's kernels alone")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if INTERPRETED:  # Triton's interpreter truncates where bfloat16 must be rounded
    DTYPES.remove(torch.bfloat16)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def _permuted(tensor: Tensor) -> Tensor:
    """Dense, but neither contiguous nor channels_last: the last dimensions lie transposed."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _slice(tensor: Tensor) -> Tensor:
    """Cut from a larger buffer in every dimension, so that no stride is trivial."""
    larger = tensor.new_full([n + 3 for n in tensor.shape], float("nan"))
    part = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
    return part.copy_(tensor)


def _channels_last_slice(tensor: Tensor) -> Tensor:
    n, c, *rest = tensor.shape
    larger = _channels_last(tensor.new_full((n, c + 5, *rest), float("nan")))
    return larger[:, 2 : c + 2].copy_(tensor)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": _channels_last,
    "permuted": _permuted,
    "slice": _slice,
    "channels_last_slice": _channels_last_slice,
}


def leave_small_tensors_to_pytorch(patch, elements: int) -> None:
    """Up to so many elements; 0 sends every tensor to the kernels. patch: a pytest.MonkeyPatch."""
    # The package offers a function of this module's name.
    backends = importlib.import_module("bit_kernels.backends")
    for op in backends.small_elements:
        patch.setitem(backends.small_elements, op, elements)


def with_gradients(function, inputs, grad_output):
    """[output, gradient of each input], every input a fresh leaf of the same strides."""
    leaves = [_leaf(x) for x in inputs]
    output = function(*leaves)
    wanted = [x for x in leaves if x is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad_output.to(output.dtype))]


def _leaf(tensor):
    if tensor is None:
        return None
    return tensor.detach().requires_grad_()


def to_float64(tensors):
    return [None if x is None else x.double() for x in tensors]


def assert_as_good(names, ours, unfused, truth):
    """Each result's largest error is at most twice that of unfused PyTorch in the same dtype, plus
    two roundings of the dtype at the size of the largest true value."""
    for name, mine, theirs, true in zip(names, ours, unfused, truth, strict=True):
        assert mine.shape == true.shape and mine.dtype == theirs.dtype, name
        assert mine.isfinite().all(), f"{name} has elements that nobody wrote, or overflowed"
        if true.numel() == 0:
            continue
        error = (mine.double() - true).abs().max().item()
        rival = (theirs.double() - true).abs().max().item()
        rounding = torch.finfo(mine.dtype).eps * true.abs().max().item()
        bound = 2 * rival + 2 * rounding
        assert error <= bound, (
            f"{name}: error {error:.3g}, at most {bound:.3g} (unfused {rival:.3g})"
        )
