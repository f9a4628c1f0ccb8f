"""Group statistics that ride on the tensor that they were taken of.

What makes a tensor can take its statistics in the same pass; the GroupNorm that reads it next finds
them here. Where something else comes in between (a wrapper that makes a tensor of its own, a write
in place) nothing is found, and the statistics are taken again.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Statistics(NamedTuple):
    version: int
    num_groups: int
    eps: float
    mean: Tensor
    rstd: Tensor
    captured: bool  # were they taken in a CUDA graph's capture?


def remember(tensor: Tensor, num_groups: int, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """mean and rstd (N, num_groups) are those of `tensor` as it is now."""
    if tensor.is_inference():  # a change in place would go unseen
        return
    tensor._group_statistics = _Statistics(
        tensor._version, num_groups, eps, mean, rstd, _in_capture(tensor)
    )


def recall(tensor: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor] | None:
    """mean and rstd of these groups of `tensor`, if they are known and still true."""
    known = getattr(tensor, "_group_statistics", None)
    if known is None or known[:3] != (tensor._version, num_groups, eps):
        return None
    if _in_capture(tensor) and not known.captured:  # a replay may find another tensor there
        return None
    return known.mean, known.rstd


def _in_capture(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
