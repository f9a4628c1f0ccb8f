"""The launches that real networks make, by name: what is compiled and counted without a GPU.

A case calls an op's functions of bit_kernels/triton/<op>.py with tensors that `make` makes: of the
meta device to compile (static.py), of the CPU, few of them, to count memory passes (passes.py). An op
is a function here and a line in `OPS`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# make(*shape, dtype=torch.float32, channels_last=False)
Make = Callable[..., Tensor]


class Case(NamedTuple):
    """A call of an op.

    An activation is what a memory pass reads or writes: arguments with at least `elements` elements
    count as such.
    """

    op: str
    part: str  # of the op: forward, backward
    at: str  # shape, dtype, layout
    call: Callable[[Make], object]
    elements: int
    ideal: int  # memory passes that any implementation must make
    aligned: bool  # do all runs of an activation's memory begin at multiples of 16 elements?
    few: Callable[[Make], object]  # the same call with few enough elements to be interpreted
    few_elements: int

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


OPS = {"group_norm_relu": group_norm_relu, "mixup": mixup}


def cases(full: bool = False) -> list[Case]:
    """Those of the table in docs/gpu-static.md, or all: every shape, batch, dtype and layout."""
    return [case for op in OPS.values() for case in op(full)]
