"""The launches that real networks make, by name: what the checks without a GPU compile and count.

A case calls an op's launch functions on tensors that `make` makes: of the meta device to compile
(bit_kernels/triton/static.py), of the CPU to count (bit_kernels/triton/passes.py). An op is a function
of `full` here and a line in `OPS`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# make(*shape, dtype=torch.float32, channels_last=False)
Make = Callable[..., Tensor]


class Case(NamedTuple):
    op: str
    part: str  # of the op: forward, backward
    at: str  # shape, dtype, layout
    call: Callable[[Make], object]
    elements: int  # of an activation: what a memory pass reads or writes
    ideal: int  # memory passes that any implementation must make
    aligned: bool  # may every access to an activation be 128 bits wide?

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
# At 480 px, the paper's size for pre-trained networks that are transferred.
R152X4_480 = [(4 * channels, height * 15 // 7) for channels, height in R50X1]

_LAYOUTS = {True: "channels_last", False: "contiguous"}


def group_norm_relu(full: bool) -> Iterator[Case]:
    bfloat16, channels_last = [torch.bfloat16], [True]
    if not full:
        shapes = [(64, 56), (256, 56), (512, 28), (2048, 7)]
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
                yield from _group_norm_relu_at(batch, channels, height, dtype, channels_last)


def _group_norm_relu_at(batch, channels, height, dtype, channels_last) -> Iterator[Case]:
    from bit_kernels.triton import group_norm_relu as kernels

    groups = 32

    def activation(make):
        return make(batch, channels, height, height, dtype=dtype, channels_last=channels_last)

    def parameters(make):
        return make(channels), make(channels)

    def statistics(make):
        return make(batch, groups), make(batch, groups)

    def forward(make):
        kernels.forward(activation(make), groups, *parameters(make), 1e-5, True)

    def apply(make):
        kernels.apply(activation(make), *statistics(make), *parameters(make), True)

    def add(make):
        kernels.add(activation(make), activation(make), groups, 1e-5)

    def backward(make, skip=False):
        more = (activation(make),) if skip else ()
        tensors = activation(make), activation(make), *statistics(make), *parameters(make)
        kernels.backward(*tensors, True, *more)

    def backward_and_skip(make):
        backward(make, skip=True)

    name = f"{batch} x {channels} x {height} x {height} {dtype} {_LAYOUTS[channels_last]}"
    run = channels if channels_last else height * height
    for part, call, ideal in (
        ("forward", forward, 2),
        ("backward", backward, 3),
        ("backward and skip", backward_and_skip, 4),
        ("apply", apply, 2),
        ("add", add, 3),
    ):
        yield Case(
            "group_norm_relu",
            part,
            name.replace("torch.", ""),
            call,
            batch * channels * height * height,
            ideal,
            aligned=run % 16 == 0,  # all that a kernel is told of an integer
        )


OPS = {"group_norm_relu": group_norm_relu}


def cases(full: bool = False) -> list[Case]:
    """Those of the table in docs/gpu-static.md, or all: every shape, batch, dtype and layout."""
    return [case for op in OPS.values() for case in op(full)]
