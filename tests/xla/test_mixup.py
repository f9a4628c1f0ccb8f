"""mixup of JAX: against plain float64 code and the CPU's kernel; the loss of mixed labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checking import assert_as_good
from xla_checking import (
    DTYPES,
    assert_as_reference,
    assert_close,
    assert_exports,
    assert_same,
    draw,
    nhwc,
    to_torch,
    x64,
)

from bit_kernels import data, functional
from bit_kernels.xla import mixup, mixup_cross_entropy

# Why each is here: (N, H, W, C), the crop and the number of outputs.
SAMPLES = {
    "rgb": ((6, 20, 21, 3), (16, 16), 6),
    "odd": ((5, 13, 17, 3), (11, 13), 5),
    "partners_only": ((5, 6, 11, 2), (4, 9), 2),
    "grey": ((4, 9, 12, 1), (9, 12), 4),
    "one_pixel": ((4, 3, 3, 4), (1, 1), 3),
    "one_image": ((1, 12, 12, 3), (8, 8), 1),
    "none": ((3, 4, 4, 3), (2, 3), 0),
}


def make(sample):
    (count, *size, channels), crop, outputs = SAMPLES[sample]
    rng = np.random.default_rng(0)
    room = np.array(size) - crop
    corners = rng.integers(0, room + 1, (count, 2))
    corners[0], corners[-1] = 0, room  # the borders
    return rng.integers(0, 256, (count, *size, channels), dtype=np.uint8), {
        "lam": rng.beta(1, 1, outputs),
        "partner": rng.integers(0, count, outputs),
        "crop": crop,
        "corners": corners,
        "flips": np.arange(count) % 3 != 1,  # alone, as a partner, both, neither
        "mean": rng.uniform(0.2, 0.6, channels),
        "std": rng.uniform(0.1, 0.4, channels),
    }


def of_jax(images, options, dtype):
    fixed = dict(crop=options["crop"], dtype=str(dtype).removeprefix("torch."))
    arrays = {name: x for name, x in options.items() if name not in fixed}
    with x64(dtype):
        return to_torch(jax.jit(functools.partial(mixup, **fixed))(images, **arrays))


def of_torch(images, options, dtype, backend="reference"):
    return [nhwc(functional.mixup(images, **options, dtype=dtype, backend=backend))]


def assert_right(images, options, dtype=torch.float32):
    ours, truth = of_jax(images, options, dtype), of_torch(images, options, torch.float64)
    if dtype == torch.float64:
        assert_same(ours, truth)
    else:
        assert_as_good(["output"], ours, of_torch(images, options, dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype):
    assert_right(*make(sample), dtype)


def test_is_what_the_cpus_kernel_makes():
    images, options = make("rgb")
    ours = of_jax(images, options, torch.float32)
    assert_same(ours, of_torch(images, options, torch.float32, None), 1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("partner", [None, [0, 1, 2], [2, 2]], ids=str)
def test_one_lam_and_partners(lam, partner):
    images, options = make("partners_only")
    assert_right(images[:3], options | dict(lam=lam, partner=partner, corners=None, flips=None))


def test_defaults_are_the_whole_image_from_minus_one_to_one():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = mixup(images)
    assert x.dtype == jnp.float32 and x[0, 0, 0, 0] == -1 and x[0, 15, 15, 2] == 1
    assert jnp.array_equal(mixup(images, crop=(4, 6)), x[:, 6:10, 5:11])


def test_compiled():
    """Where, with whom and how much may be known on the device only; too far is cut."""
    images, options = make("odd")
    crop, arrays = options.pop("crop"), jax.tree.map(jnp.asarray, options)
    compiled = jax.jit(functools.partial(mixup, crop=crop))
    right = mixup(images, **arrays, crop=crop)
    assert_close(compiled(images, **arrays), right, 1e-6)
    last = dict(corners=jnp.full((5, 2), 99), partner=jnp.full(5, 99))
    there = dict(corners=jnp.full((5, 2), 2).at[:, 1].set(4), partner=jnp.full(5, 4))
    assert jnp.array_equal(compiled(images, **arrays | last), compiled(images, **arrays | there))


def test_exports():
    images, options = make("odd")
    crop = options.pop("crop")
    names = ["lam", "partner", "corners", "flips", "mean", "std"]
    assert_exports(
        lambda images, *given: mixup(images, crop=crop, **dict(zip(names, given, strict=True))),
        ["b, 13, 17, 3", "b", "b", "b, 2", "b", "3", "3"],
        [images, *(jnp.asarray(options[name]) for name in names)],
    )


IMAGES = np.zeros((3, 8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"images": IMAGES.astype(int)},
            r"images is int.* \(3, 8, 9, 3\); it must be uint8 \(N, H",
        ),
        ({"images": IMAGES[0]}, r"images is uint8 \(8, 9, 3\); it must be uint8 \(N, H, W, C\)"),
        ({"dtype": jnp.int8}, "dtype is .*int8.*; it must be a floating dtype"),
        ({"crop": (9, 9)}, r"crop is \(9, 9\); it must lie in \(1, 1\)..\(8, 9\) px"),
        ({"crop": (0, 4)}, r"crop is \(0, 4\); it must lie in"),
        ({"crop": (4,)}, r"crop is \(4,\); it must lie in"),
        ({"corners": [[0, 0]]}, r"corners is int32 \(1, 2\); it must be integers \(3, 2\)"),
        ({"corners": np.zeros((3, 2))}, r"corners is float32 \(3, 2\); it must be integers"),
        ({"flips": [True]}, r"flips is bool \(1,\); it must be booleans \(3,\)"),
        ({"flips": [0, 1, 0]}, r"flips is int32 \(3,\); it must be booleans \(3,\)"),
        (
            {"partner": [0, 1, 2, 0]},
            r"partner is int32 \(4,\); it must be integers \(M,\), M at mos",
        ),
        (
            {"partner": [[0], [1]]},
            r"partner is int32 \(2, 1\); it must be integers \(M,\), M at most 3",
        ),
        ({"partner": [0.0]}, r"partner is float32 \(1,\); it must be integers"),
        ({"lam": [0.1, 0.2]}, r"lam has shape \(2,\); it may be one number or \(3,\)"),
        (
            {"lam": [0.1] * 3, "partner": [1]},
            r"lam has shape \(3,\); it may be one number or \(1,\)",
        ),
        ({"mean": [0.1, 0.2]}, r"mean has shape \(2,\); it may be one number or \(3,\)"),
        ({"std": [[0.1]]}, r"std has shape \(1, 1\); it may be one number or \(3,\)"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        mixup(**{"images": IMAGES} | change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("label_smoothing, one_lam", [(0.0, True), (0.1, False)])
def test_loss_matches_pytorchs(loss, label_smoothing, one_lam, dtype):
    """With gradients of the logits; half types are computed in float32 by both."""
    options = dict(loss=loss, label_smoothing=label_smoothing)
    labels = np.array([0, 6, 3, 3, 1]), np.array([2, 6, 0, 5, 6])
    lam = 0.3 if one_lam else np.array([0, 0.25, 0.5, 0.875, 1], np.float32)

    def theirs(logits):
        there = [torch.from_numpy(x) for x in labels]
        weight = lam if one_lam else torch.from_numpy(lam)
        return data.mixup_cross_entropy(logits, (*there, weight), **options, reduction="none")

    assert_as_reference(
        lambda logits: mixup_cross_entropy(logits, (*map(jnp.asarray, labels), lam), **options),
        theirs,
        {"logits": (draw((5, 7)) * 3).to(dtype)},
        draw((5,), 1, torch.promote_types(dtype, torch.float32)),
    )


LOGITS, LABELS = jnp.zeros((3, 4)), jnp.zeros(3, int)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": LOGITS[0]}, r"logits are float32 \(4,\); they must be floating, \(N, K\)"),
        ({"logits": LOGITS.astype(int)}, r"logits are int32 \(3, 4\); they must be floating"),
        (
            {"targets": (LABELS[:2], LABELS, 1)},
            r"targets' a is int32 \(2,\); it must be integers \(3",
        ),
        (
            {"targets": (LABELS, LOGITS[:, 0], 1)},
            r"targets' b is float32 \(3,\); it must be integers",
        ),
        (
            {"targets": (LABELS, LABELS, LOGITS[:, :1])},
            r"targets' lam has shape \(3, 1\); it may be one number or \(3,\)",
        ),
        ({"loss": "hinge"}, "loss is 'hinge'; it may be 'softmax' or 'sigmoid'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must lie in 0..1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan; it must lie in 0..1"),
    ],
)
def test_loss_refuses(change, message):
    given = {"logits": LOGITS, "targets": (LABELS, LABELS, 0.5)} | change
    with pytest.raises(ValueError, match=message):
        mixup_cross_entropy(given.pop("logits"), given.pop("targets"), **given)
