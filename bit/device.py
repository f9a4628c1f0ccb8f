"""What a GPU asks of a run beside the CPU's: can it do this, how it is set up, numbers read late.

float32 on a GPU is what torch makes of it by default: convolutions in TF32 (10 bits of mantissa),
matrix products in full precision. `torch.backends.cudnn.conv.fp32_precision` and
`torch.backends.cuda.matmul.fp32_precision` are left as they are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How the allocator says that memory is not enough, then cuBLAS and cuDNN, whose last words are that
# no algorithm's workspace fits, and XLA.
NO_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "unable to find an engine to execute this computation",
    "RESOURCE_EXHAUSTED",
)
BFLOAT16_CAPABILITY = (8, 0)  # compute capability of the first NVIDIA GPUs with such instructions


def is_cpu(device: str) -> bool:
    """Whether `device` (cpu, cuda or cuda:N) is the CPU."""
    return torch.device(device).type == "cpu"


def check_device(device: str, dtype: str = "float32") -> None:
    """Raise ValueError for a GPU that torch doesn't see, and for a dtype that it can't compute in.

    device: cpu, cuda or cuda:N. dtype: float32 or bfloat16.
    """
    if is_cpu(device):
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}; it must be cpu, as torch sees no CUDA device")
    index, count = torch.device(device).index, torch.cuda.device_count()
    if index is not None and index >= count:
        seen = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise ValueError(f"device is {device!r}; it must be cpu or one that torch sees: {seen}")
    if dtype == "bfloat16" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < BFLOAT16_CAPABILITY:
            raise ValueError(
                f"dtype is 'bfloat16'; on {torch.cuda.get_device_name(device)}, of compute "
                f"capability {'.'.join(map(str, capability))}, it must be float32: bfloat16 needs "
                f"{'.'.join(map(str, BFLOAT16_CAPABILITY))} (Ampere) or newer"
            )


def is_short_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device's memory is not enough."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def set_up(device: str, *, deterministic: bool) -> None:
    """Make a GPU the current one, and say how its convolutions are chosen; nothing on the CPU.

    deterministic: only algorithms that give the same bits every time. Else the fastest, which cuDNN
    finds by trying each on every new shape: worth it, as training and evaluation have two each.
    """
    if is_cpu(device):
        return
    if (index := torch.device(device).index) is not None:
        torch.cuda.set_device(index)  # whose generator is the one that a resume restores
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


class Reading:
    """A tensor of one number, read later, without waiting for what is launched in between.

    value: as it is in the order of its device's current stream; on the CPU as it is at `read`.
    """

    def __init__(self, value: Tensor) -> None:
        # From a GPU this goes to pinned memory, and comes back to us at once.
        self._host = value.detach().to("cpu", non_blocking=True)
        self._copied = None
        if not value.is_cpu:
            self._copied = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> float:
        """Wait for the number, and for nothing after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.item()
