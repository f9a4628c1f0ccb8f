"""Which implementation serves a call, and why: the only place that chooses."""

import warnings

import torch
from torch import Tensor

from bit_kernels import _library

# In order of preference.
NAMES = ("cpp", "reference")

_CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many elements PyTorch's own operations are done before an autograd node in Python has
# reached its kernel (2 cores of an AMD EPYC; benchmarks/results); half as many in channels_last.
small_elements = {"group_norm_relu": 65536, "norm_relu_conv": 0, "standardize_weight": 16384}

_told: set[tuple[str, str]] = set()


def _why_not_cpp(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"there is no kernel for device type {device_type!r} yet"
    if dtype not in _CPP_DTYPES:
        return f"the CPU kernels take float32, bfloat16 and float16, not {dtype}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func's transforms need operations that they can see through"
    return _library.why_not


def _is_small(op: str, input: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiled graph calls the kernel directly
        return False
    limit = small_elements[op]
    return 0 < input.numel() <= (limit if input.is_contiguous() else limit // 2)


def choose(op: str, input: Tensor, backend: str | None = None) -> str:
    """The name of the implementation that serves `op` on `input`.

    Args:
        op: the op's name, for messages.
        input: the tensor whose device and dtype decide.
        backend: None to choose, or one of `NAMES` to insist on it.

    Raises:
        ValueError: `backend` is no such name, or can't serve this call; the message says why.
    """
    if not input.is_floating_point():
        raise ValueError(f"{op} got dtype {input.dtype}; it may be a floating dtype")
    if backend == "reference":
        return "reference"
    why_not = _why_not_cpp(input.device.type, input.dtype)
    if backend is None:
        if why_not is None:
            return "reference" if _is_small(op, input) else "cpp"
        if not torch.compiler.is_compiling() and (op, why_not) not in _told:
            _told.add((op, why_not))
            warnings.warn(
                f"bit_kernels.{op} runs as plain PyTorch, without a fused kernel: {why_not}",
                stacklevel=3,
            )
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}; it may be None or one of {NAMES}")
    if why_not is not None:
        raise ValueError(f"backend {backend!r} can't serve bit_kernels.{op}: {why_not}")
    return backend


def backends() -> dict[str, dict[str, str]]:
    """What serves each op here: {op: {device and dtype: implementation, or why it is plain}}."""
    report = {}
    for op, limit in small_elements.items():
        rows = {}
        for device_type in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                why_not = _why_not_cpp(device_type, dtype)
                name = str(dtype).removeprefix("torch.")
                if why_not is not None:
                    answer = f"reference: {why_not}"
                else:
                    answer = f"cpp ({_library.native.isa()})"
                    answer += f", reference up to {limit} elements" if limit else ""
                rows[f"{device_type} {name}"] = answer
        report[op] = rows
    return report
