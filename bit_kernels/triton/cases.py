"""The launches that real networks make, by name: what is compiled and counted without a GPU.

A case calls an op's functions of bit_kernels/triton/<op>.py with tensors that `make` makes: of the
meta device to compile (static.py), of the CPU, few of them, to count memory passes (passes.py). An op
is a function here and a line in `OPS`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# make(*shape, dtype=torch.float32, channels_last=False)
Make = Callable[..., Tensor]


class Case(NamedTuple):
    """A call of an op.

    An activation is what a memory pass reads or writes: tensors with at least `elements` elements are
    such. Of an op on many tensors it is all weights of a network together.
    """

    op: str
    part: str  # of the op: forward, backward
    at: str  # shape, dtype, layout
    call: Callable[[Make], object]
    elements: int
    ideal: int  # memory passes that any implementation must make
    aligned: bool  # do all runs of an activation's memory begin at multiples of 16 elements?
    few: Callable[[Make], object] | None  # the same call with few enough elements to be interpreted
    few_elements: int
    # Elements of the smallest of many tensors that are activations together, and of few.
    least: int | None = None
    few_least: int | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.part}, {self.at}"


def maker(device: str) -> Make:
    def make(*shape: int, dtype=torch.float32, channels_last: bool = False) -> Tensor:
        format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.zeros(shape, dtype=dtype, device=device).to(memory_format=format)

    return make


# Channels and height of the square maps that R50x1 normalises at 224 px (tests/triton/test_static.py
# asks the network); RNxK has K times the channels.
R50X1 = [(64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
         (512, 14), (512, 7), (2048, 7)]  # fmt: skip
R152X4 = [(4 * channels, height) for channels, height in R50X1]
# At 480 px, the paper's size for transfer of what was pre-trained at 224.
R152X4_480 = [(channels, height * 15 // 7) for channels, height in R152X4]

_LAYOUTS = {True: "channels_last", False: "contiguous"}


def _name(*shape: int, dtype: torch.dtype, layout: str = "") -> str:
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}".strip()


# ---- group_norm_relu


def group_norm_relu(full: bool) -> Iterator[Case]:
    bfloat16, channels_last = [torch.bfloat16], [True]
    if not full:
        yield from _group_norm_relu([(256, 56)], 256, bfloat16, channels_last)
        shapes = [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
        yield from _group_norm_relu(shapes, 8, bfloat16, channels_last)
        yield from _group_norm_relu([(1024, 56), (8192, 7)], 8, bfloat16, channels_last)
        yield from _group_norm_relu([(256, 56)], 8, bfloat16, [False])
        return
    dtypes, layouts = [torch.bfloat16, torch.float16, torch.float32], [True, False]
    for batch in (1, 8, 32, 256):
        yield from _group_norm_relu(R50X1, batch, dtypes, layouts)
    for batch in (1, 8, 32):
        yield from _group_norm_relu(R152X4, batch, dtypes, layouts)
    yield from _group_norm_relu(R152X4_480, 8, bfloat16, channels_last)


def _group_norm_relu(shapes, batch: int, dtypes, layouts) -> Iterator[Case]:
    for channels, height in shapes:
        for dtype in dtypes:
            for channels_last in layouts:
                shape = channels, height, height
                run = channels if channels_last else height * height
                calls = _group_norm_relu_calls(batch, shape, dtype, channels_last)
                few = _group_norm_relu_calls(1, shape, dtype, channels_last)
                for (part, ideal), call in calls.items():
                    yield Case(
                        "group_norm_relu",
                        part,
                        _name(batch, *shape, dtype=dtype, layout=_LAYOUTS[channels_last]),
                        call,
                        batch * channels * height * height,
                        ideal,
                        run % 16 == 0,
                        few[part, ideal],
                        channels * height * height,
                    )


def _group_norm_relu_calls(batch, shape, dtype, channels_last) -> dict:
    """By part and memory passes that it must make; 32 groups, parameters in float32."""
    from bit_kernels.triton import group_norm_relu as kernels

    def activation(make):
        return make(batch, *shape, dtype=dtype, channels_last=channels_last)

    def parameters(make):
        return make(shape[0]), make(shape[0])

    def statistics(make):
        return make(batch, 32), make(batch, 32)

    def backward(make, *skip):
        tensors = activation(make), activation(make), *statistics(make), *parameters(make)
        return kernels.backward(*tensors, True, *skip)

    return {
        ("forward", 2): lambda make: kernels.forward(
            activation(make), 32, *parameters(make), 1e-5, True
        ),
        ("backward", 3): backward,
        ("backward and skip", 4): lambda make: backward(make, activation(make)),
        ("apply", 2): lambda make: kernels.apply(
            activation(make), *statistics(make), *parameters(make), True
        ),
        ("add", 3): lambda make: kernels.add(activation(make), activation(make), 32, 1e-5),
    }


# ---- mixup


def mixup(full: bool) -> Iterator[Case]:
    for size in (224, 480) if full else (224,):
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16,):
            yield _mixup(256, size, dtype)


def _mixup(batch: int, size: int, dtype: torch.dtype) -> Case:
    from bit_kernels.triton import mixup as kernels

    def call(make, batch=batch):
        images = make(batch, size + 32, size + 32, 3, dtype=torch.uint8)
        index = np.arange(batch)
        return kernels.forward(
            images,
            np.full(batch, 0.3),
            np.roll(index, 1),
            np.full((batch, 2), 16),
            index % 2 == 1,
            np.full(3, 0.5),
            np.full(3, 0.5),
            make(batch, 3, size, size, dtype=dtype, channels_last=True),
        )

    return Case(
        "mixup",
        "forward",
        _name(batch, 3, size, size, dtype=dtype, layout="channels_last"),
        call,
        batch * 3 * size * size,
        3,  # two crops of bytes, one output
        True,
        lambda make: call(make, 2),
        2 * 3 * size * size,
    )


# ---- weights


def weight_shapes(units: Sequence[int], width: int) -> list[tuple[int, ...]]:
    """(C_out, C_in, height, width) of a network's standardized weights, by its stages' units."""
    shapes, channels = [(64 * width, 3, 7, 7)], 64 * width
    for stage, count in enumerate(units):
        inner = 64 * width << stage
        shapes.append((4 * inner, channels, 1, 1))
        for _ in range(count):
            shapes += [(inner, channels, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            channels = 4 * inner
    return shapes


NETWORKS = {"R50x1": ([3, 4, 6, 3], 1), "R152x4": ([3, 8, 36, 3], 4)}
_FEW = [(64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)]


def _of_weights(op: str, calls, name: str, shapes, dtype: torch.dtype, channels_last: bool):
    """A case of each of calls: {(part, ideal passes): call}.

    call(make): make() or make(dtype) is a list of tensors of all shapes.
    """
    at = _name(dtype=dtype, layout=_LAYOUTS[channels_last])
    elements, few = (sum(map(math.prod, of)) for of in (shapes, _FEW))
    for (part, ideal), call in calls.items():

        def of(shapes, call=call):
            return lambda make: call(
                lambda dtype=torch.float32: [
                    make(*shape, dtype=dtype, channels_last=channels_last) for shape in shapes
                ]
            )

        yield Case(
            op,
            part,
            f"{name} {at}",
            of(shapes),
            elements,
            ideal,
            True,
            of(_FEW),
            few,
            least=min(map(math.prod, shapes)),
            few_least=min(map(math.prod, _FEW)),
        )


def _networks(full: bool) -> Iterator[tuple[str, list, torch.dtype, bool]]:
    """Name and weights, the dtype of the standardized ones, and their layout."""
    for name in NETWORKS:
        shapes = weight_shapes(*NETWORKS[name])
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16,):
            for channels_last in (True, False) if full else (True,):
                yield name, shapes, dtype, channels_last


def standardize_weight(full: bool) -> Iterator[Case]:
    from bit_kernels.triton import standardize_weight as kernels

    for name, shapes, dtype, channels_last in _networks(full):

        def statistics(weights):
            rows = sum(weight.shape[0] for weight in weights)
            return torch.zeros(2, rows, device=weights[0].device)

        def forward(make, dtype=dtype):
            return kernels.forward_many(make(), 1e-10, dtype)

        def backward(make, dtype=dtype):
            weights = make()
            return kernels.backward_many(make(dtype), weights, *statistics(weights))

        calls = {("forward", 2): forward, ("backward", 3): backward}
        yield from _of_weights("standardize_weight", calls, name, shapes, dtype, channels_last)

        def forward_each(make, dtype=dtype):
            return [kernels.forward(weight, 1e-10, dtype) for weight in make()]

        def backward_each(make, dtype=dtype):
            pairs = zip(make(dtype), make(), strict=True)
            return [kernels.backward(g, w, *statistics([w])) for g, w in pairs]

        calls = {
            ("forward, one by one", 2): forward_each,
            ("backward, one by one", 3): backward_each,
        }
        different = sorted(set(shapes[1:]))  # the first one's rows of 147 elements are not aligned
        yield from _of_weights("standardize_weight", calls, name, different, dtype, channels_last)


def sgd(full: bool) -> Iterator[Case]:
    from bit_kernels.triton import sgd as kernels

    rule = dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=1e-4, nesterov=False,
                maximize=False, fresh=False, project=True, eps=1e-10)  # fmt: skip

    for name, shapes, dtype, channels_last in _networks(full):
        calls = {
            ("step", 6): lambda make, dtype=dtype: kernels.step(
                make(), make(), make(), make(dtype), **rule
            ),
            ("step, nothing standardized", 5): lambda make: kernels.step(
                make(), make(), make(), [], **rule
            ),
            ("project_gradients", 3): lambda make: kernels.project_gradients(make(), make(), 1e-10),
            ("gradient_norms", 2): lambda make: kernels.gradient_norms(make(), make(), 1e-10),
        }
        yield from _of_weights("sgd", calls, name, shapes, dtype, channels_last)


# ---- norm_relu_conv

# C_in, C_out, side of the kernel, height, with a residual and the statistics of the result.
_CONVOLUTIONS = [(256, 64, 1, 56, False), (64, 64, 3, 56, False), (64, 256, 1, 56, True),
                 (256, 256, 3, 14, False), (512, 2048, 1, 7, True)]  # fmt: skip


def norm_relu_conv(full: bool) -> Iterator[Case]:
    """Not interpreted: a matrix product reads its operands again for each tile of the result."""
    for dtype in (torch.bfloat16, torch.float16) if full else (torch.bfloat16,):
        for shape in _CONVOLUTIONS:
            yield _norm_relu_conv(8, shape, dtype)


def _norm_relu_conv(batch: int, shape, dtype: torch.dtype) -> Case:
    from bit_kernels.triton import norm_relu_conv as kernels

    C, C_out, side, height, full = shape

    def call(make):
        def map_of(channels):
            return make(batch, channels, height, height, dtype=dtype, channels_last=True)

        return kernels.convolve(
            map_of(C),
            kernels.coefficients(make(batch, 32), make(batch, 32), make(C), C),
            make(C),
            True,
            make(C_out, C, side, side, dtype=dtype, channels_last=True),
            None,
            (1, 1),
            (side // 2, side // 2),
            (1, 1),
            kernels.DEFAULT,
            map_of(C_out) if full else None,
            (32, 1e-5) if full else None,
        )

    elements = batch * min(C, C_out) * height * height
    at = _name(batch, C, height, height, dtype=dtype)
    part = f"{side} x {side} to {C_out}" + (", residual and statistics" if full else "")
    return Case("norm_relu_conv", part, at, call, elements, 3 if full else 2, True, None, 0)


OPS = {
    "group_norm_relu": group_norm_relu,
    "mixup": mixup,
    "norm_relu_conv": norm_relu_conv,
    "sgd": sgd,
    "standardize_weight": standardize_weight,
}


def cases(full: bool = False) -> list[Case]:
    """Those of the table in docs/gpu-static.md, or all: every shape, batch, dtype and layout."""
    return [case for op in OPS.values() for case in op(full)]
