"""The suite `data`: mixup against what others make of the same bytes. Nothing here takes time.

64 uint8 images of 256 px to a normalised, cropped, flipped and mixed batch of 224 px. Every rival is
given the same crops, flips, partners and lam, and its own pool of output memory where it has a use
for one.

- bit_kernels: the op into one of a few reused buffers, as `bit_kernels.data.Mixup` does it.
- eager: vectorised PyTorch, one gather of the crops for the whole batch.
- eager_stack: PyTorch with a slice an image and one `stack`, which copies rows and not bytes.
- torchvision_v2: an image at a time through `transforms.v2.functional`, stacked, then mixed as
  `v2.MixUp` does (partner: roll).
- timm: crops as in eager_stack, then what timm's loader and its `Mixup` do (partner: flip).

On a GPU, 256 images, on the device or in the host's pinned memory, to a batch on the device:

- triton, cuda: the op on these backends. It is given crops, flips and partners as NumPy arrays, as a
  loader has them; the rivals are given theirs on the device.
- triton_copied: of pinned images, a copy to the device and then the op.
- eager: the same gather; of pinned images after a copy to the device.
"""

import functools
import importlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops import DTYPES, ROTATED_BYTES
from benchmarks.runner import Absent, Case
from bit_kernels import reference
from bit_kernels.functional import mixup

COUNT, SIDE, CROP, CHANNELS = 64, 256, 224, 3
LAM = 0.7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SLOTS = 4
PARTNERS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "permutation": lambda count, rng: rng.permutation(count),
    "roll": lambda count, rng: np.roll(np.arange(count), 1),
    "flip": lambda count, rng: np.arange(count)[::-1].copy(),
}
BASELINES = ("eager", "eager_stack")
GPU_COUNT, GPU_BATCHES = 256, 6  # 50 MB of bytes each
GPU_PLACES = {
    "device": ("triton", "cuda", "eager"),
    "pinned": ("triton", "triton_copied", "cuda", "eager"),
}


def cases(
    *, threads: list[int], dtypes: list[str], quick: bool = False, compiled: bool = False
) -> list[Case]:
    """All cases, one a partner; `quick` leaves one. There is no compiled rival."""
    return [
        Case(
            suite="data",
            name=f"mixup/{COUNT}x{SIDE}x{SIDE}x{CHANNELS}/crop{CROP}/{partner}",
            dtype=dtype,
            threads=number,
            providers=_providers(partner),
            baselines=BASELINES,
            prepare=functools.partial(MixupWorkload, partner, DTYPES[dtype]),
            necessary_bytes=necessary_bytes(DTYPES[dtype]),
        )
        for partner in (("permutation",) if quick else PARTNERS)
        for dtype in dtypes
        for number in threads
    ]


def gpu_cases(*, dtypes: list[str], quick: bool) -> list[Case]:
    """One a place of the images. Calls aren't captured: they take what the host has drawn."""
    return [
        Case(
            suite="data",
            name=f"mixup/{GPU_COUNT}x{SIDE}x{SIDE}x{CHANNELS}/crop{CROP}/{place}",
            dtype=dtype,
            threads=1,
            providers=rivals,
            baselines=("eager",),
            prepare=functools.partial(GpuMixupWorkload, place, DTYPES[dtype]),
            # What comes over the bus is no matter of the device's memory.
            necessary_bytes=necessary_bytes(DTYPES[dtype], GPU_COUNT)
            if place == "device"
            else None,
            images=GPU_COUNT,
            device="cuda",
        )
        for dtype in (dtypes[:1] if quick else dtypes)
        for place, rivals in GPU_PLACES.items()
    ]


def necessary_bytes(dtype: torch.dtype, count: int | None = None) -> int:
    """Every cropped byte is read as an image's own and as a partner's, every element written."""
    return (count or COUNT) * CROP * CROP * CHANNELS * (1 + 1 + dtype.itemsize)


def _providers(partner: str) -> tuple[str, ...]:
    """The rivals that are installed and can mix with this partner."""
    extra = {"roll": ("torchvision_v2", "torchvision"), "flip": ("timm", "timm.data.mixup")}
    names = ("bit_kernels", *BASELINES)
    if partner in extra:
        provider, module = extra[partner]
        try:
            importlib.import_module(module)
            names += (provider,)
        except (ImportError, RuntimeError):  # torchvision raises one for a torch not its own
            pass
    return names


class MixupWorkload:
    """Many batches of bytes, and where each is cropped; see benchmarks.runner.Workload."""

    def __init__(self, partner: str, dtype: torch.dtype):
        rng, count = np.random.default_rng(0), COUNT
        copies = max(2, -(-ROTATED_BYTES // (count * SIDE * SIDE * CHANNELS)))
        self._batches = [
            rng.integers(0, 256, (count, SIDE, SIDE, CHANNELS), dtype=np.uint8)
            for _ in range(copies)
        ]
        self._partner = PARTNERS[partner](count, rng)
        self._corners = rng.integers(0, SIDE - CROP + 1, (count, 2))
        self._flips = rng.random(count) < 0.5
        self._dtype = dtype
        shape = (count, CHANNELS, CROP, CROP)
        self._pool = [
            torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(SLOTS)
        ]

    def reference(self) -> dict[str, Tensor]:
        arguments = self._corners, self._flips, np.array(MEAN), np.array(STD), torch.float64
        lam = np.full(len(self._partner), LAM)
        return {
            "batch": reference.mixup(self._batches[0], lam, self._partner, (CROP, CROP), *arguments)
        }

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return {"batch": self.calls(provider)[0]()}

    def calls(self, provider: str) -> list[Callable[[], Tensor]]:
        rival = getattr(self, f"_{provider}")
        return [functools.partial(rival, index) for index in range(len(self._batches))]

    def _bit_kernels(self, index: int) -> Tensor:
        return mixup(
            self._batches[index],
            LAM,
            self._partner,
            crop=(CROP, CROP),
            corners=self._corners,
            flips=self._flips,
            mean=MEAN,
            std=STD,
            dtype=self._dtype,
            out=self._pool[index % SLOTS],
        )

    def _eager(self, index: int) -> Tensor:
        images, flips = torch.from_numpy(self._batches[index]), torch.from_numpy(self._flips)
        top, left = torch.from_numpy(self._corners)[:, :, None].unbind(1)
        along = torch.arange(CROP)
        columns = left + torch.where(flips[:, None], CROP - 1 - along, along)
        rows = (top + along)[:, :, None]
        each = torch.arange(len(images))[:, None, None]
        return self._mix(images[each, rows, columns[:, None, :]].permute(0, 3, 1, 2))

    def _eager_stack(self, index: int) -> Tensor:
        return self._mix(self._crops(index).permute(0, 3, 1, 2))

    def _crops(self, index: int) -> Tensor:
        crops = []
        for image, (top, left), flip in zip(
            torch.from_numpy(self._batches[index]), self._corners.tolist(), self._flips, strict=True
        ):
            cut = image[top : top + CROP, left : left + CROP]
            crops.append(cut.flip(1) if flip else cut)
        return torch.stack(crops)

    def _mix(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (MEAN, STD))
        x = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
        others = x[torch.from_numpy(self._partner)].mul_(1 - LAM)
        return x.mul_(LAM).add_(others).to(self._dtype)

    def _torchvision_v2(self, index: int) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        images = []
        for image, (top, left), flip in zip(
            torch.from_numpy(self._batches[index]).permute(0, 3, 1, 2),
            self._corners.tolist(),
            self._flips,
            strict=True,
        ):
            image = tv.crop(image, top, left, CROP, CROP)
            if flip:
                image = tv.horizontal_flip(image)
            image = tv.to_dtype(image, torch.float32, scale=True)
            images.append(tv.normalize(image, MEAN, STD))
        x = torch.stack(images)
        return x.roll(1, 0).mul_(1 - LAM).add_(x.mul(LAM)).to(self._dtype)

    def _timm(self, index: int) -> Tensor:
        mean, std = (
            torch.tensor([255 * v for v in values]).view(1, 3, 1, 1) for values in (MEAN, STD)
        )
        x = self._crops(index).permute(0, 3, 1, 2).float().sub_(mean).div_(std)
        self._timm_mixup._mix_batch(x)
        return x.to(self._dtype)

    @functools.cached_property
    def _timm_mixup(self):
        from timm.data.mixup import Mixup

        mix = Mixup(mixup_alpha=1.0)
        mix._params_per_batch = lambda: (LAM, False)  # the draw, and that it isn't CutMix
        return mix


class GpuMixupWorkload:
    """Batches of bytes on the device or pinned beside it; see benchmarks.runner.Workload."""

    def __init__(self, place: str, dtype: torch.dtype, device: str = "cuda"):
        rng, count = np.random.default_rng(0), GPU_COUNT
        shape = (count, SIDE, SIDE, CHANNELS)
        batches = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(GPU_BATCHES)]
        self._first = batches[0]
        self._batches = [_put(torch.from_numpy(batch), place, device) for batch in batches]
        self._partner = rng.permutation(count)
        self._corners = rng.integers(0, SIDE - CROP + 1, (count, 2))
        self._flips = rng.random(count) < 0.5
        self._dtype, self._device = dtype, torch.device(device)
        empty = torch.empty((count, CHANNELS, CROP, CROP), dtype=dtype, device=device)
        self._pool = [empty.clone(memory_format=torch.channels_last) for _ in range(len(batches))]
        self._drawn = [
            torch.from_numpy(array).to(device)
            for array in (self._partner, self._corners, self._flips)
        ]
        self._mean, self._std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in (MEAN, STD)
        )

    def reference(self) -> dict[str, Tensor]:
        arguments = self._corners, self._flips, np.array(MEAN), np.array(STD), torch.float64
        lam = np.full(len(self._partner), LAM)
        batch = reference.mixup(self._first, lam, self._partner, (CROP, CROP), *arguments)
        return {"batch": batch.to(self._device)}

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return {"batch": self.calls(provider)[0]()}

    def calls(self, provider: str) -> list[Callable[[], Tensor]]:
        if provider == "eager":
            call = self._eager
        else:
            backend, _, copied = provider.partition("_")
            call = functools.partial(self._ours, backend, bool(copied))
        return [functools.partial(call, index) for index in range(len(self._batches))]

    def _ours(self, backend: str, copied: bool, index: int) -> Tensor:
        images = self._batches[index]
        try:
            return mixup(
                images.to(self._device, non_blocking=True) if copied else images,
                LAM,
                self._partner,
                crop=(CROP, CROP),
                corners=self._corners,
                flips=self._flips,
                mean=MEAN,
                std=STD,
                dtype=self._dtype,
                out=self._pool[index],
                backend=backend,
            )
        except ValueError as error:
            raise Absent(str(error)) from None

    def _eager(self, index: int) -> Tensor:
        images = self._batches[index].to(self._device, non_blocking=True)
        partner, corners, flips = self._drawn
        top, left = corners[:, :, None].unbind(1)
        along = torch.arange(CROP, device=self._device)
        columns = left + torch.where(flips[:, None], CROP - 1 - along, along)
        rows = (top + along)[:, :, None]
        each = torch.arange(len(images), device=self._device)[:, None, None]
        pixels = images[each, rows, columns[:, None, :]].permute(0, 3, 1, 2)
        x = pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        others = x[partner].mul_(1 - LAM)
        return x.mul_(LAM).add_(others).to(self._dtype)


def _put(images: Tensor, place: str, device: str) -> Tensor:
    if place == "device":
        return images.to(device)
    return images.pin_memory() if device == "cuda" else images
