"""The way every kernel is launched, or, to check it without a GPU, only noted."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: `args` in the kernel's order, constexprs and options by name."""

    kernel: Any  # a triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, int]


_noted: ContextVar[list[Launch] | None] = ContextVar("noted", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are put into the list and nothing runs; tensors may be of the meta device."""
    launches: list[Launch] = []
    token = _noted.set(launches)
    try:
        yield launches
    finally:
        _noted.reset(token)


def launch(
    kernel,
    grid: tuple[int, ...],
    *args,
    num_warps: int = 4,
    num_stages: int | None = None,
    contract: bool = True,
    registers: int | None = None,
    **constexprs,
) -> None:
    """kernel[grid](*args, **constexprs) on the device of the first tensor and its current stream.

    grid: programs in up to three dimensions; the first may be 2^31 - 1, the others 65535. With none
        nothing runs.
    num_warps: of 32 threads, for each program.
    num_stages: of the pipelines that loops load with; Triton's default if None.
    contract: whether the compiler may make one operation of a product and a sum. Without it the
        source says every rounding.
    registers: the most that a thread may have, on NVIDIA's GPUs; None leaves it to the assembler.
    """
    if 0 in grid:
        return
    # Triton 3.10 will no longer fuse unless it is told to.
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": contract}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    noted = _noted.get()
    if noted is not None:
        noted.append(Launch(kernel, grid, args, constexprs, options))
        return
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    for tensor in tensors:
        check_memory(tensor)
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constexprs, **options)
    else:
        kernel[grid](*args, **constexprs, **options)


def check_memory(tensor: Tensor) -> None:
    """Raises ValueError for one that only stands for others, as a DTensor does: a kernel would read
    at address 0."""
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        raise ValueError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory of its own; "
            "kernels need plain tensors, such as its local part"
        )


@functools.cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


WITHOUT_GPU = 132  # multiprocessors, an H100's


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units); an H100's where there is no GPU."""
    return _properties(device.index).multi_processor_count if device.type == "cuda" else WITHOUT_GPU


def device_name(device: torch.device) -> str:
    """What measurements are filed under: the GPU's name, or "cpu" where Triton is interpreted."""
    return _properties(device.index).name if device.type == "cuda" else device.type


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache; an H100's where there is no GPU."""
    return _properties(device.index).L2_cache_size if device.type == "cuda" else 50 << 20


def vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As kernels read what belongs to channels and groups: in one run of memory."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def power_of_2(number: int) -> int:
    """The least power of two that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
