"""One step of SGD for many tensors in one pass over memory, with weight standardization in it.

For every weight w with gradient g and momentum m (Sutskever et al., 2013, as in torch.optim.SGD):

    g <- rstd * (g - mean(g) - wh * mean(g * wh))     with project: g came as the gradient of wh
    g <- -g                                           with maximize
    g <- g + weight_decay * w
    m <- momentum * m + (1 - dampening) * g           m <- g where it is fresh
    w <- w - lr * m                                   w - lr * (g + momentum * m) with nesterov
    wh <- (w - mean) * rstd                           where standardized weights are kept

mean and rstd = 1 / sqrt(var + eps) are those of standardize_weight, for each output channel.

Memory passes: read g, w and m, write w, m and wh, nothing more. The projection is the backward of
standardization, and linear: gradients may be summed, over micro-batches or machines, before it.

Implementations (float32 weights): csrc/cpu/sgd.cpp, bit_kernels/triton/sgd.py, csrc/cuda/sgd.cu; else
bit_kernels/reference.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops import _cuda
from bit_kernels.ops._library import UNCAPTURED, gpu_kernels, implement, library

library.define(
    "sgd(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] standardized, "
    "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "bool fresh, bool project, float eps) -> ()",
    tags=UNCAPTURED,
)
library.define(
    "sgd_gradient_norm(Tensor[] weights, Tensor[] grads, float eps) -> Tensor", tags=UNCAPTURED
)
_op = torch.ops.bit_kernels.sgd.default
_norm_op = torch.ops.bit_kernels.sgd_gradient_norm.default


def sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] = (),
    standardized: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    fresh: bool = False,
    project: bool = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> None:
    """One step of SGD, in place, for tensors that are treated alike.

    >>> w, g = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    >>> m, wh = torch.empty_like(w), standardize_weight(w)
    >>> sgd([w], [g], [m], [wh], lr=0.1, momentum=0.9, fresh=True, project=True)
    >>> torch.allclose(wh, standardize_weight(w), atol=1e-6)
    True

    Args:
        weights: floating tensors of any shape, all of one dtype and on one device. Contiguous and
            channels_last ones are used as they lie, others are copied and copied back.
        grads: for each weight its gradient, of its shape and dtype.
        momenta: for each weight its momentum, likewise; read and written if `momentum` isn't 0.
        standardized: empty, or for each weight (C_out, C_in, *kernel) its standardized form, which
            is written: of its shape, and all of one floating dtype.
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's. lr may be a
            tensor of one element; Triton's kernels read one on the weights' GPU there, so that a CUDA
            graph of the step follows it, and nobody waits.
        fresh: `momenta` hold nothing yet and become the gradients.
        project: the gradients are those of the standardized weights.
        eps: of the standardization.
        backend: None chooses; "cpp", "triton", "cuda" or "reference" insists.

    Deterministic: the same input gives the same bits, whatever the number of threads, and
    `standardized` those of standardize_weight(weight, eps) with the same backend, "cpp" or "triton".

    Raises:
        ValueError: the lists, shapes, dtypes or devices don't fit; nothing was written.
    """
    if not weights:
        return
    _check(weights, grads, momenta if momentum != 0 else None, standardized, project)
    served_by = choose("sgd", weights[0], backend)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr is a tensor of {lr.numel()} elements; it may be a number or have one"
            )
        there = served_by == "triton" and lr.device == weights[0].device
        if not there or torch.compiler.is_compiling():
            lr = float(lr)
    options = lr, momentum, dampening, weight_decay, nesterov, maximize, fresh, project, eps
    if served_by == "reference":
        _plain(weights, grads, momenta, standardized, *options)
        return
    momenta = momenta if momentum != 0 else []
    if served_by == "triton" and not torch.compiler.is_compiling():
        _check_kernels(weights, standardized)
        gpu_kernels("sgd").step(weights, grads, momenta, standardized, *options)
    else:
        op = _cuda.sgd if served_by == "cuda" else _op
        op(weights, grads, momenta, standardized, *options)
    # Autograd then notices a backward that needs what was here before.
    torch.autograd.graph.increment_version([*weights, *standardized])


def project_gradients(
    weights: Sequence[Tensor], grads: Sequence[Tensor], eps: float = 1e-10
) -> None:
    """Makes the gradients of standardized weights those of the raw ones, in place.

    Args:
        weights, grads, eps: as in `sgd` with project.
    """
    if not weights:
        return
    _check(weights, grads, None, weights, True)
    if choose("sgd", weights[0]) == "triton":
        gpu_kernels("sgd").project_gradients(weights, grads, eps)
        torch.autograd.graph.increment_version(grads)
        return
    for w, g in zip(weights, grads, strict=True):
        g.copy_(reference.project_gradient(g, w, eps))


def gradient_norms(
    weights: Sequence[Tensor], grads: Sequence[Tensor], eps: float = 1e-10, norm_type: float = 2.0
) -> list[Tensor]:
    """The norm of each weight's gradient, given the gradients of the standardized weights.

    The projected gradients are summed up where they are computed and not written to memory, for the
    2-norm of float32 tensors; else one tensor at a time is.

    Args:
        weights, grads, eps: as in `sgd` with project.
        norm_type: p of the p-norm, may be inf.

    Returns:
        For each weight a tensor of no dimension, of its dtype.
    """
    if not weights:
        return []
    _check(weights, grads, None, weights, True)
    if norm_type == 2.0 and choose("sgd", weights[0]) != "reference":
        return list(_norm_op(weights, grads, eps).unbind())
    return [
        torch.linalg.vector_norm(reference.project_gradient(g, w, eps), norm_type)
        for w, g in zip(weights, grads, strict=True)
    ]


def _check(weights, grads, momenta, standardized, project) -> None:
    """Every refusal, before anything is written. momenta: None where they aren't needed."""
    first = weights[0]
    for w in weights:
        if not w.is_floating_point() or w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"weights has {w.dtype} on {w.device} beside {first.dtype} on {first.device}; "
                f"all may be of one floating dtype and on one device"
            )
    for name, tensors in (("grads", grads), ("momenta", momenta), ("standardized", standardized)):
        if tensors is None or name == "standardized" and not tensors:
            continue
        if len(tensors) != len(weights):
            raise ValueError(
                f"{name} has {len(tensors)} tensors; it must have one for each of {len(weights)} "
                f"weights"
            )
        dtype = tensors[0].dtype if name == "standardized" else first.dtype
        for w, tensor in zip(weights, tensors):
            if tensor.layout != torch.strided:
                raise ValueError(f"{name} has a {tensor.layout} tensor; it must be dense")
            if tensor.shape != w.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; its weight has {tuple(w.shape)}"
                )
            if tensor.dtype != dtype or tensor.device != w.device:
                raise ValueError(
                    f"{name} has {tensor.dtype} on {tensor.device}; it must be {dtype} on "
                    f"{w.device}"
                )
    if project and not standardized:
        raise ValueError("project is True; it may be so with standardized weights only")
    if standardized:
        if not standardized[0].is_floating_point():
            raise ValueError(
                f"standardized has {standardized[0].dtype}; it may be a floating dtype"
            )
        for w in weights:
            if w.dim() < 2:
                raise ValueError(
                    f"weights has shape {tuple(w.shape)}; a standardized one must be "
                    f"(C_out, C_in, *kernel)"
                )


def _check_kernels(weights, standardized) -> None:
    """What Triton's kernels refuse beside `_check`."""
    if weights[0].dtype != torch.float32:
        raise ValueError(f"weights has {weights[0].dtype}; the kernel takes float32 weights")
    if standardized and standardized[0].dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"standardized has {standardized[0].dtype}; the kernel writes float32, bfloat16 and "
            f"float16"
        )


@torch.library.register_fake("bit_kernels::sgd", lib=library)
def _fake(weights, grads, momenta, standardized, *options):
    return None


@torch.library.register_fake("bit_kernels::sgd_gradient_norm", lib=library)
def _norm_fake(weights, grads, eps):
    return weights[0].new_empty((len(weights),), dtype=torch.float32)


# Where no kernel is registered for a device, the op itself still runs.


def _plain(weights, grads, momenta, standardized, *options) -> None:
    lr, momentum, dampening, weight_decay, nesterov, maximize, fresh, project, eps = options
    reference.sgd(
        weights,
        grads,
        momenta,
        standardized,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        fresh=fresh,
        project=project,
        eps=eps,
    )


def _plain_norm(weights, grads, eps):
    norms = [
        torch.linalg.vector_norm(reference.project_gradient(g, w, eps), dtype=torch.float32)
        for w, g in zip(weights, grads, strict=True)
    ]
    return torch.stack(norms)


def _gpu_step(weights, grads, momenta, standardized, *options) -> None:
    if weights:
        momentum, project = options[1], options[-2]
        _check(weights, grads, momenta if momentum != 0 else None, standardized, project)
        _check_kernels(weights, standardized)
        gpu_kernels("sgd").step(weights, grads, momenta, standardized, *options)


def _gpu_norm(weights, grads, eps):
    _check(weights, grads, None, weights, True)
    _check_kernels(weights, [])
    return gpu_kernels("sgd").gradient_norms(weights, grads, eps)


implement("sgd", "sgd", _plain, _gpu_step)
implement("sgd_gradient_norm", "sgd", _plain_norm, _gpu_norm)
