"""One update over a mesh of devices, each of which has a share of the batch.

Every device has all of the kernels that the network is called with, standardized and in the dtype
that it computes in (`kept`). What the optimizer needs beside them, float32 weights and momenta, is
spread over the devices, so that each updates its part and sends the new kernels to the others
(Rajbhandari et al., ZeRO, arXiv 1910.02054, stage 1; Xu et al., arXiv 2004.13336). For R152x4 on 512
cores that is less than half of the memory and two thirds of the cycles of a step where every device
updates everything. Between devices a sum of rows in float32 and their kernels in bfloat16 are 6
bytes a weight, where all sums on every device are 8; but for 256 devices and more the TPU's compiler
makes whole sums of them (8 and 2), and on v3 also of the kernels that are sent (8 and 4).

A kernel is a matrix (rows, C_out) to the optimizer and is spread by rows, where their number allows
it: rows are whole runs of memory, so nothing is transposed on the way. Gradients are summed over
the devices in float32, by `jax.shard_map`: under plain `jax.jit` the compiler sums those of
convolutions in bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bit.xla.models import ResNetV2, is_convolution, shapes
from bit_kernels.xla import SGDState, mixup_cross_entropy, sgd, used

Tree = Any
AXIS = "data"
WHOLE, SPREAD = PartitionSpec(), PartitionSpec(AXIS)


class Batch(NamedTuple):
    """What an update reads, N images over all devices; those of weight 0 are padding.

    images: float32 (N, H, W, 3) in [-1, 1]. labels, partners: int32 (N,). lam: float32 (N,), the
    weight of the label, 1 - lam is the partner's. weights: float32 (N,), 1 or 0.
    """

    images: Array
    labels: Array
    partners: Array
    lam: Array
    weights: Array


class State(NamedTuple):
    """What is trained. weights, momentum: kernels as (rows, C_out), spread or whole.

    kept: the kernels as the network takes them, (kh, kw, C_in, C_out), on every device; None for
    what isn't a kernel.
    """

    weights: Tree
    momentum: Tree
    kept: Tree


def mesh_of(devices: list) -> Mesh:
    """All of the devices in one row, those of a process side by side."""
    return Mesh(np.array(sorted(devices, key=lambda d: (d.process_index, d.id))), (AXIS,))


@dataclass(frozen=True)
class Training:
    """How a network is trained on a mesh.

    network: its `standardized` must be True. mesh: of one axis, `mesh_of`. batch: images an update,
    over all devices. micro_batch: images that a device takes at a time, at most. loss: "softmax" or
    "sigmoid". sharded: weights and momenta spread over the devices, or whole on each.
    """

    network: ResNetV2
    mesh: Mesh
    batch: int
    micro_batch: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    loss: str = "softmax"
    sharded: bool = True

    # ---- how things lie

    @cached_property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of a device in an update, and the images of each."""
        each = -(-self.batch // self.mesh.size)
        count = -(-each // self.micro_batch)
        return count, -(-each // count)

    @property
    def images(self) -> int:
        """Images of an update with padding, a multiple of the devices."""
        count, each = self.passes
        return count * each * self.mesh.size

    @cached_property
    def shapes(self) -> Tree:
        """The parameters, as the network has them."""
        return shapes(self.network)

    @cached_property
    def dtype(self) -> jnp.dtype:
        """Of weights, momenta and sums."""
        return jnp.promote_types(self.network.dtype, jnp.float32)

    @cached_property
    def spread(self) -> Tree:
        """Which parameters are spread over the devices: those whose rows can be dealt out."""
        devices = self.mesh.size if self.sharded else 1
        return jax.tree.map(
            lambda p: devices > 1 and p.ndim > 1 and _rows(p) % devices == 0, self.shapes
        )

    @cached_property
    def convolutions(self) -> Tree:
        """Which parameters are kernels of convolutions."""
        return jax.tree_util.tree_map_with_path(is_convolution, self.shapes)

    @cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        return sgd(
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            standardized=self.convolutions,
            dtype=self.network.dtype,
            axis_name=AXIS,
            spread=self.spread,
        )

    @cached_property
    def state(self) -> State:
        """The state as shapes, dtypes and places on the mesh."""
        matrices = jax.tree.map(
            lambda p, s: self._described(_matrix(p), self.dtype, SPREAD if s else WHOLE),
            self.shapes,
            self.spread,
        )
        kept = jax.tree.map(lambda p: None if p.ndim == 1 else self._kept_as(p.shape), self.shapes)
        return State(matrices, matrices, kept)

    @cached_property
    def _specs(self) -> State:
        """How the state lies on the mesh."""
        return jax.tree.map(lambda x: x.sharding.spec, self.state)

    def described_batch(self, side: int) -> Batch:
        """A batch of square images as shapes, dtypes and places on the mesh."""
        float_row = self._described((self.images,), jnp.float32, SPREAD)
        int_row = self._described((self.images,), jnp.int32, SPREAD)
        images = self._described((self.images, side, side, 3), jnp.float32, SPREAD)
        return Batch(images, int_row, int_row, float_row, float_row)

    def _described(self, shape, dtype, spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _kept_as(self, shape) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self.mesh, WHOLE)
        if len(shape) == 2 and self.mesh.devices.flat[0].platform == "tpu":
            # A TPU would have the head by columns, and transpose what comes together by rows.
            place = Format(Layout((0, 1)), place)
        return jax.ShapeDtypeStruct(shape, self.network.dtype, sharding=place)

    # ---- what happens

    def start(self, params: Tree) -> State:
        """A fresh state from parameters as the network has them, NumPy arrays or JAX's."""
        weights = jax.tree.map(
            lambda p, like: put(np.asarray(p).reshape(like.shape), like), params, self.state.weights
        )
        momentum = jax.tree.map(
            lambda like: put(np.zeros(like.shape, like.dtype), like), self.state.momentum
        )
        return self.resume(weights, momentum)

    def resume(self, weights: Tree, momentum: Tree) -> State:
        """A state from weights and momenta as they lie in one."""
        return State(weights, momentum, self._keep(weights))

    @cached_property
    def _keep(self) -> Callable[[Tree], Tree]:
        def keep(weights: Tree) -> Tree:
            return self._gathered(weights, self.optimizer.init(weights))

        body = self._on_each(keep, (self._specs.weights,), self._specs.kept)
        return jax.jit(body, out_shardings=_places(self.state.kept))

    @cached_property
    def _whole(self) -> Callable[[Array], Array]:
        return jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, WHOLE))

    def params(self, state: State) -> Tree:
        """The parameters as the network has them, whole in the host's memory; of every process."""
        gather = self._whole
        return jax.tree.map(
            # One at a time: a device need not hold all of them.
            lambda w, p: np.asarray(gather(w)).reshape(p.shape),
            state.weights,
            self.shapes,
        )

    @cached_property
    def update(self) -> Callable[[State, Batch, Array], tuple[State, Array]]:
        """(state, batch, learning rate) -> (state, loss), the mean over the batch; compiled.

        The state that goes in is used up.
        """
        body = self._on_each(
            self._update, (self._specs, Batch(*[SPREAD] * 5), WHOLE), (self._specs, WHOLE)
        )
        places = _places(self.state), NamedSharding(self.mesh, WHOLE)
        return jax.jit(body, donate_argnums=0, out_shardings=places)

    @cached_property
    def predict(self) -> Callable[[State, Array], Array]:
        """(state, images) -> logits on every device; images (N, H, W, 3), N a multiple of them."""

        def forward(state: State, images: Array) -> Array:
            return self.network.apply({"params": self._called_with(state)}, images)

        body = self._on_each(forward, (self._specs, SPREAD), SPREAD)
        return jax.jit(body, out_shardings=NamedSharding(self.mesh, WHOLE))

    def lower(self, side: int) -> jax.stages.Lowered:
        """The update of square images of `side` px, ready to be compiled for the mesh."""
        rate = self._described((), self.dtype, WHOLE)
        return self.update.lower(self.state, self.described_batch(side), rate)

    def _on_each(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        # What is whole is the same on all devices because they compute the same from the same.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def _update(self, state: State, batch: Batch, rate: Array) -> tuple[State, Array]:
        loss, grads = self._gradients(self._called_with(state), batch)
        grads = jax.tree.map(_sum_over_devices, grads, self.spread)
        updates, new = self.optimizer.update(
            grads,
            SGDState(jnp.zeros((), jnp.int32), state.momentum, None),
            state.weights,
            learning_rate=rate,
        )
        weights = optax.apply_updates(state.weights, updates)
        kept = self._gathered(weights, new)
        return State(weights, new.momentum, kept), lax.psum(loss, AXIS)

    def _called_with(self, state: State) -> Tree:
        return jax.tree.map(lambda w, k: w if k is None else k, state.weights, state.kept)

    def _gathered(self, weights: Tree, state: SGDState) -> Tree:
        """The kernels as the network takes them, from the rows that each device has."""

        def gather(own: Array, spread: bool, like: jax.ShapeDtypeStruct) -> Array | None:
            if like.ndim == 1:
                return None
            own = own.astype(self.network.dtype)
            rows = lax.all_gather(own, AXIS, tiled=True) if spread else own
            return rows.reshape(like.shape)

        return jax.tree.map(gather, used(weights, state), self.spread, self.shapes)

    def _gradients(self, params: Tree, batch: Batch) -> tuple[Array, Tree]:
        """This device's share of the loss and of its gradients, in float32 or wider."""

        def loss_of(params: Tree, part: Batch) -> Array:
            logits = self.network.apply({"params": params}, part.images)
            targets = part.labels, part.partners, part.lam
            losses = mixup_cross_entropy(logits, targets, loss=self.loss)
            return (losses * part.weights).sum() / self.batch

        loss_and_grads = jax.value_and_grad(loss_of)
        passes, images = self.passes
        if passes == 1:
            return loss_and_grads(params, batch)
        parts = jax.tree.map(lambda x: x.reshape(passes, images, *x.shape[1:]), batch)

        def add(total: Tree, part: Batch) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, loss_and_grads(params, part)), None

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, self.dtype), (jnp.zeros(()), params))
        return lax.scan(add, zero, parts)[0]


def _sum_over_devices(grad: Array, spread: bool) -> Array:
    """Of all of a gradient, or of the rows that this device updates."""
    grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32)).reshape(_matrix(grad))
    return lax.psum_scatter(grad, AXIS, tiled=True) if spread else lax.psum(grad, AXIS)


def _rows(leaf) -> int:
    return int(np.prod(leaf.shape[:-1]))


def _matrix(leaf) -> tuple[int, ...]:
    return leaf.shape if leaf.ndim == 1 else (_rows(leaf), leaf.shape[-1])


def _places(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.format, tree)


def put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
    """To the devices of this process, of which each takes its part."""
    array = array.astype(like.dtype)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])
