"""Mixup of a uint8 batch, cropped, flipped and normalised on the way (Zhang et al., arXiv 1710.09412):

    y[i] = lam[i] * norm(x[i]) + (1 - lam[i]) * norm(x[partner[i]]),  norm(v) = (v / 255 - mean) / std

where x[j] is image j cut to its own crop and, if it is flipped, mirrored left to right. N images, C
channels, M <= N outputs, crops of h x w pixels.

Memory passes: M * h * w * C elements are read twice (once without a partner) and written once, that
is 1 + 1 + 4 bytes an element in float32 and 1 + 1 + 2 in a half type. There is no gradient: images
are bytes.

It isn't in torch.ops: it takes NumPy arrays as they lie, by pybind11, and works without the GIL on
torch's threads; in a forked process, which has none of the threads it was forked with, on one. A
GPU takes images in its own memory or in pinned memory of the host as they lie.

Implementations: csrc/cpu/mixup.cpp, bit_kernels/triton/mixup.py, bit_kernels/reference.py.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bit_kernels import _library, reference
from bit_kernels.backends import choose_mixup
from bit_kernels.ops._library import gpu_kernels

Images = np.ndarray | Tensor | Sequence[np.ndarray | Tensor]


def mixup(
    images: Images,
    lam: ArrayLike = 1.0,
    partner: ArrayLike | None = None,
    *,
    crop: tuple[int, int] | None = None,
    corners: ArrayLike | None = None,
    flips: ArrayLike | None = None,
    mean: ArrayLike = 0.5,
    std: ArrayLike = 0.5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Crop, flip, normalise and mix images in one pass over memory.

    >>> images = np.zeros((4, 9, 9, 3), np.uint8)
    >>> mixup(images, 0.7, [3, 2, 1, 0], crop=(8, 8), flips=[True, False, True, False]).shape
    torch.Size([4, 3, 8, 8])

    Args:
        images: uint8 (N, H, W, C), or a sequence of N of (H, W, C), whose sizes may then differ;
            NumPy or torch, all on one device. Used as they lie where a row of pixels is one run of
            memory, copied first where not. For a result on a GPU they are on that GPU; or in pinned
            memory, which the GPU reads itself, later, so they must stay as they are until it has;
            or elsewhere in the host's memory, from where their crops are copied first. The other
            arguments are on the host.
        lam: the weight of image i itself, 0 to 1: one number or (M,).
        partner: (M,) integers 0 to N - 1, the image that image i is mixed with; images from M on
            are partners only. None mixes nothing, and all N are put out.
        crop: (h, w) in pixels; None = all of the first image.
        corners: (N, 2) integers, (top, left) of each image's crop in pixels; None = the middle.
        flips: (N,) booleans, which crops are mirrored left to right; None = none.
        mean, std: of pixels from 0 to 1, one number or (C,); the default maps bytes to -1 to 1.
        dtype: of the result, floating.
        device: of the result, the CPU or a CUDA device; None = that of `out`, or of the images.
        out: (M, C, h, w), channels_last, of `dtype`: written and returned. None = a new tensor.
        backend: None chooses; "cpp", "triton" or "reference" insists.

    Returns:
        (M, C, h, w) in channels_last memory. On a GPU the work is put into the current stream's
        queue, and nothing waits for it.

    Deterministic: the same images give the same bits, whatever the number of threads, which is
    torch's (torch.get_num_threads).

    Raises:
        ValueError: an argument's shape, dtype, device or value is none of these.
    """
    device = _device(images, device, out)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    chosen = choose_mixup(device, dtype, backend)
    if chosen != "cpp":
        images = _as_they_lie(images, device)
    else:
        images = [_array(image) for image in images] if _is_sequence(images) else _array(images)
    shapes = _check_images(images)
    channels = shapes[0][2]
    crop = tuple(shapes[0][:2]) if crop is None else tuple(crop)
    if len(crop) != 2 or min(crop) < 1:
        raise ValueError(f"crop is {crop}; it must be (h, w), both at least 1 px")
    partner = np.arange(len(shapes)) if partner is None else np.asarray(partner)
    _check_partner(partner, len(shapes))
    lam = _spread("lam", lam, len(partner))
    if not ((lam >= 0) & (lam <= 1)).all():
        raise ValueError(f"lam is {lam}; it must lie in 0..1")
    mean, std = _spread("mean", mean, channels), _spread("std", std, channels)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"mean is {mean} and std {std}; they must be finite, and std more than 0")
    corners, flips = _places(shapes, crop, corners, flips)
    out = _output(out, (len(partner), channels, *crop), dtype, device)
    if chosen == "reference":
        return out.copy_(
            reference.mixup(images, lam, partner, crop, corners, flips, mean, std, dtype)
        )
    if chosen == "triton":
        if any(isinstance(image, np.ndarray) for image in _each(images)):
            images, corners = _crops(images, corners, crop, device), np.zeros_like(corners)
        return gpu_kernels("mixup").forward(images, lam, partner, corners, flips, mean, std, out)
    _library.data.mixup(
        images,
        corners,
        flips,
        partner.astype(np.int64),
        lam.astype(np.float32),
        (255 * mean).astype(np.float32),
        (1 / (255 * std)).astype(np.float32),
        *crop,
        str(dtype).removeprefix("torch."),
        out.permute(0, 2, 3, 1).reshape(-1).view(torch.uint8).numpy(),  # NumPy has no bfloat16
        _parallel_for,
    )
    return out


def _use_one_thread() -> None:
    global _parallel_for
    _parallel_for = None


_parallel_for = None if _library.native is None else _library.native.parallel_for()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


def _is_sequence(images: Images) -> bool:
    return isinstance(images, Sequence)


def _each(images: Images) -> Sequence[np.ndarray | Tensor]:
    """What of the images has memory of its own."""
    return images if _is_sequence(images) else [images]


def _device(images: Images, device: torch.device | str | None, out: Tensor | None) -> torch.device:
    """Of the result."""
    if device is not None:
        name, device = "device is", torch.device(device)
    elif out is not None:
        name, device = "out is on", out.device
    else:
        name, first = "images are on", next(iter(images), None) if _is_sequence(images) else images
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} {device}; it may be the CPU or a CUDA device")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{name} {device}, and PyTorch finds no GPU here")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def _array(image: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(image, Tensor):
        if image.device.type != "cpu":
            raise ValueError(
                f"images are on {image.device}; for a result on the CPU they must be there"
            )
        image = image.numpy()
    elif not isinstance(image, np.ndarray):
        raise ValueError(f"images hold {type(image).__name__}; they may be NumPy arrays or tensors")
    if image.size and image.ndim >= 3 and image.dtype == np.uint8:
        channels = image.shape[-1]
        if image.strides[-1] != 1 or image.strides[-2] != channels:
            return np.ascontiguousarray(image)
    return image


def _as_they_lie(images: Images, device: torch.device) -> Images:
    """Tensors where `device` can read them, else arrays."""
    if not _is_sequence(images):
        return _as_it_lies(images, device)
    images = [_as_it_lies(image, device) for image in images]
    on = {str(image.device) if isinstance(image, Tensor) else "cpu" for image in images}
    if len(on) > 1:
        raise ValueError(f"images are on {' and '.join(sorted(on))}; all must be on one device")
    return images


def _as_it_lies(image: np.ndarray | Tensor, device: torch.device) -> np.ndarray | Tensor:
    if not isinstance(image, Tensor):
        return _array(image)
    rows_are_runs = image.ndim < 3 or image.stride()[-2:] == (image.shape[-1], 1)
    if image.device == device:
        return image if rows_are_runs else image.contiguous()
    if image.device.type != "cpu":
        there = "on the CPU" if device.type == "cpu" else f"on {device}, or on the CPU"
        raise ValueError(
            f"images are on {image.device}; for a result on {device} they must be {there}"
        )
    return image if rows_are_runs and image.is_pinned() else _array(image)


def _crops(
    images: Images, corners: np.ndarray, crop: tuple[int, int], device: torch.device
) -> Tensor:
    """(N, h, w, C) on `device` of images that it can't read, by way of pinned memory."""
    shape = len(images), *crop, images[0].shape[-1]
    pinned = device.type == "cuda"
    crops = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for place, image, (top, left) in zip(crops.numpy(), images, corners, strict=True):
        place[:] = image[top : top + crop[0], left : left + crop[1]]
    return crops.to(device, non_blocking=True)


def _check_images(images: Images) -> list[tuple[int, int, int]]:
    """(H, W, C) of each image."""
    whole = not _is_sequence(images)
    wanted = "(N, H, W, C)" if whole else "(H, W, C) each"
    for image in _each(images):
        if image.dtype not in (np.uint8, torch.uint8) or image.ndim != (4 if whole else 3):
            raise ValueError(
                f"images are {image.dtype} {tuple(image.shape)}; they must be uint8 {wanted}"
            )
    if len(images) == 0:
        raise ValueError("images are none; there must be at least 1")
    shapes = [images.shape[1:]] * len(images) if whole else [image.shape for image in images]
    for shape in shapes:
        if shape[2] != shapes[0][2] or shape[2] < 1:
            raise ValueError(
                f"images have {shapes[0][2]} and {shape[2]} channels; all must have as many, "
                "at least 1"
            )
    return shapes


def _check_partner(partner: np.ndarray, count: int) -> None:
    if partner.ndim != 1 or len(partner) > count or partner.dtype.kind not in "iu":
        raise ValueError(
            f"partner is {partner.dtype} {partner.shape}; with {count} images it must be "
            f"integers (M,), M at most {count}"
        )
    if len(partner) and not 0 <= partner.min() <= partner.max() < count:
        raise ValueError(
            f"partner runs from {partner.min()} to {partner.max()}; with {count} images it must "
            f"lie in 0..{count - 1}"
        )


def _spread(name: str, values: ArrayLike, count: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape not in ((), (count,)):
        raise ValueError(f"{name} has shape {array.shape}; it must be a number or ({count},)")
    return np.full(count, array)


def _places(
    shapes: list[tuple[int, int, int]],
    crop: tuple[int, int],
    corners: ArrayLike | None,
    flips: ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray]:
    room = np.array([shape[:2] for shape in shapes], dtype=np.int64) - crop
    if (room < 0).any():
        small = shapes[int((room < 0).any(1).argmax())]
        raise ValueError(f"crop is {crop}; an image is {small[:2]} px, and it must fit into each")
    corners = room // 2 if corners is None else np.asarray(corners)
    if corners.shape != room.shape or corners.dtype.kind not in "iu":
        raise ValueError(
            f"corners is {corners.dtype} {corners.shape}; it must be integers {room.shape}"
        )
    if not ((corners >= 0) & (corners <= room)).all():
        i = int((~((corners >= 0) & (corners <= room)).all(1)).argmax())
        raise ValueError(
            f"corners has {tuple(corners[i].tolist())} for image {i} of {shapes[i][:2]} px; with "
            f"a crop of {crop} it must lie in (0, 0)..{tuple(room[i].tolist())}"
        )
    flips = np.zeros(len(shapes), np.bool_) if flips is None else np.asarray(flips)
    if flips.shape != (len(shapes),) or flips.dtype != np.bool_:
        raise ValueError(
            f"flips is {flips.dtype} {flips.shape}; it must be booleans ({len(shapes)},)"
        )
    return np.ascontiguousarray(corners, dtype=np.int64), np.ascontiguousarray(flips)


def _output(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be {dtype} {shape} "
            f"on {device}"
        )
    if not out.permute(0, 2, 3, 1).is_contiguous() or out.requires_grad:
        raise ValueError("out must be contiguous in channels_last memory, and need no gradient")
    return out
