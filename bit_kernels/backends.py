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
small_elements = {
    "group_norm_relu": 65536,
    "norm_relu_conv": 0,
    "sgd": 0,
    "standardize_weight": 16384,
}

_told: set[tuple[str, str]] = set()


def _why_not_cpp(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"there is no kernel for device type {device_type!r} yet"
    if dtype not in _CPP_DTYPES:
        return f"the CPU kernels take float32, bfloat16 and float16, not {dtype}"
    if op == "sgd" and dtype != torch.float32:
        return f"the CPU kernel takes float32 weights, not {dtype}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func's transforms need operations that they can see through"
    return _library.why_not


def _is_small(op: str, input: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiled graph calls the kernel directly
        return False
    # Without an autograd node the kernel is the faster one, and gives an evaluation the bits of the
    # weights that bit_kernels.optim.SGD keeps.
    if op == "standardize_weight" and not torch.is_grad_enabled():
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
    why_not = _why_not_cpp(op, input.device.type, input.dtype)
    if backend is None and why_not is None and _is_small(op, input):
        return "reference"
    return _answer(op, backend, why_not)


def choose_mixup(dtype: torch.dtype, backend: str | None = None) -> str:
    """As `choose`, for the op that makes tensors of `dtype` from NumPy arrays."""
    return _answer("mixup", backend, _why_not_mixup(dtype))


def _why_not_mixup(dtype: torch.dtype) -> str | None:
    if dtype not in _CPP_DTYPES:
        return f"the CPU kernels make float32, bfloat16 and float16, not {dtype}"
    return _library.why_not_data


def _answer(op: str, backend: str | None, why_not: str | None) -> str:
    if backend == "reference":
        return "reference"
    if backend is None:
        if why_not is None:
            return "cpp"
        if not torch.compiler.is_compiling() and (op, why_not) not in _told:
            _told.add((op, why_not))
            warnings.warn(
                f"bit_kernels.{op} runs as plain PyTorch, without a fused kernel: {why_not}",
                stacklevel=4,
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
                why_not = _why_not_cpp(op, device_type, dtype)
                name = str(dtype).removeprefix("torch.")
                if why_not is not None:
                    answer = f"reference: {why_not}"
                else:
                    answer = f"cpp ({_library.native.isa()})"
                    answer += f", reference up to {limit} elements" if limit else ""
                rows[f"{device_type} {name}"] = answer
        report[op] = rows
    report["mixup"] = {
        f"cpu {str(dtype).removeprefix('torch.')}": f"cpp ({_library.native.isa()})"
        if (why_not := _why_not_mixup(dtype)) is None
        else f"reference: {why_not}"
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    return report
