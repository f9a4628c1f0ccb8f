"""The memory layout that an op works in and answers in; csrc/common/checks.h is its twin."""

import torch
from torch import Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where channels are innermost and the tensor is not plainly contiguous."""
    if tensor.dim() in (4, 5) and not tensor.is_contiguous() and tensor.stride(1) == 1:
        return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def empty_output(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of an op that keeps shape and layout, and dtype if that is None."""
    return torch.empty_like(tensor.contiguous(memory_format=memory_format(tensor)), dtype=dtype)
