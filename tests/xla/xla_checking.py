"""An op of JAX beside the reference in PyTorch: both take and give torch's tensors, laid out as
JAX has them, (N, H, W, C) and (kh, kw, C_in, C_out). Tensors come by name: those of `tensors` are
given to a function by keyword, and have gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checking import assert_as_good
from jax.sharding import Mesh
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF, torch.float64]


def nchw(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def nhwc(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def oihw(kernel: Tensor) -> Tensor:
    """Also of kernels with fewer or more dimensions."""
    return kernel.movedim((-1, -2), (0, 1))


def hwio(kernel: Tensor) -> Tensor:
    return kernel.movedim((0, 1), (-1, -2))


def x64(dtype: torch.dtype):
    """JAX has no float64 by default, and all but float64 is tested as it is by default."""
    return jax.enable_x64(dtype == torch.float64)


def mesh(axis: str) -> Mesh:
    """The devices that conftest.py asks for, in one row."""
    return Mesh(np.array(jax.devices()), axis)


def draw(shape, seed=0, dtype=torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def to_jax(tensors):
    """A tree of floating tensors as JAX's arrays, of the same dtypes, on no device in particular."""
    return jax.tree.map(
        lambda x: jnp.asarray(x.detach().double().numpy(), str(x.dtype).removeprefix("torch.")),
        tensors,
    )


def to_torch(arrays) -> list[Tensor]:
    return [
        torch.tensor(np.asarray(x).astype(np.float64), dtype=getattr(torch, x.dtype.name))
        for x in jax.tree.leaves(arrays)
    ]


def of_jax(function, tensors: dict[str, Tensor], grads) -> list[Tensor]:
    """[outputs, gradient of each tensor], compiled as one."""

    @jax.jit
    def run(tensors, grads):
        outputs, backward = jax.vjp(lambda given: function(**given), tensors)
        return outputs, backward(grads)[0]

    with x64(next(iter(tensors.values())).dtype):
        outputs, found = run(to_jax(tensors), to_jax(grads))
        return to_torch([outputs, [found[name] for name in tensors]])


def of_torch(function, tensors: dict[str, Tensor], grads, wide=False) -> list[Tensor]:
    """The same; `wide`, in float64."""
    if wide:
        tensors = {name: x.double() for name, x in tensors.items()}
        grads = jax.tree.map(Tensor.double, grads)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [*(x.detach() for x in outputs), *found]


def assert_same(ours, right, tolerance=1e-12):
    """Each tensor within `tolerance` of the largest element."""
    for mine, true in zip(ours, right, strict=True):
        assert mine.shape == true.shape and mine.dtype == true.dtype
        if true.numel() > 0:
            size = true.abs().max().item()
            torch.testing.assert_close(mine, true, rtol=0, atol=tolerance * max(size, 1e-3))


def assert_close(ours, right, tolerance=1e-12):
    """Of trees of JAX's arrays."""
    assert_same(to_torch(ours), to_torch(right), tolerance)


def assert_as_reference(ours, theirs, tensors: dict[str, Tensor], grads):
    """`ours` of JAX as good as `theirs` of PyTorch in the tensors' dtype; close in float64."""
    found, truth = of_jax(ours, tensors, grads), of_torch(theirs, tensors, grads, wide=True)
    if found[0].dtype == torch.float64:
        assert_same(found, truth)
        return
    names = [f"output {i}" for i in range(len(found) - len(tensors))]
    names += [f"gradient of {name}" for name in tensors]
    assert_as_good(names, found, of_torch(theirs, tensors, grads), truth)


def assert_second_gradients(ours, theirs, tensors: dict[str, Tensor], grads):
    """The gradient of the sum of squares of the gradients, in float64."""

    def penalty(given, grads):
        _, backward = jax.vjp(lambda given: ours(**given), given)
        return sum(jnp.square(g).sum() for g in jax.tree.leaves(backward(grads)))

    with x64(torch.float64):
        found = jax.jit(jax.grad(penalty))(to_jax(tensors), to_jax(grads))
        found = to_torch([found[name] for name in tensors])
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    wanted = list(leaves.values())
    first = torch.autograd.grad(theirs(**leaves), wanted, grads, create_graph=True)
    right = torch.autograd.grad(
        sum(g.square().sum() for g in first), wanted, allow_unused=True, materialize_grads=True
    )
    assert_same(found, right, 1e-10)


def assert_exports(function, shapes, arrays):
    """`function` of arrays with an open batch, "b" in `shapes`, serialised for every platform and
    read again: the same on the CPU, and the same gradient of the first floating argument."""
    pytest.importorskip("flatbuffers")
    from jax import export

    scope = export.SymbolicScope()
    described = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), x.dtype)
        for shape, x in zip(shapes, arrays, strict=True)
    ]
    made = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*described)
    again = export.deserialize(made.serialize(vjp_order=1))
    at = next(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))

    def loss(function, *arrays):
        outputs = function(*arrays)
        return sum(jnp.square(y).sum() for y in jax.tree.leaves(outputs)), outputs

    ours, right = (
        jax.grad(loss, 1 + at, has_aux=True)(f, *arrays) for f in (again.call, jax.jit(function))
    )
    assert_close(ours, right, 1e-6)
