"""The CUDA kernels of csrc/cuda, compiled for the host (tests/cuda/shim) and called on CPU tensors.

What a kernel writes has guards around it and NaN in it beforehand.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]

# Shared memory of a block and of a multiprocessor, in bytes; what the code was compiled for.
HOPPER = dict(
    major=9, multiprocessors=132, per_block=227 << 10, per_multiprocessor=228 << 10, ptx=90
)
AMPERE = dict(
    major=8, multiprocessors=108, per_block=163 << 10, per_multiprocessor=164 << 10, ptx=80
)


def build(source: Path, folder: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler ({compiler})")
    library = folder / f"{source.stem}.so"
    include = ["-I", str(ROOT / "tests/cuda/shim")]
    command = [compiler, *FLAGS, *include, "-x", "c++", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class Host:
    """One of csrc/cuda's files, and the device that it is to believe in."""

    def __init__(self, source: Path, folder: Path):
        self.library = build(source, folder)
        self.library.shim_first_cluster.argtypes = [ctypes.c_int64]
        self.library.shim_launch.restype = ctypes.c_bool
        self.reset()

    def reset(self, **device) -> None:
        device = HOPPER | device
        self.library.shim_device(*(device[key] for key in HOPPER))
        self.library.shim_order(0)
        self.library.shim_first_cluster(0)

    def call(self, name: str, *arguments) -> None:
        """Raises RuntimeError with what the function returns, if it returns something."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        self.library.shim_forget()
        wrong = function(*arguments)
        if wrong is not None:
            raise RuntimeError(wrong.decode())

    def launches(self) -> list[dict[str, int]]:
        """What the last call launched."""
        found, numbers = [], (ctypes.c_int64 * 4)()
        while self.library.shim_launch(len(found), numbers):
            found.append(dict(zip(("blocks", "threads", "cluster", "shared"), numbers)))
        return found


class ChannelVector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("is_float32", ctypes.c_bool)]


class GroupNormShape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("samples", "pixels", "channels", "groups")]
    _fields_ += [("element", ctypes.c_int)]


class GroupNormCut(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("channels", "rows", "vector", "blocks", "threads", "shared", "cluster")
    ]


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    types = {
        "shape": GroupNormShape,
        "weight": ChannelVector,
        "bias": ChannelVector,
        "eps": ctypes.c_float,
        "relu": ctypes.c_bool,
    }
    listed = [(field, types.get(field, ctypes.c_void_p)) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


GroupNormForward = _structure(
    "GroupNormForward", "shape input weight bias eps relu output mean rstd"
)
GroupNormBackward = _structure(
    "GroupNormBackward",
    "shape grad_output input mean rstd weight bias relu grad_skip grad_input grad_weight "
    "grad_bias workspace",
)


class SgdTensor(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("gradient", "weight", "momentum", "standardized")
    ] + [("rows", ctypes.c_int64), ("columns", ctypes.c_int64)]


class SgdOptions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")]
    _fields_ += [(name, ctypes.c_bool) for name in ("nesterov", "maximize", "fresh", "project")]
    _fields_ += [("eps", ctypes.c_double)]


class Guarded:
    """A buffer of `numel` elements, all NaN, with NaN around it that must stay; `offset` elements
    behind what is aligned."""

    PAD = 64

    def __init__(self, numel: int, dtype: torch.dtype, offset: int = 0):
        self.whole = torch.full((numel + 2 * self.PAD + offset,), torch.nan, dtype=dtype)
        self.inside = slice(self.PAD + offset, self.PAD + offset + numel)
        self.tensor = self.whole[self.inside]

    def check(self) -> Tensor:
        outside = torch.ones_like(self.whole, dtype=torch.bool)
        outside[self.inside] = False
        assert self.whole[outside].isnan().all(), "a kernel wrote beside its output"
        return self.tensor


def _channel_vector(tensor: Tensor | None) -> ChannelVector:
    if tensor is None:
        return ChannelVector(None, False)
    return ChannelVector(tensor.data_ptr(), tensor.dtype == torch.float32)


def pixels_last(tensor: Tensor, offset: int = 0) -> Tensor:
    """(N, C, *) as a dense (N, *, C), `offset` elements behind what is aligned, NaN around it."""
    place = Guarded(tensor.numel(), tensor.dtype, offset)
    ordered = tensor.movedim(1, -1)
    return place.tensor.view(ordered.shape).copy_(ordered)


class GroupNorm(Host):
    def __init__(self, folder: Path):
        super().__init__(ROOT / "csrc/cuda/group_norm_relu.cu", folder)

    def cut(self, samples, pixels, channels, groups, dtype, backward=False) -> GroupNormCut:
        """How a shape would be divided; RuntimeError where it can't be."""
        shape = GroupNormShape(samples, pixels, channels, groups, ELEMENTS[dtype])
        cut = GroupNormCut()
        name = "bit_kernels_group_norm_relu_cut"
        self.call(name, ctypes.byref(shape), backward, 0, ctypes.byref(cut))
        return cut

    def forward(self, x, groups, weight=None, bias=None, eps=1e-5, relu=True, offset=0):
        """output, mean and rstd, as torch.ops.bit_kernels.group_norm_relu gives them."""
        n, c, *rest = x.shape
        shape = GroupNormShape(n, x[0, 0].numel(), c, groups, ELEMENTS[x.dtype])
        given = pixels_last(x, offset)
        output = Guarded(x.numel(), x.dtype, offset)
        mean, rstd = (Guarded(n * groups, torch.float32) for _ in range(2))
        arguments = GroupNormForward(
            shape,
            given.data_ptr(),
            _channel_vector(weight),
            _channel_vector(bias),
            eps,
            relu,
            *(place.tensor.data_ptr() for place in (output, mean, rstd)),
        )
        self.call("bit_kernels_group_norm_relu", ctypes.byref(arguments), 0, None)
        return (
            output.check().view(n, *rest, c).movedim(-1, 1),
            mean.check().view(n, groups),
            rstd.check().view(n, groups),
        )

    def backward(self, grad, x, mean, rstd, weight=None, bias=None, relu=True, skip=None, offset=0):
        """grad_input, grad_weight and grad_bias."""
        n, c, *rest = x.shape
        groups = mean.shape[1]
        shape = GroupNormShape(n, x[0, 0].numel(), c, groups, ELEMENTS[x.dtype])
        given = [None if t is None else pixels_last(t, offset) for t in (grad, x, skip)]
        grad_input = Guarded(x.numel(), x.dtype, offset)
        grad_weight, grad_bias = (Guarded(c, torch.float32) for _ in range(2))
        workspace = Guarded(2 * n * c, torch.float32)
        arguments = GroupNormBackward(
            shape,
            given[0].data_ptr(),
            given[1].data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            _channel_vector(weight),
            _channel_vector(bias),
            relu,
            None if skip is None else given[2].data_ptr(),
            *(t.tensor.data_ptr() for t in (grad_input, grad_weight, grad_bias, workspace)),
        )
        self.call("bit_kernels_group_norm_relu_backward", ctypes.byref(arguments), 0, None)
        workspace.check()
        return (
            grad_input.check().view(n, *rest, c).movedim(-1, 1),
            grad_weight.check(),
            grad_bias.check(),
        )


class Sgd(Host):
    def __init__(self, folder: Path):
        super().__init__(ROOT / "csrc/cuda/sgd.cu", folder)

    def step(self, weights, grads, momenta=(), standardized=(), *, offset=0, **options):
        """What bit_kernels.functional.sgd does, in place, for tensors that lie in order."""
        momentum, keeps = options.get("momentum", 0) != 0, len(standardized) > 0
        places, tensors = [], []
        for t, weight in enumerate(weights):
            given = [grads[t], weight, momenta[t] if momentum else None]
            given.append(standardized[t] if keeps else None)
            of_tensor = [None if g is None else Guarded(g.numel(), g.dtype, offset) for g in given]
            for place, tensor in zip(of_tensor, given, strict=True):
                if place is not None:
                    place.tensor.copy_(tensor.flatten())
            places.append((of_tensor, given))
            pointers = [None if p is None else p.tensor.data_ptr() for p in of_tensor]
            rows = weight.shape[0] if keeps else 1
            tensors.append(SgdTensor(*pointers, rows, weight.numel() // rows))
        names = [name for name, _ in SgdOptions._fields_]
        chosen = SgdOptions(*(options.get(name, 0) for name in names))
        element = ELEMENTS[standardized[0].dtype] if keeps else 0
        table = (SgdTensor * len(tensors))(*tensors)
        count = ctypes.c_int64(len(tensors))
        self.call("bit_kernels_sgd", table, count, element, ctypes.byref(chosen), 0, None)
        for of_tensor, given in places:
            for place, tensor in zip(of_tensor, given, strict=True):
                if place is not None:
                    tensor.copy_(place.check().view(tensor.shape))

    def norms(self, weights, grads, eps=1e-10, offset=0) -> Tensor:
        places, tensors = [], []
        for pair in zip(grads, weights, strict=True):
            of_tensor = [Guarded(t.numel(), t.dtype, offset) for t in pair]
            for place, tensor in zip(of_tensor, pair, strict=True):
                place.tensor.copy_(tensor.flatten())
            places.append(of_tensor)
            pointers = [place.tensor.data_ptr() for place in of_tensor]
            weight = pair[1]
            rows = weight.shape[0]
            columns = weight.numel() // rows if rows else 0
            tensors.append(SgdTensor(*pointers, None, None, rows, columns))
        squares = Guarded(sum(t.rows for t in tensors), torch.float32)
        found = Guarded(len(tensors), torch.float32)
        table, count = (SgdTensor * len(tensors))(*tensors), ctypes.c_int64(len(tensors))
        pointers = [ctypes.c_void_p(place.tensor.data_ptr()) for place in (squares, found)]
        self.call(
            "bit_kernels_sgd_gradient_norm", table, count, ctypes.c_double(eps), *pointers, 0, None
        )
        squares.check()
        return found.check()


def load_ops(folder: Path) -> None:
    """torch.ops.bit_kernels.*_cuda for CPU tensors: csrc/cuda/ops.cpp on the kernels built before."""
    torch_folder = Path(torch.__file__).parent
    library = folder / "ops.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += ["-fvisibility-inlines-hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-isystem", str(torch_folder / "include"), str(ROOT / "csrc/cuda/ops.cpp")]
    command += [str(folder / "group_norm_relu.so"), str(folder / "sgd.so")]
    command += [f"-Wl,-rpath,{folder}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
