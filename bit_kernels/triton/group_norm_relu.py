"""GroupNorm and ReLU on a GPU.

A tensor (N, C, *) is read as N samples of P pixels and C channels, in channels_last memory
("channels innermost", address p * C + c) or contiguous (address c * P + p); one source serves both.
A program works on a tile of pixels x channels. There are two ways:

- Where all pixels of a few groups fit into a program's registers, one kernel does it all: forward
  in 2 memory passes (read x, write y), backward in 3 (read x and dy, write dx).
- Where they don't, the pixels are split so that even one sample fills the GPU: partial sums of each
  split and channel, a small kernel that combines them, and a pass that applies them. Forward 3
  passes, backward 5.

Sums are taken in a fixed order and without atomics: the same input gives the same bits. Statistics
are float32: exact deviations from the mean in registers, or Welford's update and Chan's combination
(Chan, Golub and LeVeque, 1979). The ReLU's mask is computed again in backward, by the forward's
formula (`_normal`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.ops._layout import empty_output, memory_format
from bit_kernels.triton._launch import ceil_div, launch, multiprocessors, power_of_2

# Elements of one tensor that a program holds at once, in one pass. Backward holds two tensors.
_HELD_FORWARD, _HELD_BACKWARD = 32768, 16384
_TILE = 2048  # elements that a program works on at a time, where pixels are split
_PROGRAMS = 8  # of a launch for each multiprocessor, where pixels are split


# ---- parts of kernels


@triton.jit
def _channels_of(first_group, D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, num_groups):
    """Channels of BG groups from `first_group`, each padded from D to D2 places; and which exist."""
    place = tl.arange(0, BG * D2)
    if D == D2:  # one run of memory, which the compiler must see to load it in wide pieces
        channel = first_group * D + place
        return channel, channel < num_groups * D
    else:
        group = first_group + place // D2
        within = place % D2
        return group * D + within, (group < num_groups) & (within < D)


@triton.jit
def _offsets(pixel, channel, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Of a tile of pixels x channels in its sample, in 64 bits where the sample needs them."""
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    if CHANNELS_LAST:
        return pixel[:, None] * C + channel[None, :]
    else:
        return pixel[:, None] + channel[None, :] * P


@triton.jit
def _sum_of_groups(per_channel, D2: tl.constexpr, BG: tl.constexpr):
    """Sums of channels (BG * D2) over their groups, at each channel again."""
    sums = tl.sum(tl.reshape(per_channel, (BG, D2)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (BG, D2)), (BG * D2,))


@triton.jit
def _scale_and_shift(weight, bias, rstd, channel, exists):
    """rstd * gamma and beta of channels."""
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(rstd)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _normal(x, mean, scale, shift):
    """The normalised x, before the ReLU. One formula, so that forward and backward mask alike."""
    return tl.fma(x - mean[None, :], scale[None, :], shift[None, :])


# ---- one pass


@triton.jit
def _forward_kernel(
    x, weight, bias, y, mean, rstd, C, P, num_groups, eps, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // blocks
    first_group = tl.program_id(0) % blocks * BG
    channel, exists = _channels_of(first_group, D, D2, BG, num_groups)
    pixel = tl.arange(0, BP)
    inside = (pixel < P)[:, None] & exists[None, :]
    offsets = _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    start = n.to(tl.int64) * C * P
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)

    count = D * P.to(tl.float32)
    center = _sum_of_groups(tl.sum(value, 0), D2, BG) / count
    deviation = tl.where(inside, value - center[None, :], 0.0)
    variance = _sum_of_groups(tl.sum(deviation * deviation, 0), D2, BG) / count
    spread = 1.0 / tl.sqrt_rn(variance + eps)
    statistic = n.to(tl.int64) * num_groups + channel // D
    first = exists & (channel % D == 0)  # the group's first channel writes for all
    tl.store(mean + statistic, center, mask=first)
    tl.store(rstd + statistic, spread, mask=first)

    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    value = _normal(value, center, scale, shift)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    tl.store(y + start + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_output, x, mean, rstd, weight, bias, grad_skip, grad_input, sums, sums_normal,
    C, P, num_groups, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // blocks
    first_group = tl.program_id(0) % blocks * BG
    channel, exists = _channels_of(first_group, D, D2, BG, num_groups)
    pixel = tl.arange(0, BP)
    inside = (pixel < P)[:, None] & exists[None, :]
    offsets = _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    start = n.to(tl.int64) * C * P
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + start + offsets, mask=inside, other=0.0).to(tl.float32)

    statistic = n.to(tl.int64) * num_groups + channel // D
    center = tl.load(mean + statistic, mask=exists, other=0.0)
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    if RELU:
        grad = tl.where(_normal(value, center, scale, shift) <= 0, 0.0, grad)
    normal = (value - center[None, :]) * spread[None, :]
    plain, along = tl.sum(grad, 0), tl.sum(grad * normal, 0)
    place = n.to(tl.int64) * C + channel
    tl.store(sums + place, plain, mask=exists)
    tl.store(sums_normal + place, along, mask=exists)

    # scale is rstd * gamma: rstd times the group's mean of the gradient by the normalised x.
    count = D * P.to(tl.float32)
    plain = _sum_of_groups(plain * scale, D2, BG) / count
    along = _sum_of_groups(along * scale, D2, BG) / count
    result = grad * scale[None, :] - plain[None, :] - normal * along[None, :]
    if grad_skip is not None:
        result += tl.load(grad_skip + start + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_input + start + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


# ---- split pixels: partial sums (N, splits, C), their combination, what they are for


@triton.jit
def _split(splits, C, P, rows, BC: tl.constexpr):
    """n, split, channels and where the pixels of this program begin and end."""
    n = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    return n, split, channel, split * rows, tl.minimum(split * rows + rows, P)


@triton.jit
def _statistics_kernel(
    x, other, means, squares, C, P, splits, rows,
    BP: tl.constexpr, BC: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """means and sums of squared deviations, after x += other where that is there."""
    n, split, channel, first, end = _split(splits, C, P, rows, BC)
    exists = channel < C
    start = n.to(tl.int64) * C * P
    center = tl.zeros((BP, BC), tl.float32)
    square = tl.zeros((BP, BC), tl.float32)
    seen = 0.0
    for at in range(first, end, BP):
        pixel = at + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=inside, other=0.0)
        if other is not None:
            value = value.to(tl.float32) + tl.load(other + offsets, mask=inside, other=0.0)
            value = value.to(x.dtype.element_ty)
            tl.store(x + offsets, value, mask=inside)
        # Welford: a place that is inside now was so each time before, `seen` times.
        seen += 1.0
        deviation = tl.where(inside, value.to(tl.float32) - center, 0.0)
        center += deviation * (1.0 / seen)
        square += deviation * tl.where(inside, value.to(tl.float32) - center, 0.0)
    # How often each row of the tile was inside.
    counts = ((end - first - tl.arange(0, BP) + BP - 1) // BP).to(tl.float32)
    total = (end - first).to(tl.float32)
    mean = tl.sum(center * counts[:, None], 0) / total
    apart = center - mean[None, :]
    square = tl.sum(square + apart * apart * counts[:, None], 0)
    place = (n.to(tl.int64) * splits + split) * C + channel
    tl.store(means + place, mean, mask=exists)
    tl.store(squares + place, square, mask=exists)


@triton.jit
def _combine_statistics_kernel(
    means, squares, mean, rstd, C, P, num_groups, splits, rows, eps,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Chan's combination of all splits and channels of a group."""
    n = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    start = n.to(tl.int64) * splits * C + group * D
    count = D * P.to(tl.float32)
    total = tl.zeros((BS, BD), tl.float32)
    for at in range(0, splits, BS):
        split = at + tl.arange(0, BS)
        pixels = tl.minimum(rows, P - split * rows).to(tl.float32)
        for first in range(0, D, BD):
            channel = first + tl.arange(0, BD)
            inside = (split < splits)[:, None] & (channel < D)[None, :]
            offsets = start + split[:, None] * C + channel[None, :]
            total += tl.load(means + offsets, mask=inside, other=0.0) * pixels[:, None]
    center = tl.sum(tl.sum(total, 1), 0) / count
    total = tl.zeros((BS, BD), tl.float32)
    for at in range(0, splits, BS):
        split = at + tl.arange(0, BS)
        pixels = tl.minimum(rows, P - split * rows).to(tl.float32)
        for first in range(0, D, BD):
            channel = first + tl.arange(0, BD)
            inside = (split < splits)[:, None] & (channel < D)[None, :]
            offsets = start + split[:, None] * C + channel[None, :]
            apart = tl.load(means + offsets, mask=inside, other=0.0) - center
            square = tl.load(squares + offsets, mask=inside, other=0.0)
            total += tl.where(inside, square + apart * apart * pixels[:, None], 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / count
    tl.store(mean + tl.program_id(0), center)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _apply_kernel(
    x, mean, rstd, weight, bias, y, C, P, num_groups, splits,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, _, channel, first, end = _split(splits, C, P, BP, BC)
    exists = channel < C
    pixel = first + tl.arange(0, BP)
    inside = (pixel < end)[:, None] & exists[None, :]
    offsets = n.to(tl.int64) * C * P + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    statistic = n.to(tl.int64) * num_groups + channel // D
    center = tl.load(mean + statistic, mask=exists, other=0.0)
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    value = _normal(value, center, scale, shift)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums_kernel(
    grad_output, x, mean, rstd, weight, bias, sums, sums_normal, C, P, num_groups, splits, rows,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient behind the ReLU, and of its product with the normalised x."""
    n, split, channel, first, end = _split(splits, C, P, rows, BC)
    exists = channel < C
    start = n.to(tl.int64) * C * P
    statistic = n.to(tl.int64) * num_groups + channel // D
    center = tl.load(mean + statistic, mask=exists, other=0.0)
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    plain = tl.zeros((BP, BC), tl.float32)
    along = tl.zeros((BP, BC), tl.float32)
    for at in range(first, end, BP):
        pixel = at + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_output + offsets, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(_normal(value, center, scale, shift) <= 0, 0.0, grad)
        plain += grad
        along += grad * (value - center[None, :])
    place = (n.to(tl.int64) * splits + split) * C + channel
    tl.store(sums + place, tl.sum(plain, 0), mask=exists)
    tl.store(sums_normal + place, tl.sum(along, 0) * spread, mask=exists)


@triton.jit
def _combine_gradient_sums_kernel(
    sums, sums_normal, weight, group_mean, group_mean_normal, C, P, num_groups, splits,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Means over each group of the gradient by the normalised x, and of its product with that."""
    n = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    start = n.to(tl.int64) * splits * C + group * D
    plain = tl.zeros((BS, BD), tl.float32)
    along = tl.zeros((BS, BD), tl.float32)
    for at in range(0, splits, BS):
        split = at + tl.arange(0, BS)
        for first in range(0, D, BD):
            channel = first + tl.arange(0, BD)
            exists = channel < D
            inside = (split < splits)[:, None] & exists[None, :]
            offsets = start + split[:, None] * C + channel[None, :]
            gamma = tl.full((BD,), 1.0, tl.float32)
            if weight is not None:
                gamma = tl.load(weight + group * D + channel, mask=exists, other=0.0)
                gamma = gamma.to(tl.float32)
            plain += tl.load(sums + offsets, mask=inside, other=0.0) * gamma[None, :]
            along += tl.load(sums_normal + offsets, mask=inside, other=0.0) * gamma[None, :]
    count = D * P.to(tl.float32)
    tl.store(group_mean + tl.program_id(0), tl.sum(tl.sum(plain, 1), 0) / count)
    tl.store(group_mean_normal + tl.program_id(0), tl.sum(tl.sum(along, 1), 0) / count)


@triton.jit
def _parameter_gradients_kernel(
    sums, sums_normal, grad_weight, grad_bias, C, total, BT: tl.constexpr, BC: tl.constexpr
):
    """Sums over all samples and splits, `total` of them, for each channel."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < C
    plain = tl.zeros((BT, BC), tl.float32)
    along = tl.zeros((BT, BC), tl.float32)
    for at in range(0, total, BT):
        row = at + tl.arange(0, BT)
        inside = (row < total)[:, None] & exists[None, :]
        offsets = row.to(tl.int64)[:, None] * C + channel[None, :]
        plain += tl.load(sums + offsets, mask=inside, other=0.0)
        along += tl.load(sums_normal + offsets, mask=inside, other=0.0)
    tl.store(grad_bias + channel, tl.sum(plain, 0), mask=exists)
    tl.store(grad_weight + channel, tl.sum(along, 0), mask=exists)


@triton.jit
def _input_gradient_kernel(
    grad_output, x, mean, rstd, weight, bias, group_mean, group_mean_normal, grad_skip, grad_input,
    C, P, num_groups, splits,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, _, channel, first, end = _split(splits, C, P, BP, BC)
    exists = channel < C
    pixel = first + tl.arange(0, BP)
    inside = (pixel < end)[:, None] & exists[None, :]
    offsets = n.to(tl.int64) * C * P + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    statistic = n.to(tl.int64) * num_groups + channel // D
    center = tl.load(mean + statistic, mask=exists, other=0.0)
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    plain = tl.load(group_mean + statistic, mask=exists, other=0.0) * spread
    along = tl.load(group_mean_normal + statistic, mask=exists, other=0.0) * spread * spread
    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        grad = tl.where(_normal(value, center, scale, shift) <= 0, 0.0, grad)
    result = grad * scale[None, :] - plain[None, :]
    result -= (value - center[None, :]) * along[None, :]
    if grad_skip is not None:
        result += tl.load(grad_skip + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


# ---- launches


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
    def layout(self) -> dict[str, bool]:
        return dict(CHANNELS_LAST=self.channels_last, WIDE=self.C * self.P >= 1 << 31)

    def one_pass(self, held: int) -> dict[str, int] | None:
        """The tile of whole groups that a program holds, at most `held` elements; None if none fits.

        In channels_last memory several groups, where a pixel's piece of one is less than the 64
        bytes that a memory access is efficient with, while there is work for all multiprocessors.
        """
        BP, D2, BG = power_of_2(self.P), power_of_2(self.D), 1
        if BP * D2 > held:
            return None
        wanted = 64 // self.itemsize if self.channels_last else 1
        while BG < self.num_groups and BP * D2 * BG * 2 <= held:
            enough_work = self.N * ceil_div(self.num_groups, BG * 2) >= multiprocessors(self.device)
            wider = BG * D2 < wanted and (enough_work or BG * D2 * self.itemsize < 32)
            if not (wider or BP * D2 * BG < 256):
                break
            BG *= 2
        return dict(D=self.D, D2=D2, BG=BG, BP=BP)

    def tile(self) -> dict[str, int]:
        """Pixels and channels that a program works on at a time; BP * BC is at most _TILE."""
        if self.channels_last:
            BC = min(power_of_2(self.C), 64)
            return dict(BP=min(power_of_2(self.P), _TILE // BC), BC=BC)
        BP = min(power_of_2(self.P), _TILE)
        return dict(BP=BP, BC=min(power_of_2(self.C), _TILE // BP, 64))

    def splits(self, tile: dict[str, int]) -> tuple[int, int]:
        """Into how many splits of how many pixels to cut a sample, so that there is enough work."""
        programs = self.N * ceil_div(self.C, tile["BC"])
        wanted = ceil_div(_PROGRAMS * multiprocessors(self.device), programs)
        splits = max(1, min(wanted, ceil_div(self.P, 2 * tile["BP"])))
        rows = ceil_div(ceil_div(self.P, splits), tile["BP"]) * tile["BP"]
        return ceil_div(self.P, rows), rows


def _warps(elements: int) -> int:
    """Of a program that holds so many elements of a tensor: at most 64 a thread."""
    return min(16, max(4, power_of_2(elements // 1024)))


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
    shape = _Shape.of(x, num_groups)
    tile = shape.one_pass(_HELD_FORWARD)
    if tile is None:
        mean, rstd = _statistics(x, None, shape, eps)
        return apply(x, mean, rstd, weight, bias, relu), mean, rstd
    output = torch.empty_like(x)
    mean, rstd = _empty_statistics(shape)
    blocks = ceil_div(num_groups, tile["BG"])
    launch(
        _forward_kernel, (shape.N * blocks if x.numel() else 0,),
        x, weight, bias, output, mean, rstd, shape.C, shape.P, num_groups, eps, blocks,
        **tile, **shape.layout, RELU=relu, num_warps=_warps(tile["BP"] * tile["BG"] * tile["D2"]),
    )  # fmt: skip
    return output, mean, rstd


def _empty_statistics(shape: _Shape) -> tuple[Tensor, Tensor]:
    # Where there are no pixels, nobody writes them.
    make = torch.empty if shape.P else torch.zeros
    size = shape.N, shape.num_groups
    return make(size, device=shape.device), make(size, device=shape.device)


def _statistics(x: Tensor, other: Tensor | None, shape: _Shape, eps: float):
    mean, rstd = _empty_statistics(shape)
    tile = shape.tile()
    splits, rows = shape.splits(tile)
    means, squares = torch.empty(2, shape.N, splits, shape.C, device=x.device)
    launch(
        _statistics_kernel, (shape.N * splits, ceil_div(shape.C, tile["BC"])),
        x, other, means, squares, shape.C, shape.P, splits, rows, **tile, **shape.layout,
    )  # fmt: skip
    launch(
        _combine_statistics_kernel, (shape.N * shape.num_groups if shape.P else 0,),
        means, squares, mean, rstd, shape.C, shape.P, shape.num_groups, splits, rows, eps,
        D=shape.D, **_combination(splits, shape.D), num_warps=1,
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
    if x.data_ptr() != input.data_ptr():  # it was laid out anew
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
    shape = _Shape.of(x, mean.shape[1])
    output, tile = torch.empty_like(x), shape.tile()
    splits = ceil_div(shape.P, tile["BP"])
    launch(
        _apply_kernel, (shape.N * splits, ceil_div(shape.C, tile["BC"])),
        x, mean, rstd, weight, bias, output, shape.C, shape.P, shape.num_groups, splits,
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
    shape = _Shape.of(x, mean.shape[1])
    grad_input = empty_output(x)
    if x.numel() == 0:
        zeros = torch.zeros(shape.C, device=x.device)
        return grad_input, zeros, zeros.clone()
    held = shape.one_pass(_HELD_BACKWARD)
    if held is not None:
        sums, sums_normal = torch.empty(2, shape.N, 1, shape.C, device=x.device)
        blocks = ceil_div(shape.num_groups, held["BG"])
        launch(
            _backward_kernel, (shape.N * blocks,),
            grad_output, x, mean, rstd, weight, bias, grad_skip, grad_input, sums, sums_normal,
            shape.C, shape.P, shape.num_groups, blocks, **held, **shape.layout, RELU=relu,
            num_warps=_warps(2 * held["BP"] * held["BG"] * held["D2"]),
        )  # fmt: skip
        return grad_input, *_parameter_gradients(sums, sums_normal, shape)
    tile = shape.tile()
    splits, rows = shape.splits(tile)
    sums, sums_normal = torch.empty(2, shape.N, splits, shape.C, device=x.device)
    group_mean, group_mean_normal = torch.empty(2, *mean.shape, device=x.device)
    channel_blocks = ceil_div(shape.C, tile["BC"])
    launch(
        _gradient_sums_kernel, (shape.N * splits, channel_blocks),
        grad_output, x, mean, rstd, weight, bias, sums, sums_normal,
        shape.C, shape.P, shape.num_groups, splits, rows,
        D=shape.D, **tile, **shape.layout, RELU=relu,
    )  # fmt: skip
    launch(
        _combine_gradient_sums_kernel, (shape.N * shape.num_groups,),
        sums, sums_normal, weight, group_mean, group_mean_normal,
        shape.C, shape.P, shape.num_groups, splits,
        D=shape.D, **_combination(splits, shape.D), num_warps=1,
    )  # fmt: skip
    splits = ceil_div(shape.P, tile["BP"])
    launch(
        _input_gradient_kernel, (shape.N * splits, channel_blocks),
        grad_output, x, mean, rstd, weight, bias, group_mean, group_mean_normal, grad_skip,
        grad_input, shape.C, shape.P, shape.num_groups, splits,
        D=shape.D, **tile, **shape.layout, RELU=relu,
    )  # fmt: skip
    return grad_input, *_parameter_gradients(sums, sums_normal, shape)


def _parameter_gradients(sums: Tensor, sums_normal: Tensor, shape: _Shape):
    grad_weight = torch.empty(shape.C, device=sums.device)
    grad_bias = torch.empty_like(grad_weight)
    BC = min(power_of_2(shape.C), 32)
    launch(
        _parameter_gradients_kernel, (ceil_div(shape.C, BC),),
        sums, sums_normal, grad_weight, grad_bias, shape.C, sums.shape[0] * sums.shape[1],
        BT=32, BC=BC,
    )  # fmt: skip
    return grad_weight, grad_bias
