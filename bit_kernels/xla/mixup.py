"""Mixup of a uint8 batch, cropped, flipped and normalised on the way (Zhang et al., arXiv 1710.09412),
and the loss of mixed labels.

    y[i] = lam[i] * norm(x[i]) + (1 - lam[i]) * norm(x[partner[i]]),  norm(v) = (v / 255 - mean) / std

where x[j] is image j cut to its own crop and, if it is flipped, mirrored left to right. As bytes, a
batch is a quarter of its size on the way to a device. There is no gradient: images are bytes.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from bit_kernels.xla.group_norm_relu import wide


def mixup(
    images: Array,
    lam: ArrayLike = 1.0,
    partner: ArrayLike | None = None,
    *,
    crop: tuple[int, int] | None = None,
    corners: ArrayLike | None = None,
    flips: ArrayLike | None = None,
    mean: ArrayLike = 0.5,
    std: ArrayLike = 0.5,
    dtype=jnp.float32,
) -> Array:
    """Crop, flip, normalise and mix images.

    Args:
        images: uint8 (N, H, W, C).
        lam: the weight of image i itself, 0 to 1: one number or (M,).
        partner: (M,) integers 0 to N - 1, the image that image i is mixed with; images from M on
            are partners only. None mixes nothing, and all N are put out.
        crop: (h, w) in pixels; None = all of an image.
        corners: (N, 2) integers, (top, left) of each image's crop in pixels; None = the middle.
        flips: (N,) booleans, which crops are mirrored left to right; None = none.
        mean, std: of pixels from 0 to 1, one number or (C,); the default maps bytes to -1 to 1.
        dtype: of the result, floating.

    Returns:
        (M, h, w, C), computed in float32 or wider. Values of partner and corners are not checked,
        they may be known on the device only: as XLA has it, they are cut to what there is.

    Raises:
        ValueError: a shape or dtype is none of these.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.dtype != jnp.uint8:
        raise ValueError(f"images is {images.dtype} {images.shape}; it must be uint8 (N, H, W, C)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    count, height, width, channels = images.shape
    crop = (height, width) if crop is None else crop
    if len(crop) != 2 or not (1 <= crop[0] <= height and 1 <= crop[1] <= width):
        raise ValueError(f"crop is {crop}; it must lie in (1, 1)..{(height, width)} px")
    h, w = crop
    if corners is None:
        corners = jnp.broadcast_to(jnp.array([(height - h) // 2, (width - w) // 2]), (count, 2))
    corners, compute = jnp.asarray(corners), wide(dtype)
    _check_integers("corners", corners, (count, 2))
    cut = jax.vmap(lambda x, at: lax.dynamic_slice(x, (*at, 0), (h, w, channels)))(images, corners)
    if flips is not None:
        flips = jnp.asarray(flips)
        if flips.shape != (count,) or flips.dtype != jnp.bool_:
            raise ValueError(
                f"flips is {flips.dtype} {flips.shape}; it must be booleans ({count},)"
            )
        cut = jnp.where(flips[:, None, None, None], cut[:, :, ::-1], cut)
    mean, std = (
        _spread(name, value, channels, compute) for name, value in (("mean", mean), ("std", std))
    )
    normal = (cut.astype(compute) / 255 - mean) / std
    outputs = count
    if partner is not None:
        partner = jnp.asarray(partner)
        integers = partner.ndim == 1 and jnp.issubdtype(partner.dtype, jnp.integer)
        if not integers or partner.shape[0] > count:
            raise ValueError(
                f"partner is {partner.dtype} {partner.shape}; it must be integers (M,), "
                f"M at most {count}"
            )
        outputs = partner.shape[0]
    lam = _spread("lam", lam, outputs, compute)[:, None, None, None]
    if partner is None:
        return normal.astype(dtype)
    return (lam * normal[:outputs] + (1 - lam) * normal[partner]).astype(dtype)


def mixup_cross_entropy(
    logits: Array,
    targets: tuple[Array, Array, ArrayLike],
    *,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
) -> Array:
    """lam * L(logits, a) + (1 - lam) * L(logits, b) of each image, without a one-hot target.

    As `bit_kernels.data.mixup_cross_entropy` with reduction="none".

    Args:
        logits: (N, K), floating; half types are computed in float32.
        targets: (a, b, lam): classes 0 to K - 1, (N,), and a weight that is (N,) or one number.
        loss: "softmax", or "sigmoid", the binary cross-entropy of each class, summed over classes.
        label_smoothing: e: the target y becomes (1 - e) * y + e / K.

    Returns:
        (N,), float32 or wider.

    Raises:
        ValueError: a shape or value is none of these.
    """
    a, b, lam = targets
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits are {logits.dtype} {logits.shape}; they must be floating, (N, K)")
    for name, labels in (("a", a), ("b", b)):
        _check_integers(f"targets' {name}", labels, logits.shape[:1])
    if loss not in ("softmax", "sigmoid"):
        raise ValueError(f"loss is {loss!r}; it may be 'softmax' or 'sigmoid'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in 0..1")
    logits = logits.astype(wide(logits.dtype))
    lam = _spread("targets' lam", lam, logits.shape[0], logits.dtype)
    scores = jax.nn.log_softmax(logits) if loss == "softmax" else logits
    first, second = (jnp.take_along_axis(scores, labels[:, None], 1)[:, 0] for labels in (a, b))
    agreement = lam * first + (1 - lam) * second
    if label_smoothing > 0:
        agreement = (1 - label_smoothing) * agreement + label_smoothing * scores.mean(1)
    return -agreement if loss == "softmax" else jax.nn.softplus(logits).sum(1) - agreement


def _check_integers(name: str, value: Array, shape: tuple[int, ...]) -> None:
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} is {value.dtype} {value.shape}; it must be integers {shape}")


def _spread(name: str, value: ArrayLike, count: int, dtype) -> Array:
    value = jnp.asarray(value, dtype)
    if value.shape not in ((), (count,)):
        raise ValueError(f"{name} has shape {value.shape}; it may be one number or ({count},)")
    return jnp.broadcast_to(value, (count,))
