"""Mixup for a data loader: uint8 images to training batches, and the loss of mixed labels.

mix = Mixup(alpha=0.1, crop=224, seed=0)
loader = DataLoader(Indexed(dataset), 64, shuffle=True, num_workers=4, collate_fn=mix)
for epoch in range(90):
    mix.set_epoch(epoch)
    for images, targets in loader:
        loss = mixup_cross_entropy(model(images), targets)
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

from bit_kernels.functional import mixup

Targets = tuple[Tensor, Tensor, Tensor | float]

# What random numbers are drawn for; each purpose has a stream of its own.
_TOP, _LEFT, _FLIP, _MIX = range(4)


class Indexed(Dataset):
    """A map-style data set whose samples carry their index: dataset[i] becomes (*dataset[i], i)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        return *self.dataset[index], index


class Mixup:
    """Collates uint8 images and labels into a batch: crop, flip, normalise, mixup, in one pass.

    Mixup (Zhang et al., arXiv 1710.09412): x = lam * x_a + (1 - lam) * x_b, lam from
    Beta(alpha, alpha). The defaults are Big Transfer's (arXiv 1912.11370): alpha 0.1, one lam a
    batch, partners by permutation, pixels in [-1, 1].

    Called with a list of samples (image, label) or (image, label, index), as a DataLoader's
    `collate_fn` is, or with one tuple (images, labels) or (images, labels, indices) for a whole
    batch. An image is uint8 (H, W, C), NumPy or torch, whole batches are (N, H, W, C); labels are
    integers.

    Returns (images, (a, b, lam)):
        images: (N, C, h, w) of `dtype`, channels_last
        a, b: int64 (N,), the labels of the images and of their partners
        lam: float32 (N,), the weight of a; 1 - lam is that of b

    **Memory is reused**: images lie in one of `slots` buffers, taken in turn, and are valid until
    the same buffer's turn comes. A DataLoader with workers needs prefetch_factor + 2 of them, which
    the default allows for; a list of all batches needs `slots=0`, a new tensor each. In a worker
    process the buffers are shared memory, so that a batch gets to the training process without a
    copy. Without workers, where CUDA is used, each batch is new pinned memory, which PyTorch reuses
    when the copies from it are done. On a GPU each batch is a new tensor, too.

    **On a GPU**: with `device="cuda"`, or for images that lie there, a batch is made on the GPU, in
    the process that trains, and nothing waits for it. So a data set that fits into the GPU's memory
    (or, with `device="cuda"`, into pinned memory) stays there, and a loader without workers picks:

    data = TensorDataset(images.cuda(), labels)
    loader = DataLoader(Indexed(data), 64, shuffle=True, collate_fn=mix)

    Worker processes must leave the GPU alone; there it is refused.

    **Reproducible**: crop and flip of a sample depend on (seed, epoch, index) alone; lam and
    partners on these of the batch's first sample. So nothing depends on the number of workers. The
    index is what `Indexed` adds to a sample. Without it batches are numbered as a DataLoader with
    `in_order` hands them out, and the number stands for the index: then call `set_epoch` only
    between two passes over the data, and take the whole pass.

    Args:
        alpha: of Beta(alpha, alpha); 0 mixes nothing.
        mode: what shares a lam: the "batch"; a "pair" of images that are each other's partner; or
            each "sample" has its own.
        partner: who is mixed with whom: a random "permutation" (in mode "pair" a random pairing, in
            which an odd one is left alone); "flip", image i with N - 1 - i; "roll", i with i - 1.
        crop: side or (h, w) in pixels; None = all of the first image.
        flip: probability that an image is mirrored left to right.
        mean, std: of pixels from 0 to 1, one number or one a channel.
        dtype: float32, bfloat16 or float16.
        seed: of all of it, at least 0.
        slots: buffers, see above.
        device: of the batches, the CPU or a CUDA device, their targets included; None = where the
            images are.

    Raises:
        ValueError: an argument is none of these, or images and labels don't fit together.
        RuntimeError: a batch on a GPU is asked for in a worker process.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        mode: str = "batch",
        partner: str = "permutation",
        crop: int | tuple[int, int] | None = None,
        flip: float = 0.5,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        slots: int = 4,
        device: torch.device | str | None = None,
    ):
        for name, value, allowed in (
            ("mode", mode, ("batch", "pair", "sample")),
            ("partner", partner, ("permutation", "flip", "roll")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it may be one of {allowed}")
        if mode == "pair" and partner == "roll":
            raise ValueError("partner is 'roll'; in mode 'pair' it may be 'permutation' or 'flip'")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; it must be at least 0 and finite")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip}; it must lie in 0..1")
        if seed < 0 or slots < 0:
            raise ValueError(f"seed is {seed} and slots {slots}; both must be at least 0")
        self.alpha, self.mode, self.partner, self.flip = alpha, mode, partner, flip
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        self.mean, self.std, self.dtype, self.seed, self.slots = mean, std, dtype, seed, slots
        self.device = None if device is None else torch.device(device)
        # Epoch and whether it trains, where worker processes that live on see them change.
        self._state = torch.tensor([0, 1], device="cpu").share_memory_()
        self._forget()

    def set_epoch(self, epoch: int) -> None:
        """Draws anew: call it before each pass over the data, as for a DistributedSampler."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it must be at least 0")
        self._state[0] = epoch
        self._batches = 0

    def train(self, mode: bool = True) -> "Mixup":
        """Random crops, flips and mixup; without `mode` as `eval`."""
        self._state[1] = int(mode)
        return self

    def eval(self) -> "Mixup":
        """The middle of each image, not flipped and not mixed: b is a, and lam is 1."""
        return self.train(False)

    def __call__(self, batch: Sequence[Any]) -> tuple[Tensor, Targets]:
        images, labels, indices = self._unpack(batch)
        device = self._device(images)
        epoch, training = self._state.tolist()
        if indices is None:
            indices = self._number(epoch) + np.arange(len(images), dtype=np.uint64)
        whole = hasattr(images, "shape")
        shapes = [images.shape[1:]] * len(images) if whole else [image.shape for image in images]
        crop = shapes[0][:2] if self.crop is None else self.crop
        lam, partner, corners, flips = np.ones(len(images), np.float32), None, None, None
        if training:
            key = self.seed, epoch
            rooms = np.array([shape[:2] for shape in shapes]) - crop
            places = np.stack([_uniform(*key, _TOP, indices), _uniform(*key, _LEFT, indices)], 1)
            corners = (places * (np.maximum(rooms, 0) + 1)).astype(np.int64)
            flips = _uniform(*key, _FLIP, indices) < self.flip
            if self.alpha > 0:
                rng = np.random.Generator(
                    np.random.Philox(np.random.SeedSequence((*key, _MIX, int(indices[0]))))
                )
                partner = self._partners(len(images), rng)
                lam = self._lambdas(partner, rng)
        shape = (len(images), shapes[0][-1], *crop)
        mixed = mixup(
            images,
            lam,
            partner,
            crop=crop,
            corners=corners,
            flips=flips,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
            device=device,
            out=self._buffer(shape) if device.type == "cpu" else None,
        )
        other, weight = labels, torch.from_numpy(lam)
        if partner is not None:
            other = labels[_send(torch.from_numpy(partner), labels.device)]
        return mixed, tuple(_send(x, mixed.device) for x in (labels, other, weight))

    def _device(self, images: Sequence) -> torch.device:
        if self.device is not None:
            device = self.device
        else:
            device = images[0].device if isinstance(images[0], Tensor) else torch.device("cpu")
        if device.type != "cpu" and get_worker_info() is not None:
            raise RuntimeError(
                f"Mixup would make a batch on {device} in a worker process, which must leave the "
                "GPU to the process that trains: use num_workers=0, or collate on the CPU"
            )
        return device

    def _unpack(self, batch: Sequence[Any]) -> tuple[Sequence, Tensor, np.ndarray | None]:
        if len(batch) == 0:
            raise ValueError("batch is empty; it must have at least 1 sample")
        whole = isinstance(batch, tuple) and getattr(batch[0], "ndim", 0) == 4
        columns = tuple(batch) if whole else tuple(zip(*batch, strict=True))
        if len(columns) not in (2, 3):
            raise ValueError(
                f"samples have {len(columns)} parts; they must be (image, label) or "
                "(image, label, index)"
            )
        images, labels = columns[0], torch.as_tensor(columns[1])
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} {tuple(labels.shape)}; with {len(images)} images they "
                f"must be integers ({len(images)},)"
            )
        indices = None
        if len(columns) == 3:
            if isinstance(columns[2], Tensor) and columns[2].device.type != "cpu":
                raise ValueError(f"indices are on {columns[2].device}; they must be on the CPU")
            indices = np.asarray(columns[2], dtype=np.uint64)
        if not whole:
            # What PIL opens is an array to NumPy.
            images = [image if hasattr(image, "shape") else np.asarray(image) for image in images]
            if any(len(image.shape) != 3 for image in images):
                raise ValueError("images must be (H, W, C) each, or one array (N, H, W, C)")
        return images, labels.long(), indices

    def _number(self, epoch: int) -> np.uint64:
        """The number of this batch in its epoch, in the upper half of an index."""
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, 0
        worker = get_worker_info()
        number = self._batches
        if worker is not None:
            number = number * worker.num_workers + worker.id
        self._batches += 1
        return np.uint64(number << 32)

    def _partners(self, count: int, rng: np.random.Generator) -> np.ndarray:
        order = np.arange(count)
        if self.partner == "flip":
            return order[::-1].copy()
        if self.partner == "roll":
            return np.roll(order, 1)
        shuffled = rng.permutation(count)
        if self.mode != "pair":
            return shuffled
        even = count // 2 * 2
        order[shuffled[:even:2]], order[shuffled[1:even:2]] = shuffled[1:even:2], shuffled[:even:2]
        return order

    def _lambdas(self, partner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count = len(partner)
        draws = rng.beta(self.alpha, self.alpha, 1 if self.mode == "batch" else count)
        if self.mode == "pair":
            draws = draws[np.minimum(partner, np.arange(count))]
        return np.broadcast_to(draws, (count,)).astype(np.float32)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.slots == 0:
            return None
        if self._process != os.getpid():  # a parent's buffers are no worker's
            self._ring, self._process = [None] * self.slots, os.getpid()
        slot = next(self._turns) % self.slots
        n, channels, height, width = shape
        elements = n * channels * height * width
        in_worker = get_worker_info() is not None
        buffer = self._ring[slot]
        if torch.cuda.is_available() and not in_worker:
            # Not from the ring: PyTorch gives pinned memory away again, once copies from it are done.
            buffer = torch.empty(elements, dtype=self.dtype, device="cpu", pin_memory=True)
        elif buffer is None or len(buffer) < elements:
            buffer = torch.empty(elements, dtype=self.dtype, device="cpu")
            buffer = self._ring[slot] = buffer.share_memory_() if in_worker else buffer
        return buffer[:elements].view(n, height, width, channels).permute(0, 3, 1, 2)

    def _forget(self) -> None:
        self._ring, self._process, self._turns = [], None, itertools.count()
        self._epoch, self._batches = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_ring", "_turns"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU, without waiting for it; what goes to the CPU stays where it is."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _uniform(seed: int, epoch: int, purpose: int, indices: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each index, a function of the arguments alone.

    Counter-based: the key and the index go through the finalizer of SplitMix64 (Steele et al.,
    Fast splittable pseudorandom number generators, 2014).
    """
    key = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    bits = _scramble(_scramble(indices.astype(np.uint64)) ^ key)
    return (bits >> np.uint64(11)) * 2.0**-53


def _scramble(bits: np.ndarray) -> np.ndarray:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def mixup_cross_entropy(
    logits: Tensor,
    targets: Targets,
    *,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """lam * L(logits, a) + (1 - lam) * L(logits, b), without a one-hot target.

    Equals the loss of the target y = lam * onehot(a) + (1 - lam) * onehot(b), smoothed by e to
    (1 - e) * y + e / K. Both losses are linear in y: all that they ask of it is y . z for
    z = log_softmax(logits) or z = logits.

    Args:
        logits: (N, K), floating; half types are computed in float32.
        targets: (a, b, lam) as `Mixup` gives them: classes 0 to K - 1, (N,), and a weight that is
            (N,) or one number.
        loss: "softmax", the cross-entropy -y . log_softmax(logits), or "sigmoid", the binary
            cross-entropy of each class, summed over the classes (softplus(logits) - y * logits).
        label_smoothing: e, 0 to 1.
        reduction: over the images: "mean", "sum" or "none".

    Returns:
        A number, or (N,) without reduction; float32, or float64 for float64 logits.

    Raises:
        ValueError: a shape or value is none of these. On another device than the CPU, classes
            are not checked: that would wait for the device.
    """
    a, b, lam = targets
    _check_loss(logits, a, b, lam, loss, label_smoothing, reduction)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = F.log_softmax(logits, 1) if loss == "softmax" else logits
    picked = scores.gather(1, torch.stack([a, b], 1))
    agreement = lam * picked[:, 0] + (1 - lam) * picked[:, 1]
    if label_smoothing > 0:
        agreement = torch.lerp(agreement, scores.mean(1), label_smoothing)
    losses = -agreement if loss == "softmax" else F.softplus(logits).sum(1) - agreement
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check_loss(logits, a, b, lam, loss, label_smoothing, reduction) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}; they must be (N, K)")
    count, classes = logits.shape
    for name, labels in (("a", a), ("b", b)):
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(
                f"targets' {name} is {labels.dtype} {tuple(labels.shape)}; with these logits it "
                f"must be torch.int64 ({count},)"
            )
        if (
            labels.device.type == "cpu"
            and count
            and not (0 <= labels.min() and labels.max() < classes)
        ):
            raise ValueError(
                f"targets' {name} runs from {labels.min()} to {labels.max()}; with {classes} "
                f"classes it must lie in 0..{classes - 1}"
            )
    if isinstance(lam, Tensor) and lam.shape not in ((), (count,)):
        raise ValueError(f"targets' lam has shape {tuple(lam.shape)}; it may be () or ({count},)")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in 0..1")
    for name, value, allowed in (
        ("loss", loss, ("softmax", "sigmoid")),
        ("reduction", reduction, ("mean", "sum", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it may be one of {allowed}")
