"""The network and its training step as one writes them in JAX: the rival of `bit.xla`.

Every layer in plain jnp, weights standardized in each forward, gradients by `jax.grad`, the batch
dealt out by `jax.jit` and shardings, weights and momenta on every device. GroupNorm sums channels
before it joins them to groups: the usual reshape of the whole map to groups takes a TPU twice the
cycles of this network, and would make a weak rival. Scopes have the names by which
`bit.xla.program` tells cycles apart.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bit.models import UNITS

Params = dict[str, Array]


def shapes(depth: int, base: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The parameters; kernels are (kh, kw, in, out)."""
    found, channels = {"root": (7, 7, 3, base)}, base
    for block, units in enumerate(UNITS[depth]):
        mid = base * 2**block
        for unit in range(units):
            at = f"block{block}/unit{unit}/"
            if unit == 0:
                found[at + "proj"] = (1, 1, channels, 4 * mid)
            found[at + "conv1"] = (1, 1, channels, mid)
            found[at + "conv2"] = (3, 3, mid, mid)
            found[at + "conv3"] = (1, 1, mid, 4 * mid)
            for number, width in ((1, channels), (2, mid), (3, mid)):
                found[f"{at}scale{number}"] = found[f"{at}bias{number}"] = (width,)
            channels = 4 * mid
    found["scale"] = found["bias"] = (channels,)
    found["head"], found["head_bias"] = (channels, classes), (classes,)
    return found


def conv(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    with jax.named_scope("standardize_weight"):
        mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        kernel = ((kernel - mean) * lax.rsqrt(var + 1e-10)).astype(x.dtype)
    around = [(padding, padding)] * 2
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, around, dimension_numbers=layouts)


@jax.named_scope("group_norm_relu")
def norm_relu(x: Array, scale: Array, bias: Array) -> Array:
    n, channels = x.shape[0], x.shape[-1]

    def groups(means: Array) -> Array:
        means = means.reshape(n, 32, channels // 32).mean(2)
        return jnp.repeat(means, channels // 32, 1)[:, None, None]

    y = x.astype(jnp.float32)
    mean = groups(y.mean((1, 2)))
    var = groups(jnp.square(y - mean).mean((1, 2)))
    return jax.nn.relu((y - mean) * lax.rsqrt(var + 1e-5) * scale + bias).astype(x.dtype)


def forward(params: Params, images: Array, depth: int) -> Array:
    x = conv(images.astype(jnp.bfloat16), params["root"], 2, 3)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    for block, units in enumerate(UNITS[depth]):
        for unit in range(units):
            p = {
                name.rpartition("/")[2]: value
                for name, value in params.items()
                if name.startswith(f"block{block}/unit{unit}/")
            }
            stride = 2 if block and not unit else 1
            y = norm_relu(x, p["scale1"], p["bias1"])
            shortcut = conv(y, p["proj"], stride) if "proj" in p else x
            y = conv(y, p["conv1"])
            y = conv(norm_relu(y, p["scale2"], p["bias2"]), p["conv2"], stride, 1)
            x = conv(norm_relu(y, p["scale3"], p["bias3"]), p["conv3"]) + shortcut
    features = norm_relu(x, params["scale"], params["bias"]).astype(jnp.float32).mean((1, 2))
    return features @ params["head"] + params["head_bias"]


def lower(
    mesh: Mesh, depth: int, base: int, classes: int, images: int, side: int
) -> jax.stages.Lowered:
    """A step of SGD with momentum and decay on softmax; images: of a device."""

    def step(params: Params, momenta: Params, batch: Array, labels: Array):
        def loss_of(params: Params) -> Array:
            scores = jax.nn.log_softmax(forward(params, batch, depth))
            return -jnp.take_along_axis(scores, labels[:, None], 1).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        with jax.named_scope("sgd"):
            momenta = jax.tree.map(lambda m, g, w: 0.9 * m + g + 1e-4 * w, momenta, grads, params)
            params = jax.tree.map(lambda w, m: w - 0.03 * m, params, momenta)
        return params, momenta, loss

    whole = NamedSharding(mesh, PartitionSpec())
    dealt = NamedSharding(mesh, PartitionSpec("data"))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
        for name, shape in shapes(depth, base, classes).items()
    }
    count = images * mesh.size
    batch = jax.ShapeDtypeStruct((count, side, side, 3), jnp.float32, sharding=dealt)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=dealt)
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(whole, whole, whole))
    return compiled.lower(params, params, batch, labels)
