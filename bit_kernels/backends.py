"""Which implementation serves a call, and why: the only place that chooses."""

import warnings

import torch
from torch import Tensor

from bit_kernels import _library

# "cuda" serves who asks for it: whether its kernels are faster than Triton's is not measured yet.
NAMES = ("triton", "cuda", "cpp", "reference")
_IN_CUDA = ("group_norm_relu", "sgd")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability that the Triton kernels are checked for

# Up to this many elements PyTorch's own operations are done before an autograd node in Python has
# reached its kernel (2 cores of an AMD EPYC; benchmarks/results); half as many in channels_last.
small_elements = {
    "group_norm_relu": 65536,
    "norm_relu_conv": 0,
    "sgd": 0,
    "standardize_weight": 16384,
}

_told: set[tuple[str, str]] = set()


def _why_not_dtype(op: str, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if op == "sgd" and dtype != torch.float32:
        return f"the kernel takes float32 weights, not {dtype}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func's transforms need operations that they can see through"
    return None


def _why_not_cpp(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"there is no kernel for device type {device.type!r}"
    library = _library.why_not_data if op == "mixup" else _library.why_not
    return _why_not_dtype(op, dtype) or library


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != ("cpu" if _library.interpreted else "cuda"):
        return f"there is no kernel for device type {device.type!r}"
    return _why_not_dtype(op, dtype) or _library.why_not_triton or _why_not_device(device)


def _why_not_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return _why_not_capability(torch.cuda.get_device_capability(device))


def _why_not_capability(capability: tuple[int, int]) -> str | None:
    if capability >= _OLDEST:
        return None
    return (
        f"the kernels are written for compute capability {_OLDEST[0]}.{_OLDEST[1]} and newer; this "
        f"GPU has {capability[0]}.{capability[1]}"
    )


def _why_not_cuda(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if op not in _IN_CUDA:
        return f"it is not written in CUDA C++, only {' and '.join(_IN_CUDA)} are"
    if device.type != "cuda":
        return f"there is no kernel for device type {device.type!r}"
    return _why_not_dtype(op, dtype) or _library.why_not_cuda or _why_not_device(device)


_WHY_NOT = {"triton": _why_not_triton, "cuda": _why_not_cuda, "cpp": _why_not_cpp}


def _fastest(device: torch.device) -> str:
    """The backend that a device's calls go to."""
    on_gpu = device.type == "cuda" or device.type == "cpu" and _library.interpreted
    return "triton" if on_gpu else "cpp"


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
    chosen = _answer(op, backend, input.device, input.dtype)
    if backend is None and chosen == "cpp" and _is_small(op, input):
        return "reference"
    return chosen


def choose_mixup(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """As `choose`, for the op that makes tensors of `dtype` from images on `device`."""
    return _answer("mixup", backend, device, dtype)


def _answer(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "reference":
        return "reference"
    if backend not in (None, *NAMES):
        raise ValueError(f"backend is {backend!r}; it may be None or one of {NAMES}")
    chosen = backend or _fastest(device)
    why_not = _WHY_NOT[chosen](op, device, dtype)
    if why_not is None:
        return chosen
    if backend is not None:
        raise ValueError(f"backend {backend!r} can't serve bit_kernels.{op}: {why_not}")
    if not torch.compiler.is_compiling() and (op, why_not) not in _told:
        _told.add((op, why_not))
        warnings.warn(
            f"bit_kernels.{op} runs as plain PyTorch, without a fused kernel: {why_not}",
            stacklevel=4,
        )
    return "reference"


def backends() -> dict[str, dict[str, str]]:
    """What serves each op here: {op: {device and dtype: implementation, or why it is plain}}."""
    return {
        op: {
            f"{kind} {str(dtype).removeprefix('torch.')}": _report(op, torch.device(kind), dtype)
            for kind in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        }
        for op in (*small_elements, "mixup")
    }


def _report(op: str, device: torch.device, dtype: torch.dtype) -> str:
    name = _fastest(device)
    why_not = _WHY_NOT[name](op, device, dtype)
    if why_not is not None:
        return f"reference: {why_not}"
    if name != "cpp":
        also = _WHY_NOT["cuda"](op, device, dtype) is None
        return name + (', or backend="cuda"' if also else "")
    limit = small_elements.get(op, 0)
    return f"cpp ({_library.native.isa()})" + (
        f", reference up to {limit} elements" if limit else ""
    )
