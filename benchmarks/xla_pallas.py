"""Of the suite `xla`: the ops as Pallas kernels beside plain jnp, compiled for one TPU of a topology.

`pallas/norm_relu_conv/...`: a 3x3 convolution, GroupNorm and ReLU, a 1x1 convolution, forward.
`pallas/standardize_weight/...`: of a kernel's matrix, to bfloat16. `pallas/sgd/...`: projection,
decay, momentum, the new weight and its standardized form in bfloat16, in place.

The metric is `cycles`, the compiler's estimates as in bit/xla/program.py. It has none for a Pallas
kernel, so that one stands here twice, each time with the estimates of all else in the program, of
the layout copies around it above all:

  pallas_floor  its reads and writes at the whole bandwidth of the memory, and nothing else
  pallas_pass   what the compiler estimates for one elementwise pass with the same reads and writes;
                only this is like for like: of jnp's passes, too, it expects about half the bandwidth

`pallas_hwnc`: the map is taken as convolutions lay it out, (H, W, N, C), and is not copied. Kernels
read each operand once, as they hold whole channels in VMEM; where that is too small they are refused.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.runner import Count, Figure, Refusal
from bit.xla import program, topology
from bit.xla.step import mesh_of
from bit_kernels import xla

MiB = 2**20
LANES, SUBLANES = 128, 8
CHUNK = 128  # rows that a kernel works on at a time, of those that it holds
GROUPS, NORM_EPS, EPS = 32, 1e-5, 1e-10
RATE, MOMENTUM, DECAY = 0.03, 0.9, 1e-4
MAPS = ((8, 56, 56, 256), (8, 14, 14, 1024))
MATRIX = (3 * 3 * 1024, 1024)


def cases(topologies: Sequence[str]) -> list[Count]:
    """Each op on one TPU of each of `topologies`."""
    found = []
    for name in topologies:
        for shape in MAPS:
            take = functools.partial(_norm_relu_conv_figures, name, shape)
            found.append(_count(f"norm_relu_conv/{_dims(shape)}/{name}", "bfloat16", take))
        for op, figures in (("standardize_weight", _standardize_figures), ("sgd", _sgd_figures)):
            take = functools.partial(figures, name)
            found.append(_count(f"{op}/{_dims(MATRIX)}/{name}", "float32", take))
    return found


def _count(name: str, dtype: str, take: Callable[[], Iterator[Figure | Refusal]]) -> Count:
    return Count("xla", f"pallas/{name}", dtype, 0, take)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# ---- kernels; `how` is given to pl.pallas_call


def _over(rows: int, work: Callable, carry=None):
    """carry = work(rows to work on, carry), chunk by chunk."""
    step = max((n for n in range(16, CHUNK + 1, 16) if rows % n == 0), default=rows)
    if step == rows:
        return work(pl.ds(0, rows), carry)

    def chunk(i, carry):
        return work(pl.ds(pl.multiple_of(i * step, step), step), carry)

    return lax.fori_loop(0, rows // step, chunk, carry)


def _mean(ref, value: Callable) -> Array:
    """The mean of value(rows) over all rows of `ref`, its first dimension kept as 1."""
    zero = jnp.zeros((1, *ref.shape[1:]), jnp.float32)
    rows = ref.shape[0]
    return _over(rows, lambda at, sums: sums + value(at).sum(0, keepdims=True), zero) / rows


def group_norm_relu(
    x: Array, weight: Array, bias: Array, groups: int = GROUPS, *, hwnc: bool = False, **how
) -> Array:
    """`bit_kernels.xla.group_norm_relu` of a map, (N, H, W, C).

    A group must lie in one block of LANES channels; with `hwnc`, SUBLANES must divide N.
    """
    n, h, w, channels = x.shape
    size = channels // groups
    # Sums of lanes to groups as a product: a reshape of lanes isn't compiled by every libtpu.
    average = np.kron(np.eye(LANES // size), np.full((size, size), 1 / size)).astype(np.float32)
    if hwnc:
        x = x.transpose(1, 2, 0, 3).reshape(h * w, n, channels)
        grid = (n // SUBLANES, channels // LANES)
        block = pl.BlockSpec((h * w, SUBLANES, LANES), lambda i, j: (0, i, j))
    else:
        x = x.reshape(n, h * w, channels)
        grid = (n, channels // LANES)
        block = pl.BlockSpec((None, h * w, LANES), lambda i, j: (i, 0, j))
    row = pl.BlockSpec((1, LANES), lambda i, j: (0, j))
    y = pl.pallas_call(
        _norm_kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=grid,
        in_specs=[block, row, row, pl.BlockSpec((LANES, LANES), lambda i, j: (0, 0))],
        out_specs=block,
        **how,
    )(x, weight[None], bias[None], average)
    return y.reshape(h, w, n, channels).transpose(2, 0, 1, 3) if hwnc else y.reshape(n, h, w, -1)


def _norm_kernel(x, weight, bias, average, y):
    def read(at):
        return x[at].astype(jnp.float32)

    def group_mean(value):
        means = _mean(x, value).reshape(-1, LANES)
        return jnp.dot(means, average[:], precision=lax.Precision.HIGHEST)

    mean = group_mean(read)
    rstd = lax.rsqrt(group_mean(lambda at: jnp.square(read(at) - mean)) + NORM_EPS)

    def write(at, _):
        normal = (read(at) - mean) * rstd * weight[:] + bias[:]
        y[at] = jnp.maximum(normal, 0).astype(y.dtype)

    _over(x.shape[0], write)


def standardize_weight(weight: Array, **how) -> Array:
    """`bit_kernels.xla.standardize_weight` of a float32 matrix, to bfloat16."""
    return _by_columns(_standardize_kernel, [weight], [jnp.bfloat16], **how)[0]


def _by_columns(kernel: Callable, matrices: list[Array], dtypes: Sequence, **how) -> list[Array]:
    """A kernel of matrices of one shape that holds LANES of their columns at a time."""
    rows, columns = matrices[0].shape
    block = pl.BlockSpec((rows, LANES), lambda j: (0, j))
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in dtypes],
        grid=(columns // LANES,),
        in_specs=[block] * len(matrices),
        out_specs=[block] * len(dtypes),
        **how,
    )(*matrices)


def _standardize_kernel(weight, kept):
    mean, rstd = _statistics(weight)

    def write(at, _):
        kept[at] = ((weight[at] - mean) * rstd).astype(kept.dtype)

    _over(weight.shape[0], write)


def _statistics(weight) -> tuple[Array, Array]:
    mean = _mean(weight, lambda at: weight[at])
    return mean, lax.rsqrt(_mean(weight, lambda at: jnp.square(weight[at] - mean)) + EPS)


def sgd(weight: Array, grad: Array, momentum: Array, **how) -> list[Array]:
    """A step: the new weight and momentum, in place, and the new weight standardized."""
    dtypes = (jnp.float32, jnp.float32, jnp.bfloat16)
    in_place = {0: 0, 2: 1}
    matrices = [weight, grad, momentum]
    return _by_columns(_sgd_kernel, matrices, dtypes, input_output_aliases=in_place, **how)


def _sgd_kernel(weight, grad, momentum, new_weight, new_momentum, kept):
    mean, rstd = _statistics(weight)

    def normal(at):
        return (weight[at] - mean) * rstd

    mean_grad = _mean(grad, lambda at: grad[at])
    along = _mean(grad, lambda at: grad[at] * normal(at))

    def update(at, _):
        projected = rstd * (grad[at] - mean_grad - normal(at) * along)
        moment = MOMENTUM * momentum[at] + projected + DECAY * weight[at]
        new_momentum[at], new_weight[at] = moment, weight[at] - RATE * moment

    _over(weight.shape[0], update)
    _standardize_kernel(new_weight, kept)


def sgd_jnp(weight: Array, grad: Array, momentum: Array) -> tuple[Array, ...]:
    """The same by `bit_kernels.xla.sgd`."""
    optimizer = xla.sgd(RATE, MOMENTUM, DECAY, standardized=True, dtype=jnp.bfloat16, eps=EPS)
    state = xla.SGDState(jnp.zeros((), jnp.int32), momentum, None)
    updates, state = optimizer.update(grad, state, weight)
    return optax.apply_updates(weight, updates), state.momentum, state.standardized


# ---- compiled


@dataclass(frozen=True)
class Rivals:
    """jnp: plain. pallas: by provider, called with `how` beside the same arguments.

    reads, writes: of the Pallas kernel. free_layouts: arguments and results may lie as the compiler
    likes them, as they would between other layers.
    """

    jnp: Callable
    pallas: dict[str, Callable]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    reads: tuple[jax.ShapeDtypeStruct, ...]
    writes: tuple[jax.ShapeDtypeStruct, ...]
    free_layouts: bool = False
    donated: tuple[int, ...] = ()

    def one_pass(self, *reads: Array) -> list[Array]:
        """Elementwise and in one fusion: each of `writes` of the one before it, and all `reads`."""
        value, found = sum(x.astype(jnp.float32) for x in reads), []
        for like in self.writes:
            value = value * 0.5 + reads[0].astype(value.dtype)
            found.append(value.astype(like.dtype))
        return found

    def figures(self, name: str) -> Iterator[Figure | Refusal]:
        described = topology.describe(name)
        yield _figure("jnp", self._cycles(described, self.jnp, self.arguments))
        nbytes = sum(x.size * x.dtype.itemsize for x in (*self.reads, *self.writes))
        device = described.device
        floor = round(nbytes / device.bandwidth * device.clock)
        estimate = self._cycles(described, self.one_pass, self.reads)
        for provider, function in self.pallas.items():
            around = self._cycles_around(described, function)
            if isinstance(around, str):
                yield Refusal(provider, around, red=False)
                continue
            yield _figure(f"{provider}_floor", around + floor)
            yield _figure(f"{provider}_pass", around + estimate)

    def _cycles_around(self, described: topology.Topology, function: Callable) -> int | str:
        """Of all but the kernel, or why that is refused.

        It gets no more VMEM than it takes: XLA would miss that for arrays of its own.
        """
        try:
            return self._cycles(described, function, self.arguments)
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"vmem.*?(?:Used|with size) ([\d.]+)M", str(error), re.DOTALL)
            if found is None:
                raise
        needed = math.ceil(float(found[1])) * MiB
        with jax.set_mesh(mesh_of(described.devices[:1])):
            room = pltpu.get_tpu_info().vmem_capacity_bytes
        if needed > room:
            return f"its blocks take {needed // MiB} MiB of VMEM, which has {room // MiB}"
        params = pltpu.CompilerParams(vmem_limit_bytes=needed)
        function = functools.partial(function, compiler_params=params)
        return self._cycles(described, function, self.arguments)

    def _cycles(self, described: topology.Topology, function, arguments) -> int:
        mesh = mesh_of(described.devices[:1])
        place = NamedSharding(mesh, PartitionSpec())
        if self.free_layouts:
            place = Format(Layout.AUTO, place)
        donated = self.donated if arguments is self.arguments else ()
        compiled = jax.jit(
            function, in_shardings=place, out_shardings=place, donate_argnums=donated
        )
        with jax.set_mesh(mesh):  # a kernel with a product asks what it is compiled for
            return program.read(compiled.lower(*arguments).compile()).total_cycles


def _figure(provider: str, cycles: int) -> Figure:
    return Figure(provider, "cycles", cycles, cycles, cycles, "cycles")


def _norm_relu_conv_figures(name: str, shape: Sequence[int]) -> Iterator[Figure | Refusal]:
    channels = shape[-1]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    kernels = (jax.ShapeDtypeStruct((k, k, channels, channels), x.dtype) for k in (3, 1))
    gain = jax.ShapeDtypeStruct((channels,), jnp.float32)

    def plain(x, first, second, weight, bias):
        y = xla.convolve(x, xla.Conv(first, padding=(1, 1)))
        norm = xla.Norm(GROUPS, weight, bias, NORM_EPS)
        return xla.norm_relu_conv(y, norm, [xla.Conv(second)])[0]

    def by_kernel(x, first, second, weight, bias, hwnc=False, **how):
        y = xla.convolve(x, xla.Conv(first, padding=(1, 1)))
        y = group_norm_relu(y, weight, bias, hwnc=hwnc, **how)
        return xla.convolve(y, xla.Conv(second))

    pallas = {"pallas": by_kernel, "pallas_hwnc": functools.partial(by_kernel, hwnc=True)}
    rivals = Rivals(plain, pallas, (x, *kernels, gain, gain), (x,), (x,), free_layouts=True)
    yield from rivals.figures(name)


def _standardize_figures(name: str) -> Iterator[Figure | Refusal]:
    weight = jax.ShapeDtypeStruct(MATRIX, jnp.float32)
    kept = jax.ShapeDtypeStruct(MATRIX, jnp.bfloat16)
    plain = functools.partial(xla.standardize_weight, eps=EPS, dtype=kept.dtype)
    pallas = {"pallas": standardize_weight}
    yield from Rivals(plain, pallas, (weight,), (weight,), (kept,)).figures(name)


def _sgd_figures(name: str) -> Iterator[Figure | Refusal]:
    weight = jax.ShapeDtypeStruct(MATRIX, jnp.float32)
    kept = jax.ShapeDtypeStruct(MATRIX, jnp.bfloat16)
    reads, writes = (weight, weight, weight), (weight, weight, kept)
    rivals = Rivals(sgd_jnp, {"pallas": sgd}, reads, reads, writes, donated=(0, 2))
    yield from rivals.figures(name)
