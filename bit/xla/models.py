"""The Big Transfer network of `bit.models` as a flax module, NHWC, on `bit_kernels.xla`.

Layers and parameters have the names of `bit.models`, as a tree:

    params["block1"]["unit01"]["conv1"]["kernel"]    (kh, kw, in, out)
    params["block1"]["unit01"]["norm1"]["scale"]     and "bias", (channels,)
    params["head"]["kernel"]                         (features, classes), and "bias"

Parameters are float32. `dtype` is that of activations and of the kernels as they are used.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from bit.models import STEMS, groups_of, shape_of
from bit_kernels.xla import Conv, Norm, convolve, group_norm_relu, norm_relu_conv

EPS = 1e-10  # of standardization
KERNEL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNetV2(nn.Module):
    """The whole network: images (N, H, W, 3) in [-1, 1] to logits (N, num_classes).

    model: "R{depth}x{width}", as for `bit.models.create`. num_classes: at least 1.
    stem: "imagenet" or "small". dtype: float32, bfloat16 or float64.
    standardized: the kernels come standardized already, as `bit_kernels.xla.sgd` keeps them.
    remat: keep of a residual unit its input alone for backward, and run it again there.

    Logits are float32, or float64 for that. Raises ValueError for what there is no network for.
    """

    model: str
    num_classes: int = 1000
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32
    standardized: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        self._check(images)
        units, base = shape_of(self.model)
        eps = None if self.standardized else EPS
        x = Root(base, self.stem, eps, name="root")(images.astype(self.dtype))
        for number, count in enumerate(units):
            block = Block(count, base * 2**number, 2 if number else 1, eps, self.remat)
            x = block.copy(name=f"block{number + 1}")(x)
        norm = _Norm(name="norm")(x.shape[-1])
        wide = jnp.promote_types(self.dtype, jnp.float32)
        features = group_norm_relu(x, *norm[:3], norm.eps).mean((1, 2), dtype=wide)
        return Head(self.num_classes, self.dtype, name="head")(features)

    def _check(self, images: Array) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")
        if self.stem not in STEMS:
            raise ValueError(f"stem is {self.stem!r}; it may be one of {', '.join(STEMS)}")
        shape = images.shape
        floating = jnp.issubdtype(images.dtype, jnp.floating)
        if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:3] or not floating:
            raise ValueError(
                f"images is {images.dtype} of shape {shape}; it must be floating point of shape "
                f"(N, H, W, 3), H and W at least 1"
            )


class Root(nn.Module):
    """The first convolution and pool: (N, H, W, 3) to (N, H/4, W/4, channels), rounded up."""

    channels: int
    stem: str
    eps: float | None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if self.stem == "small":
            return convolve(images, _Conv(self.channels, 3, 1, self.eps, name="conv")(3))
        x = convolve(images, _Conv(self.channels, 7, 2, self.eps, name="conv")(3))
        # Over a border of zeros, not of -inf: no activation comes before the pool.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


class Block(nn.Module):
    """Residual units; the first one has the stride."""

    units: int
    mid: int
    stride: int
    eps: float | None
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = nn.remat(Unit) if self.remat else Unit
        for number in range(1, self.units + 1):
            stride = self.stride if number == 1 else 1
            x = unit(self.mid, stride, self.eps, name=f"unit{number:02d}")(x)
        return x


class Unit(nn.Module):
    """A pre-activation bottleneck: (N, H, W, C) to (N, H/stride, W/stride, 4 * mid)."""

    mid: int
    stride: int
    eps: float | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, conv = x.shape[-1], partial(_Conv, eps=self.eps)
        # The projection takes the activated map, the identity (proj is None) the raw one.
        proj = None
        if self.stride > 1 or channels != 4 * self.mid:
            proj = conv(4 * self.mid, 1, self.stride, name="proj")(channels)
        norms = [
            _Norm(name=f"norm{i}")(c) for i, c in ((1, channels), (2, self.mid), (3, self.mid))
        ]
        conv1 = conv(self.mid, 1, 1, name="conv1")(channels)
        conv2 = conv(self.mid, 3, self.stride, name="conv2")(self.mid)
        conv3 = conv(4 * self.mid, 1, 1, name="conv3")(self.mid)
        y, shortcut = norm_relu_conv(x, norms[0], [conv1, proj])
        (y,) = norm_relu_conv(y, norms[1], [conv2])
        (y,) = norm_relu_conv(y, norms[2], [conv3], residual=shortcut)
        return y


class Head(nn.Module):
    """A linear layer, computed in `dtype`, its sums in float32 or wider."""

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Array) -> Array:
        shape = features.shape[-1], self.classes
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        return linear(features, kernel, self.dtype) + bias


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, dtype) -> Array:
    """x @ kernel, multiplied in `dtype`; the kernel's gradient is not rounded to it."""
    return _product(x, kernel, (1, 0), dtype)


def _linear_forward(x, kernel, dtype):
    return linear(x, kernel, dtype), (x, kernel)


def _linear_backward(dtype, kept, grad):
    x, kernel = kept
    return _product(grad, kernel, (1, 1), dtype).astype(x.dtype), _product(x, grad, (0, 0), dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _product(a: Array, b: Array, contracted: tuple[int, int], dtype) -> Array:
    axes = (contracted[:1], contracted[1:]), ((), ())
    wide = jnp.promote_types(dtype, jnp.float32)
    return lax.dot_general(a.astype(dtype), b.astype(dtype), axes, preferred_element_type=wide)


class _Conv(nn.Module):
    """The parameters of a convolution, as the ops take them."""

    features: int
    size: int
    stride: int
    eps: float | None

    @nn.compact
    def __call__(self, channels: int) -> Conv:
        shape = self.size, self.size, channels, self.features
        kernel = self.param("kernel", KERNEL, shape, jnp.float32)
        stride, padding = (self.stride,) * 2, (self.size // 2,) * 2
        return Conv(kernel, stride=stride, padding=padding, eps=self.eps)


class _Norm(nn.Module):
    """The parameters of a GroupNorm and its ReLU."""

    @nn.compact
    def __call__(self, channels: int) -> Norm:
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return Norm(groups_of(channels), scale, bias)


def shapes(network: ResNetV2) -> dict:
    """The parameters as a tree of shapes and dtypes; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), images)["params"]


def is_convolution(path: tuple, leaf) -> bool:
    """Whether a parameter, by its path in the tree, is the kernel of a convolution."""
    return leaf.ndim > 1 and not re.match(r"\['head'\]", jax.tree_util.keystr(path))
