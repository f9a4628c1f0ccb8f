"""GroupNorm and ReLU on a GPU.

A tensor (N, C, *) is read as N samples of P pixels and C channels, in channels_last memory (address
p * C + c) or contiguous (address c * P + p); one source serves both. A program works on tiles of
pixels x channels, in one of three ways:

- held: all pixels of a few groups fit into a program's registers. Memory passes: forward 2 (read x,
  write y), backward 3 (read x and dy, write dx).
- swept: a program goes over its groups twice, first for the sums, then backwards for the result,
  which finds what was read last in the L2 cache. From memory come 2 and 3 passes again, as far as
  the cache reaches.
- split: where there are too few samples and groups for all multiprocessors, or a group is too
  large, pixels are split among programs: partial sums of each split and channel, a small kernel
  that combines them, and one that applies them. Forward 3 passes, backward 5.

Sums are taken in a fixed order and without atomics: the same input gives the same bits. Statistics
are float32: exact deviations from the mean in registers, or Welford's update and Chan's combination
(Chan, Golub and LeVeque, 1979). The ReLU's mask is computed again in backward, by the forward's
formula (`_normal` in group_norm_relu_kernels.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bit_kernels.ops._layout import memory_format
from bit_kernels.triton import group_norm_relu_kernels as kernels
from bit_kernels.triton._launch import ceil_div, launch, multiprocessors, power_of_2, vectors

# Elements of a tensor that a program holds, so that two programs and more share a multiprocessor's
# registers; backward holds two tensors.
_HELD_FORWARD, _HELD_BACKWARD = 16384, 8192
_HELD_UNALIGNED, _HELD_VECTORS = 4096, 2048  # in contiguous memory; vectors of 16 bytes
_SWEPT_TILE, _SPLIT_TILE = 4096, 2048  # elements that a program works on at a time
_WIDEST = 1024  # channels of such a tile


class _Shape(NamedTuple):
    """How a tensor is cut: N samples of P pixels and C channels in groups of D channels."""

    N: int
    C: int
    P: int
    num_groups: int
    channels_last: bool
    itemsize: int
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, num_groups: int) -> "_Shape":
        pixels = x.shape[2:].numel()
        if pixels >= 1 << 31:
            raise ValueError(f"input has {pixels} pixels; on a GPU they may be up to 2^31 - 1")
        channels_last = memory_format(x) != torch.contiguous_format
        return cls(
            x.shape[0], x.shape[1], pixels, num_groups, channels_last, x.element_size(), x.device
        )

    @property
    def D(self) -> int:
        return self.C // self.num_groups

    @property
    def count(self) -> float:
        """Elements of a group; a number that a kernel takes as float32."""
        return float(self.D * self.P)

    @property
    def vector(self) -> int:
        """Elements that a thread accesses at once: 16 bytes where the compiler knows that memory is
        aligned: Triton tells it of numbers that 16 divides."""
        run = self.C if self.channels_last else self.P
        return 16 // self.itemsize if run % 16 == 0 else 1

    @property
    def layout(self) -> dict[str, bool]:
        return dict(CHANNELS_LAST=self.channels_last, WIDE=self.C * self.P >= 1 << 31)

    def held(self, elements: int) -> dict[str, int] | None:
        """The tile of whole groups that a program holds, at most so many elements, if there is one.

        In channels_last memory a pixel's piece of it is 16 bytes at least: caches deal in 32. In
        contiguous memory a thread has as many channels as vectors, and the parameters of each beside
        them: registers are enough for 8 vectors of 16 bytes, or few single elements.
        """
        if not self.channels_last:
            few = _HELD_UNALIGNED if self.vector == 1 else _HELD_VECTORS * self.vector
            elements = min(elements, few)
        BP = power_of_2(self.P)
        BG = self._groups(elements // BP)
        if BP * BG * power_of_2(self.D) > elements:
            return None
        if (
            self.channels_last
            and min(BG * self.D, self.C) * self.itemsize < 16
            and BG < self.num_groups
        ):
            return None
        return self._tile(BG, BP)

    def swept(self) -> dict[str, int] | None:
        """The tile of whole groups that a program goes over its pixels with, if that pays."""
        BG = self._groups(_WIDEST)
        BC = BG * power_of_2(self.D)
        programs = self.N * ceil_div(self.num_groups, BG)
        if BC > _WIDEST or programs < 2 * multiprocessors(self.device):
            return None
        return self._tile(BG, min(power_of_2(self.P), _SWEPT_TILE // BC))

    def _groups(self, channels: int) -> int:
        """Of a program: more than one where a pixel's piece of one is less than 32 bytes, which a
        memory access is efficient with, and 64 if there is enough work; at most `channels`."""
        BG, D2 = 1, power_of_2(self.D)
        while BG < self.num_groups and 2 * BG * D2 <= channels:
            piece = BG * D2 * self.itemsize if self.channels_last else 64
            programs = self.N * ceil_div(self.num_groups, 2 * BG)
            enough = programs >= 4 * multiprocessors(self.device)
            if not (piece < 32 or piece < 64 and enough or BG * D2 * self.P < 256):
                break
            BG *= 2
        return BG

    def _tile(self, BG: int, BP: int) -> dict[str, int]:
        return dict(D=self.D, D2=power_of_2(self.D), BG=BG, BP=BP)

    def split(self) -> dict[str, int]:
        """The tile of pixels and channels that a program works on at a time."""
        if self.channels_last:
            BC = min(power_of_2(self.C), 64)
            return dict(BP=min(power_of_2(self.P), _SPLIT_TILE // BC), BC=BC)
        BP = min(power_of_2(self.P), _SPLIT_TILE)
        return dict(BP=BP, BC=min(power_of_2(self.C), _SPLIT_TILE // BP, 64))

    def splits(self, tile: dict[str, int]) -> tuple[int, int]:
        """Into how many splits of how many pixels to cut a sample, for enough work for all.

        Programs load what belongs to channels once; several tiles each make that little.
        """
        programs = max(1, self.N * ceil_div(self.C, tile["BC"]))
        wanted = ceil_div(8 * multiprocessors(self.device), programs)
        splits = max(1, min(wanted, ceil_div(self.P, 2 * tile["BP"])))
        rows = max(1, ceil_div(ceil_div(self.P, splits), tile["BP"])) * tile["BP"]
        return ceil_div(self.P, rows), rows


def _lay_out(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=memory_format(like))


def forward(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, and mean and rstd (N, num_groups) in float32."""
    x = _lay_out(input, input)
    weight, bias = vectors(weight, bias)
    shape = _Shape.of(x, num_groups)
    held = shape.held(_HELD_FORWARD)
    tile = held or shape.swept()
    if tile is None:
        mean, rstd = _statistics(x, None, shape, eps)
        return apply(x, mean, rstd, weight, bias, relu), mean, rstd
    output = torch.empty_like(x)
    mean, rstd = _empty_statistics(shape)
    blocks = ceil_div(num_groups, tile["BG"])
    launch(
        kernels.forward_swept_kernel if held is None else kernels.forward_held_kernel,
        (shape.N * blocks if x.numel() else 0,),
        x, weight, bias, output, mean, rstd, shape.C, shape.P, num_groups, shape.count, eps, blocks,
        **tile, **shape.layout, RELU=relu, **_options(tile, held is not None, 1, shape.vector),
    )  # fmt: skip
    return output, mean, rstd


def _options(
    tile: dict[str, int], is_held: bool, tensors: int, vector: int
) -> dict[str, int | None]:
    """Warps and registers: a thread has 16 elements of a tile, or holds 8 vectors of all tensors and,
    where they are vectors, as many registers as leave room for a second program."""
    elements = tile["BP"] * tile["BG"] * tile["D2"]
    threads = elements * tensors // (8 * vector) if is_held else elements // 16
    warps = min(8 if vector > 1 else 16, max(4, threads // 32))
    return dict(num_warps=warps, registers=128 if is_held and warps == 8 and vector > 1 else None)


def _empty_statistics(shape: _Shape) -> tuple[Tensor, Tensor]:
    # Where there are no pixels, nobody writes them.
    make = torch.empty if shape.P else torch.zeros
    size = shape.N, shape.num_groups
    mean, rstd = (make(size, dtype=torch.float32, device=shape.device) for _ in range(2))
    return mean, rstd


def _statistics(x: Tensor, other: Tensor | None, shape: _Shape, eps: float):
    tile = shape.split()
    splits, rows = shape.splits(tile)
    means, squares = torch.empty(2, shape.N, splits, shape.C, dtype=torch.float32, device=x.device)
    launch(
        kernels.statistics_kernel, (shape.N * splits, ceil_div(shape.C, tile["BC"])),
        x, other, means, squares, shape.C, shape.P, splits, rows, **tile, **shape.layout,
    )  # fmt: skip
    return combine_statistics(x, means, squares, rows, shape.num_groups, eps)


def statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd (N, num_groups) in float32."""
    x = _lay_out(input, input)
    return _statistics(x, None, _Shape.of(x, num_groups), eps)


def combine_statistics(
    x: Tensor, means: Tensor, squares: Tensor, rows: int, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """mean and rstd (N, num_groups) of x from what was found of its splits of `rows` pixels.

    means, squares: (N, splits, C), the mean and the sum of squared deviations from it. The last
        split has what pixels are left.
    """
    shape = _Shape.of(x, num_groups)
    mean, rstd = _empty_statistics(shape)
    splits = means.shape[1]
    launch(
        kernels.combine_statistics_kernel, (shape.N * shape.num_groups if shape.P else 0,),
        means, squares, mean, rstd, shape.C, shape.P, shape.num_groups, splits, rows,
        shape.count, eps, D=shape.D, **_combination(splits, shape.D), num_warps=1,
    )  # fmt: skip
    return mean, rstd


def _combination(splits: int, D: int) -> dict[str, int]:
    BD = min(power_of_2(D), 128)
    return dict(BS=min(power_of_2(splits), 1024 // BD), BD=BD)


def add(input: Tensor, other: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd (N, num_groups) of input + other, which takes input's place."""
    x, other = _lay_out(input, input), _lay_out(other, input)
    shape = _Shape.of(x, num_groups)
    mean, rstd = _statistics(x, other, shape, eps)
    if x is not input:  # it was laid out anew
        input.copy_(x)
    return mean, rstd


def apply(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """The output for statistics (N, num_groups) that are known."""
    x = _lay_out(input, input)
    mean, rstd, weight, bias = vectors(mean, rstd, weight, bias)
    shape = _Shape.of(x, mean.shape[1])
    output, tile = torch.empty_like(x), shape.split()
    splits, rows = shape.splits(tile)
    launch(
        kernels.apply_kernel, (shape.N * splits, ceil_div(shape.C, tile["BC"])),
        x, mean, rstd, weight, bias, output, shape.C, shape.P, shape.num_groups, splits, rows,
        D=shape.D, **tile, **shape.layout, RELU=relu,
    )  # fmt: skip
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    grad_skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input (plus grad_skip), weight and bias, those of both in float32."""
    x, grad_output = _lay_out(input, input), _lay_out(grad_output, input)
    grad_skip = None if grad_skip is None else _lay_out(grad_skip, input)
    mean, rstd, weight, bias = vectors(mean, rstd, weight, bias)
    shape = _Shape.of(x, mean.shape[1])
    grad_input = torch.empty_like(x)
    # Without elements nobody writes the sums.
    make = torch.empty if x.numel() else torch.zeros
    sums, sums_normal = make(2, shape.N, shape.C, dtype=torch.float32, device=x.device)
    held = shape.held(_HELD_BACKWARD)
    tile = held or shape.swept()
    numbers = shape.C, shape.P, shape.num_groups
    if tile is not None:
        blocks = ceil_div(shape.num_groups, tile["BG"])
        launch(
            kernels.backward_swept_kernel if held is None else kernels.backward_held_kernel,
            (shape.N * blocks if x.numel() else 0,),
            grad_output, x, mean, rstd, weight, bias, grad_skip, grad_input, sums, sums_normal,
            *numbers, shape.count, blocks, **tile, **shape.layout, RELU=relu,
            **_options(tile, held is not None, 2, shape.vector),
        )  # fmt: skip
        return grad_input, *_parameter_gradients(sums, sums_normal, shape)
    tile = shape.split()
    splits, rows = shape.splits(tile)
    parts, parts_normal = torch.empty(
        2, shape.N, splits, shape.C, dtype=torch.float32, device=x.device
    )
    group_mean, group_mean_normal = torch.empty(
        2, *mean.shape, dtype=torch.float32, device=x.device
    )
    grid = shape.N * splits, ceil_div(shape.C, tile["BC"])
    launch(
        kernels.gradient_sums_kernel, grid,
        grad_output, x, mean, rstd, weight, bias, parts, parts_normal, *numbers, splits, rows,
        D=shape.D, **tile, **shape.layout, RELU=relu,
    )  # fmt: skip
    launch(
        kernels.combine_gradient_sums_kernel, (shape.N * shape.num_groups if shape.P else 0,),
        parts, parts_normal, weight, sums, sums_normal, group_mean, group_mean_normal,
        shape.C, shape.num_groups, splits, shape.count,
        D=shape.D, **_combination(splits, shape.D), num_warps=1,
    )  # fmt: skip
    launch(
        kernels.input_gradient_kernel, grid,
        grad_output, x, mean, rstd, weight, bias, group_mean, group_mean_normal, grad_skip,
        grad_input, *numbers, splits, rows, D=shape.D, **tile, **shape.layout, RELU=relu,
        registers=200 if shape.vector == 1 else None,  # else the assembler may spill some
    )  # fmt: skip
    return grad_input, *_parameter_gradients(sums, sums_normal, shape)


def _parameter_gradients(sums: Tensor, sums_normal: Tensor, shape: _Shape):
    grad_weight = torch.empty(shape.C, dtype=torch.float32, device=sums.device)
    grad_bias = torch.empty_like(grad_weight)
    launch(
        kernels.parameter_gradients_kernel, (ceil_div(shape.C, 16),),
        sums, sums_normal, grad_weight, grad_bias, shape.N, shape.C,
        BN=min(power_of_2(shape.N), 128), BC=16,
    )  # fmt: skip
    return grad_weight, grad_bias
