"""Mixup on a GPU: bytes are read where they lie and each element of the output is written once.

A program makes a tile of rows x elements of a row (columns and channels) of one output. What it
needs to know of its two crops is in a table, so that images may lie anywhere and differ in size:
the address of a crop's first pixel, the bytes from one row to the next, and whether its pixels run
to the right or, mirrored from the last pixel on, to the left. The table, lam and the channels'
constants are made on the host and go to the device in one small copy that nobody waits for.

Images may lie on the device or in pinned memory of the host, which a GPU reads over the bus under
the address that it has on the host (CUDA's unified addressing). Triton would take a pinned tensor
as an argument, too: its launcher asks CUDA for the address on the device and refuses memory that
isn't pinned. A table of addresses has no such check: `bit_kernels.ops.mixup` makes it. Over the bus
each byte of a crop is read as often as it is used, that is twice where crops are mixed.
"""

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.triton._launch import ceil_div, launch, multiprocessors, power_of_2

_TILE = 2048  # elements that a program makes at a time
_PROGRAMS = 32  # for each multiprocessor, where there is as much work
_WORDS = tl.constexpr(6)  # of an output in the table: address, stride and direction of two crops


@triton.jit
def _crop(place, element, C: tl.constexpr):
    """Of a crop: the address of its first row, the bytes to the next, and elements in a row."""
    stride, direction = tl.load(place + 1), tl.load(place + 2).to(tl.int32)
    channel = element % C
    return tl.load(place), stride, (element - channel) * direction + channel


@triton.jit
def _read(first, stride, offset, row, inside):
    """Elements of rows of a crop, in float32."""
    rows = (first + row * stride).to(tl.pointer_type(tl.uint8))
    return tl.load(rows + offset, mask=inside, other=0).to(tl.float32)


@triton.jit
def _in_rows(value, BH: tl.constexpr):
    """BH times the same, one after the other."""
    rows = tl.broadcast_to(value[None, :], (BH, value.shape[0]))
    return tl.reshape(rows, (BH * value.shape[0],))


@triton.jit
def _mixup_kernel(
    places, numbers, y, height, pieces, rows, bands, blocks,
    C: tl.constexpr, BH: tl.constexpr, BL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Makes BL elements of each of `rows` rows.

    places: (M, _WORDS), no address for what isn't mixed. numbers: (255 mean, 1 / (255 std), lam).
    pieces: of ALIGNED elements, in a row.

    A tile has one dimension, row after row: Triton doesn't know how bytes lie that may be mirrored,
    and of two dimensions would have to guess along which neighbours are a thread's neighbours.
    """
    L = pieces * ALIGNED  # which tells the compiler how rows and their ends are aligned
    block = tl.program_id(0) % blocks
    band = tl.program_id(0) // blocks % bands
    i = (tl.program_id(0) // blocks // bands).to(tl.int64)
    place_in_tile = tl.arange(0, BH * BL)
    element = block * BL + place_in_tile % BL
    channel = (block * BL + tl.arange(0, BL)) % C
    center = _in_rows(tl.load(numbers + channel), BH)
    scale = _in_rows(tl.load(numbers + C + channel), BH)
    lam = tl.load(numbers + 2 * C + i)
    place = places + i * _WORDS
    first, stride, offset = _crop(place, element, C)
    first_other, stride_other, offset_other = _crop(place + 3, element, C)
    for at in range(band * rows, tl.minimum(band * rows + rows, height), BH):
        row = at + place_in_tile // BL
        inside = (element < L) & (row < height)
        value = _read(first, stride, offset, row, inside)
        if first_other != 0:
            other = _read(first_other, stride_other, offset_other, row, inside)
            value = tl.fma(other, 1.0 - lam, tl.fma(value, lam, -center))
        else:
            value = value - center
        start = (i * height + row) * L
        tl.store(y + start + element, (value * scale).to(y.dtype.element_ty), mask=inside)


def forward(
    images: Tensor | Sequence[Tensor],
    lam: np.ndarray,
    partner: np.ndarray,
    corners: np.ndarray,
    flips: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    out: Tensor,
) -> Tensor:
    """Writes the mixed crops into `out` and returns it, without waiting for the device.

    images: on out's device or pinned, in which case they must not change until the device has read
        them; a row of pixels is one run of memory.
    lam to std: as `functional.mixup`'s, none of them None, in NumPy arrays of full length.
    out: (M, C, h, w), channels_last.
    """
    if out.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "mixup can't be captured in a CUDA graph: what it draws is in a table that is made anew "
            "for each batch; capture what comes after"
        )
    count, channels, height, width = out.shape
    length = width * channels
    if length >= 1 << 30:
        raise ValueError(
            f"crop is {width} px wide, of {channels} channels; on a GPU a row may be up to "
            f"2^30 - 1 bytes"
        )
    places = _places(images, corners, flips, width, channels)
    lam = lam.astype(np.float32)
    alone = (partner == np.arange(count)) | (lam == 1)
    others = np.where(alone[:, None], 0, places[partner])
    words = np.concatenate([places[:count], others], 1)
    numbers = np.concatenate([255 * mean, 1 / (255 * std), lam]).astype(np.float32)
    words, numbers = _to_device(words, numbers, out.device)
    BL = min(power_of_2(length), _least_padded(length))
    BH = min(power_of_2(height), _TILE // BL)
    blocks, aligned = ceil_div(length, BL), math.gcd(length, 16)
    bands = ceil_div(_PROGRAMS * multiprocessors(out.device), max(1, count * blocks))
    rows = ceil_div(ceil_div(height, bands), BH) * BH
    bands = ceil_div(height, rows)
    launch(
        _mixup_kernel, (count * bands * blocks,),
        words, numbers, out, height, length // aligned, rows, bands, blocks,
        C=channels, BH=BH, BL=BL, ALIGNED=aligned,
    )  # fmt: skip
    if out.device.type == "cuda" and images[0].device.type == "cpu":
        _keep_until_read(images, out.device)
    return out


def _places(images, corners, flips, width: int, channels: int) -> np.ndarray:
    """(N, 3): address, stride in bytes and direction of each image's crop."""
    if isinstance(images, Tensor):
        first = images.data_ptr() + np.arange(len(images)) * images.stride(0)
        stride = np.full(len(images), images.stride(1))
    else:
        first = np.array([image.data_ptr() for image in images])
        stride = np.array([image.stride(0) for image in images])
    column = corners[:, 1] + np.where(flips, width - 1, 0)
    first = first + corners[:, 0] * stride + column * channels
    return np.stack([first, stride, np.where(flips, -1, 1)], 1)


def _to_device(words: np.ndarray, numbers: np.ndarray, device: torch.device):
    """Both in one copy. PyTorch doesn't give the pinned memory away before the copy is done."""
    size = words.size + ceil_div(numbers.size, 2)
    pinned = device.type == "cuda"
    host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
    host.numpy()[: words.size] = words.reshape(-1)
    host.numpy()[words.size :].view(np.float32)[: numbers.size] = numbers
    table = host.to(device, non_blocking=True)
    return table[: words.size], table[words.size :].view(torch.float32)


def _least_padded(length: int) -> int:
    """Elements of a row in a tile: whichever of two widths leaves less of its tiles empty."""
    return min((256, 128), key=lambda size: ceil_div(length, size) * size)


# Events, each with the pinned images that are being read until it. PyTorch takes note of copies
# from pinned memory and of no other use: without this it could give the memory to somebody else.
_being_read: list[tuple[torch.cuda.Event, Tensor | Sequence[Tensor]]] = []
_lock = threading.Lock()


def _keep_until_read(images: Tensor | Sequence[Tensor], device: torch.device) -> None:
    """The images, until a later call finds the work done that is in the device's queue now."""
    event = torch.cuda.current_stream(device).record_event()
    with _lock:
        _being_read[:] = [(done, read) for done, read in _being_read if not done.query()]
        _being_read.append((event, images))
