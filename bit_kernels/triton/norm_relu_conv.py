"""A convolution on a GPU that normalises its input as it reads it, so that nobody writes that.

    y = conv(max(0, (x - mean) * rstd * gamma + beta), w) + b + residual

One kernel, an implicit matrix product on tensor cores: rows are output pixels, columns are output
channels, and what is summed over is taps x input channels. Tensors are channels_last, so that a row
of the input matrix is a pixel's channels at a tap, which a program reads, normalises by the formula
of group_norm_relu, rounds to the compute dtype and multiplies. What lies outside the image is zero
behind the normalisation. Sums are float32; the result is rounded once, after bias and residual.

A program's pixels lie within one sample. So the statistics of the result, as it was rounded, come
for nothing: each program writes mean and squared deviations of its channels, and the kernel that
combines group_norm_relu's splits combines them to what the next GroupNorm needs.

Memory passes: read x (once where the cache keeps it for all taps and columns), read the residual,
write y; PyTorch's convolution and the kernels around it take 2 more for the normalised input, 1 for
its statistics and 3 for a sum. But every tap and every block of columns normalises again. Which is
faster depends on the shape: `choose` decides by what was measured (`python -m
bit_kernels.triton.tune`, norm_relu_conv.csv), and where nothing was, the separate kernels serve.
"""

import csv
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.ops._composition import Conv
from bit_kernels.ops._layout import memory_format
from bit_kernels.triton import group_norm_relu
from bit_kernels.triton._launch import ceil_div, device_name, launch, power_of_2, vectors
from bit_kernels.triton.group_norm_relu_kernels import _normal, _offsets, _scale_and_shift

_GROUP = 8  # tiles of rows that go through all columns together, while the cache holds them


@triton.jit
def _coefficients_kernel(
    mean, rstd, gamma, centers, scales, C, D, num_groups, blocks, BC: tl.constexpr
):
    """Of each sample and channel: its mean, and rstd by gamma."""
    n = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    exists = channel < C
    statistic = n * num_groups + channel // D
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    scale, _ = _scale_and_shift(gamma, None, spread, channel, exists)
    tl.store(centers + n * C + channel, tl.load(mean + statistic, mask=exists), mask=exists)
    tl.store(scales + n * C + channel, scale, mask=exists)


@triton.jit
def _kernel(
    x, centers, scales, beta, weight, bias, residual, y, means, squares,
    C, H, W, C_out, OW, P, tiles, row_tiles,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P pixels of OW a row come from H x W, in `tiles` tiles of BM."""
    # Rows first within a band of GROUP tiles of rows: its input stays in the cache for all columns.
    column_tiles = tl.cdiv(C_out, BN)
    band = tl.program_id(0) // (GROUP * column_tiles)
    within = tl.program_id(0) % (GROUP * column_tiles)
    rows_of_band = tl.minimum(row_tiles - band * GROUP, GROUP)
    row_tile = band * GROUP + within % rows_of_band
    out_channel = within // rows_of_band * BN + tl.arange(0, BN)
    out_exists = out_channel < C_out
    n = row_tile // tiles
    pixel = row_tile % tiles * BM + tl.arange(0, BM)
    in_image = pixel < P

    MOVES: tl.constexpr = KH * KW > 1 or SH * SW > 1 or PH + PW > 0
    top = pixel // OW * SH - PH
    left = pixel % OW * SW - PW
    x += n.to(tl.int64) * H * W * C
    centers += n * C
    scales += n * C
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(0, KH * KW * tl.cdiv(C, BK)):
        # All taps of a block of channels, one after the other: they read the same pixels.
        tap = step % (KH * KW)
        channel = step // (KH * KW) * BK + tl.arange(0, BK)
        exists = channel < C
        source, inside = pixel, in_image
        if MOVES:
            row = top + tap // KW * DH
            column = left + tap % KW * DW
            source = row * W + column
            inside = in_image & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        offsets = _offsets(source, channel, C, P, True, WIDE)
        value = tl.load(x + offsets, mask=inside[:, None] & exists[None, :], other=0.0)
        center = tl.load(centers + channel, mask=exists, other=0.0)
        scale = tl.load(scales + channel, mask=exists, other=0.0)
        shift = tl.zeros_like(scale)
        if beta is not None:
            shift = tl.load(beta + channel, mask=exists, other=0.0).to(tl.float32)
        value = _normal(value.to(tl.float32), center, scale, shift)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays
        if PH + PW > 0:
            value = tl.where(inside[:, None], value, 0.0)
        offsets = _offsets(out_channel, tap * C + channel, KH * KW * C, P, True, WIDE)
        kernel = tl.load(weight + offsets, mask=out_exists[:, None] & exists[None, :], other=0.0)
        value = value.to(kernel.dtype)
        sums = tl.dot(value, tl.trans(kernel), sums, input_precision=PRECISION)

    if bias is not None:
        shift = tl.load(bias + out_channel, mask=out_exists, other=0.0)
        sums += shift.to(tl.float32)[None, :]
    written = in_image[:, None] & out_exists[None, :]
    start = n.to(tl.int64) * P * C_out
    offsets = _offsets(pixel, out_channel, C_out, P, True, WIDE)
    if residual is not None:
        sums += tl.load(residual + start + offsets, mask=written, other=0.0).to(tl.float32)
    result = sums.to(y.dtype.element_ty)
    tl.store(y + start + offsets, result, mask=written)
    if means is not None:
        count = tl.minimum(P - row_tile % tiles * BM, BM).to(tl.float32)
        result = tl.where(written, result.to(tl.float32), 0.0)
        center = tl.sum(result, 0) / count
        deviation = tl.where(written, result - center[None, :], 0.0)
        place = row_tile.to(tl.int64) * C_out + out_channel
        tl.store(means + place, center, mask=out_exists)
        tl.store(squares + place, tl.sum(deviation * deviation, 0), mask=out_exists)


# ---- launches


class Tile(NamedTuple):
    """What a program works on: BM pixels, BN output channels, BK input channels at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int  # of the pipeline that loads

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Tile":
        return cls(*map(int, text.split("x")))


# Those that `tune` tries, for 16-bit types; float32 takes half of BK. In 16-bit types no program
# spills registers: of the first on every GPU that the kernel is for, of the rest on Hopper and newer.
DEFAULT = Tile(128, 128, 32, 8, 4)
TILES = (
    DEFAULT,
    Tile(64, 64, 64, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(256, 64, 32, 8, 4),
    Tile(128, 64, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 256, 32, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(64, 256, 32, 8, 4),
)


def fitted(tile: Tile, C: int, C_out: int, P: int, itemsize: int) -> Tile:
    """`tile`, no larger than a convolution from C to C_out channels and P pixels has use for."""
    BM, BN, BK, *rest = tile
    return Tile(
        max(16, min(BM, power_of_2(P))),
        max(16, min(BN, power_of_2(C_out))),
        max(16, min(BK * 2 // itemsize, power_of_2(C))),
        *rest,
    )


def coefficients(mean: Tensor, rstd: Tensor, gamma: Tensor | None, C: int) -> Tensor:
    """(2, N, C): the mean of each sample's channels, and rstd by gamma, from those of groups."""
    mean, rstd, gamma = vectors(mean, rstd, gamma)
    N, num_groups = mean.shape
    result = torch.empty(2, N, C, dtype=torch.float32, device=mean.device)
    BC = min(power_of_2(C), 512)
    blocks = ceil_div(C, BC)
    launch(
        _coefficients_kernel, (N * blocks,),
        mean, rstd, gamma, *result, C, C // num_groups, num_groups, blocks, BC=BC,
    )  # fmt: skip
    return result


def convolve(
    input: Tensor,
    coefficients: Tensor,
    beta: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    tile: Tile,
    residual: Tensor | None = None,
    next_norm: tuple[int, float] | None = None,
) -> tuple[Tensor, ...]:
    """The output, and its mean and rstd (N, groups) for the groups and eps of next_norm, if any.

    coefficients: of the input's norm; beta: (C_in,), of any dtype, as is bias: (C_out,).
    weight: (C_out, C_in, kh, kw) in the input's dtype, as it is to be used. residual: like the output.
    """
    x, weight = _channels_last(input), _channels_last(weight)
    beta, bias = vectors(beta, bias)
    residual = None if residual is None else _channels_last(residual)
    N, C, H, W = x.shape
    _, _, OH, OW = shape = Conv(weight, None, stride, padding, dilation).output_shape(x)
    C_out, KH, KW, P = weight.shape[0], *weight.shape[2:], OH * OW
    if max(H * W, P) >= 1 << 31:
        raise ValueError(f"input has {H} x {W} pixels; on a GPU they may be up to 2^31 - 1")
    tile = fitted(tile, C, C_out, P, x.element_size())
    tiles = ceil_div(P, tile.BM)
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    means = squares = None
    if next_norm is not None:
        means, squares = torch.empty(2, N, tiles, C_out, dtype=torch.float32, device=x.device)
    launch(
        _kernel, (N * tiles * ceil_div(C_out, tile.BN),),
        x, *coefficients, beta, weight, bias, residual, output, means, squares,
        C, H, W, C_out, OW, P, tiles, N * tiles,
        KH=KH, KW=KW, SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1],
        DH=dilation[0], DW=dilation[1], BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=_GROUP,
        RELU=relu, WIDE=max(H * W * C, P * C_out, weight.numel()) >= 1 << 31,
        PRECISION=_precision(x.dtype, x.device), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    statistics = ()
    if next_norm is not None:
        statistics = group_norm_relu.combine_statistics(output, means, squares, tile.BM, *next_norm)
    return output.contiguous(memory_format=memory_format(input)), *statistics


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 is multiplied, as torch's own convolutions are told to."""
    allowed = dtype == torch.float32 and device.type == "cuda"
    return "tf32" if allowed and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def dtype_name(dtype: torch.dtype, device: torch.device) -> str:
    """What a convolution is measured as: "tf32" for float32 that is multiplied so."""
    is_tf32 = _precision(dtype, device) == "tf32"
    return "tf32" if is_tf32 else str(dtype).removeprefix("torch.")


# ---- the choice


class Case(NamedTuple):
    """A convolution that was measured, or might be."""

    dtype: str  # or "tf32", float32 that is multiplied so
    batch: int  # its class
    C_in: int
    C_out: int
    kernel: int
    stride: int
    padding: int
    H: int
    W: int
    residual: bool

    @classmethod
    def of(cls, input: Tensor, conv: Conv, residual: bool) -> "Case | None":
        """None for a convolution that is another along H than along W, or dilated."""
        sides = tuple(conv.weight.shape[2:]), conv.stride, conv.padding
        if conv.dilation != (1, 1) or any(a != b for a, b in sides):
            return None
        N, C, H, W = input.shape
        dtype = dtype_name(input.dtype, input.device)
        return cls(
            dtype, batch_class(N), C, conv.weight.shape[0], *(a for a, _ in sides), H, W, residual
        )


def batch_class(batch: int) -> int:
    """The power of two that a batch is measured as: what is nearest by ratio."""
    return 1 << round(math.log2(max(1, batch)))


# What was measured of a case, beside the fused kernel with a tile: the parts of the separate way.
# The convolution is PyTorch's, with the sum and its statistics if there is a residual.
PARTS = ("group_norm_relu", "group_norm_relu_apply", "statistics", "convolution")
TABLE = Path(__file__).with_suffix(".csv")


def read(path: Path) -> dict[tuple[str, Case], dict[str, float]]:
    """Seconds of each way, for each device's name and case."""
    measured = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = (int(row[name]) for name in Case._fields[1:-1])
            case = Case(row["dtype"], *numbers, row["residual"] == "True")
            measured.setdefault((row["device"], case), {})[row["way"]] = float(row["seconds"])
    return measured


def write(path: Path, measured: dict[tuple[str, Case], dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("device", *Case._fields, "way", "seconds"))
        for (device, case), ways in sorted(measured.items()):
            table.writerows((device, *case, way, f"{s:.3g}") for way, s in ways.items())


@functools.cache
def _measured() -> dict[tuple[str, Case], dict[str, float]]:
    return read(TABLE)


@functools.lru_cache(4096)
def fastest(device: str, cases: tuple[Case | None, ...], known: bool) -> tuple[Tile, ...] | None:
    """Tiles for the convolutions of one input, or None where the separate kernels are faster or
    something wasn't measured. known: whether the input's statistics are."""
    rows = [_measured().get((device, case)) for case in cases]
    if any(row is None for row in rows):
        return None
    normalisation = "group_norm_relu_apply" if known else "group_norm_relu"
    separate = rows[0][normalisation] + sum(row["convolution"] for row in rows)
    fused, tiles = 0.0 if known else rows[0]["statistics"], []
    for row in rows:
        best = min((way for way in row if way not in PARTS), key=row.get, default=None)
        if best is None:
            return None
        fused += row[best]
        tiles.append(Tile.parse(best))
    return tuple(tiles) if fused < separate else None


_insisted: ContextVar[Tile | None] = ContextVar("insisted", default=None)


@contextmanager
def insist_fused(tile: Tile = DEFAULT) -> Iterator[None]:
    """Inside, each convolution is fused, with this tile, measured or not; ValueError if it can't."""
    token = _insisted.set(tile)
    try:
        yield
    finally:
        _insisted.reset(token)


def why_not(input: Tensor, conv: Conv) -> str | None:
    """Why a convolution of `input` can't be fused, in half a sentence."""
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if memory_format(input) != torch.channels_last and input.shape[2:] != (1, 1):
        return "its input is not channels_last"
    return None


def choose(
    input: Tensor, convs: Sequence[Conv], residual: bool, known: bool
) -> tuple[Tile, ...] | None:
    """A tile for each convolution of the normalised input, or None for the separate kernels.

    residual: whether one is added to the first's result. known: whether mean and rstd are.
    """
    reason = next(filter(None, (why_not(input, conv) for conv in convs)), None)
    tile = _insisted.get()
    if tile is not None and reason is not None:
        raise ValueError(f"this convolution can't be fused: {reason}")
    if tile is not None:
        return (tile,) * len(convs)
    if reason is not None or not _measured():
        return None
    cases = (Case.of(input, conv, residual and at == 0) for at, conv in enumerate(convs))
    return fastest(device_name(input.device), tuple(cases), known)
