"""Weight standardization on a GPU: each output channel's kernel is one row of memory.

    y = (w - mean) * rstd,   dw = rstd * (dy - mean(dy) - y * mean(dy * y))

A row is held in registers: 2 memory passes forward (read w, write y), 3 backward (read dy and w,
write dw). Rows of more than `_tables.HELD` elements are read again, from the cache, for each of
their sums. Statistics are float32, of exact deviations from the mean.

Many tensors are worked on in one launch for each length of rows (`_tables.py`); a tensor alone needs
no table and gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.triton import _rows, _tables
from bit_kernels.triton._launch import ceil_div, launch
from bit_kernels.triton._tables import TYPES, Tile, alignment, lay_out, rows_of

# ---- one tile of rows


@triton.jit
def _standardize(
    weight, output, mean, rstd, rows, columns, eps,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All pointers are the first row's, of which there are `rows`."""
    if WHOLE:
        offsets, inside = _rows.tile_of(rows, columns, BR, BK)
        value = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
        center, spread, deviation = _rows.statistics(value, inside, columns, eps)
        result = deviation * spread[:, None]
        tl.store(output + offsets, result.to(output.dtype.element_ty), mask=inside)
    else:
        center = _rows.long_mean(weight, columns, BK)
        spread = _rows.long_rstd(weight, center, columns, eps, BK)
        _rows.long_standardize(weight, output, center, spread, columns, BK)
    row = tl.arange(0, BR)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, spread, mask=row < rows)


@triton.jit
def _standardize_backward(
    grad_output, weight, mean, rstd, grad_weight, rows, columns,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BR)
    center = tl.load(mean + row, mask=row < rows, other=0.0)
    spread = tl.load(rstd + row, mask=row < rows, other=0.0)
    if WHOLE:
        offsets, inside = _rows.tile_of(rows, columns, BR, BK)
        grad = tl.load(grad_output + offsets, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
        deviation = value - center[:, None]
        result = _rows.project(grad, deviation, spread, columns)
        tl.store(grad_weight + offsets, result.to(grad_weight.dtype.element_ty), mask=inside)
    else:
        _rows.long_project(grad_output, weight, grad_weight, center, spread, columns, BK)


# ---- kernels for one tensor, and for many


@triton.jit
def _forward_kernel(
    weight, output, mean, rstd, rows, columns, eps,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    columns = _tables.aligned(tl.cast(columns, tl.int32), ALIGN)
    row = tl.program_id(0).to(tl.int64) * BR
    start = row * columns
    _standardize(
        weight + start, output + start, mean + row, rstd + row, rows - row,
        columns, eps, BR, BK, WHOLE,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    grad_output, weight, mean, rstd, grad_weight, rows, columns,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    columns = _tables.aligned(tl.cast(columns, tl.int32), ALIGN)
    row = tl.program_id(0).to(tl.int64) * BR
    start = row * columns
    _standardize_backward(
        grad_output + start, weight + start, mean + row, rstd + row, grad_weight + start,
        rows - row, columns, BR, BK, WHOLE,
    )  # fmt: skip


@triton.jit
def _forward_many_kernel(
    pointers, shapes, mean, rstd, eps,
    WEIGHT: tl.constexpr, OUTPUT: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    number, row, rows, columns, place = _tables.find(shapes, BR, WIDTH, ALIGN)
    weight = _tables.pointer(pointers, number, 0, 2, WEIGHT, ALIGN)
    output = _tables.pointer(pointers, number, 1, 2, OUTPUT, ALIGN)
    start = row * columns
    _standardize(
        weight + start, output + start, mean + place, rstd + place, rows, columns, eps,
        BR, BK, WHOLE,
    )  # fmt: skip


@triton.jit
def _backward_many_kernel(
    pointers, shapes, mean, rstd,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    number, row, rows, columns, place = _tables.find(shapes, BR, WIDTH, ALIGN)
    grad_output = _tables.pointer(pointers, number, 0, 3, GRAD, ALIGN)
    weight = _tables.pointer(pointers, number, 1, 3, WEIGHT, ALIGN)
    grad_weight = _tables.pointer(pointers, number, 2, 3, WEIGHT, ALIGN)
    start = row * columns
    _standardize_backward(
        grad_output + start, weight + start, mean + place, rstd + place, grad_weight + start,
        rows, columns, BR, BK, WHOLE,
    )  # fmt: skip


# ---- launches


def forward(
    weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """output, and mean and rstd (C_out,) in float32."""
    weight = lay_out(weight, weight)
    output = torch.empty_like(weight, dtype=dtype)
    rows, columns = rows_of(weight)
    mean, rstd = _empty_statistics([weight])
    tile, align = Tile.of(columns), alignment(columns, [weight, output])
    launch(
        _forward_kernel, (ceil_div(rows, tile.BR) if columns else 0,),
        weight, output, mean, rstd, rows, columns, eps,
        **tile._asdict(), ALIGN=align, **tile.options(align),
    )  # fmt: skip
    return output, mean, rstd


def backward(grad_output: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the weight, in its dtype and layout."""
    grad_output, weight = lay_out(grad_output, weight), lay_out(weight, weight)
    grad_weight = torch.empty_like(weight)
    rows, columns = rows_of(weight)
    tile, align = Tile.of(columns), alignment(columns, [grad_output, weight])
    launch(
        _backward_kernel, (ceil_div(rows, tile.BR) if columns else 0,),
        grad_output, weight, mean, rstd, grad_weight, rows, columns,
        **tile._asdict(), ALIGN=align, **tile.options(align),
    )  # fmt: skip
    return grad_weight


def forward_many(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As `forward` for weights of one dtype on one device; mean and rstd are of all rows in order."""
    weights = [lay_out(weight, weight) for weight in weights]
    outputs = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    mean, rstd = _empty_statistics(weights)
    table = _tables.table([weights, outputs])
    for group in table.groups:
        launch(
            _forward_many_kernel, (group.programs,),
            table.pointers, group.shapes, mean, rstd, eps,
            WEIGHT=TYPES[weights[0].dtype], OUTPUT=TYPES[outputs[0].dtype],
            **group.constexprs, **group.options,
        )  # fmt: skip
    return outputs, mean, rstd


def backward_many(
    grad_outputs: Sequence[Tensor], weights: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> list[Tensor]:
    """As `backward`, with the statistics that `forward_many` returned for the same weights."""
    grad_outputs = [lay_out(g, weight) for g, weight in zip(grad_outputs, weights, strict=True)]
    weights = [lay_out(weight, weight) for weight in weights]
    grad_weights = [torch.empty_like(weight) for weight in weights]
    table = _tables.table([grad_outputs, weights, grad_weights])
    for group in table.groups:
        launch(
            _backward_many_kernel, (group.programs,),
            table.pointers, group.shapes, mean, rstd,
            GRAD=TYPES[grad_outputs[0].dtype], WEIGHT=TYPES[weights[0].dtype],
            **group.constexprs, **group.options,
        )  # fmt: skip
    return grad_weights


def _empty_statistics(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    # Of rows without elements nobody writes them.
    make = torch.empty if all(weight.numel() for weight in weights) else torch.zeros
    rows = sum(weight.shape[0] for weight in weights)
    mean, rstd = (make(rows, dtype=torch.float32, device=weights[0].device) for _ in range(2))
    return mean, rstd
