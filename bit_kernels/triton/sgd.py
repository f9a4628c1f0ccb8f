"""One step of SGD over many tensors on a GPU, with the backward of weight standardization before it
and the new standardized weights behind it.

A tensor that is standardized is rows of memory, one for each output channel. A row is read once and
held in registers through

    its sums           -> mean, rstd, mean(g), mean(g * wh)
    the update         projection, decay, momentum, the new weight
    the new row's sums -> the row standardized

so that memory passes are those that must be: read g, w and m, write w, m and the standardized weight.
Rows of more than `_tables.HELD` elements are read again, from the cache, for each of their sums. Other
tensors are cut anywhere. All tensors of a call share a launch for each length of rows (`_tables.py`).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.triton import _rows, _tables
from bit_kernels.triton._launch import launch
from bit_kernels.triton._tables import TYPES, Table, lay_out

_BLOCK = 1024  # rows whose squares are added up at a time


# ---- kernels. Roles of the pointers: weight, gradient, velocity (HAS_VELOCITY), standardized weight.


@triton.jit
def _update(
    grad, weight, velocity, offsets, inside, lr, momentum, carried, taken, decay, sign,
    NESTEROV: tl.constexpr,
):  # fmt: skip
    """The new weight by torch.optim.SGD's rule; the new velocity is written.

    carried: the momentum of the velocity that was there, which isn't read where that is 0.
    """
    step = tl.fma(decay, weight, grad * sign)
    if velocity is not None:
        old = tl.load(velocity + offsets, mask=inside & (carried != 0.0), other=0.0)
        new = tl.fma(carried, old, step * taken)
        tl.store(velocity + offsets, new, mask=inside)
        if NESTEROV:
            step = tl.fma(momentum, new, step)
        else:
            step = new
    return tl.fma(-lr, step, weight)


@triton.jit
def _velocity(pointers, number, row, columns, ROLES: tl.constexpr, ALIGN: tl.constexpr):
    return _tables.pointer(pointers, number, 2, ROLES, tl.float32, ALIGN) + row * columns


@triton.jit
def _step_kernel(
    pointers, shapes, lr, momentum, carried, taken, decay, sign,
    HAS_VELOCITY: tl.constexpr, NESTEROV: tl.constexpr, LR_IN_MEMORY: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tensors that aren't standardized: their rows are of one element."""
    if LR_IN_MEMORY:
        lr = tl.load(lr).to(tl.float32)
    number, row, rows, _one, _place = _tables.find(shapes, BR, WIDTH, 1)
    ROLES: tl.constexpr = 3 if HAS_VELOCITY else 2
    weight = _tables.pointer(pointers, number, 0, ROLES, tl.float32, ALIGN) + row
    grad = _tables.pointer(pointers, number, 1, ROLES, tl.float32, ALIGN) + row
    velocity = None
    if HAS_VELOCITY:
        velocity = _velocity(pointers, number, row, 1, ROLES, ALIGN)
    offsets = tl.arange(0, BR)
    inside = offsets < _tables.aligned(rows, ALIGN)
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    g = tl.load(grad + offsets, mask=inside, other=0.0)
    w = _update(
        g, w, velocity, offsets, inside, lr, momentum, carried, taken, decay, sign, NESTEROV
    )  # fmt: skip
    tl.store(weight + offsets, w, mask=inside)


@triton.jit
def _step_rows_kernel(
    pointers, shapes, lr, momentum, carried, taken, decay, sign, eps,
    HAS_VELOCITY: tl.constexpr, NESTEROV: tl.constexpr, LR_IN_MEMORY: tl.constexpr,
    PROJECT: tl.constexpr, STANDARDIZED: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    if LR_IN_MEMORY:
        lr = tl.load(lr).to(tl.float32)
    number, row, rows, columns, place = _tables.find(shapes, BR, WIDTH, ALIGN)
    ROLES: tl.constexpr = 4 if HAS_VELOCITY else 3
    start = row * columns
    weight = _tables.pointer(pointers, number, 0, ROLES, tl.float32, ALIGN) + start
    grad = _tables.pointer(pointers, number, 1, ROLES, tl.float32, ALIGN) + start
    velocity = None
    if HAS_VELOCITY:
        velocity = _velocity(pointers, number, row, columns, ROLES, ALIGN)
    standardized = _tables.pointer(pointers, number, ROLES - 1, ROLES, STANDARDIZED, ALIGN) + start
    if WHOLE:
        offsets, inside = _rows.tile_of(rows, columns, BR, BK)
        w = tl.load(weight + offsets, mask=inside, other=0.0)
        g = tl.load(grad + offsets, mask=inside, other=0.0)
        if PROJECT:
            mean, rstd, deviation = _rows.statistics(w, inside, columns, eps)
            g = _rows.project(g, deviation, rstd, columns)
        w = _update(
            g, w, velocity, offsets, inside, lr, momentum, carried, taken, decay, sign, NESTEROV
        )
        tl.store(weight + offsets, w, mask=inside)
        w = tl.where(inside, w, 0.0)
        mean, rstd, deviation = _rows.statistics(w, inside, columns, eps)
        result = deviation * rstd[:, None]
        tl.store(standardized + offsets, result.to(STANDARDIZED), mask=inside)
    else:
        if PROJECT:
            mean = _rows.long_mean(weight, columns, BK)
            rstd = _rows.long_rstd(weight, mean, columns, eps, BK)
            plain, slope = _rows.long_gradient_means(grad, weight, mean, rstd, columns, BK)
        for at in range(0, columns, BK):
            w, inside = _rows.piece(weight, at, columns, BK)
            g, inside = _rows.piece(grad, at, columns, BK)
            if PROJECT:
                g = _rows.projected(g, w - mean[:, None], rstd, plain, slope)
            offsets = at + tl.arange(0, BK)[None, :]
            w = _update(
                g, w, velocity, offsets, inside, lr, momentum, carried, taken, decay, sign, NESTEROV
            )
            tl.store(weight + offsets, w, mask=inside)
        tl.debug_barrier()  # what one thread wrote another one reads
        mean = _rows.long_mean(weight, columns, BK)
        rstd = _rows.long_rstd(weight, mean, columns, eps, BK)
        _rows.long_standardize(weight, standardized, mean, rstd, columns, BK)


@triton.jit
def _project_kernel(
    pointers, shapes, eps,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of standardized weights become those of the raw ones, in place."""
    number, row, rows, columns, place = _tables.find(shapes, BR, WIDTH, ALIGN)
    start = row * columns
    weight = _tables.pointer(pointers, number, 0, 2, tl.float32, ALIGN) + start
    grad = _tables.pointer(pointers, number, 1, 2, tl.float32, ALIGN) + start
    if WHOLE:
        offsets, inside = _rows.tile_of(rows, columns, BR, BK)
        w = tl.load(weight + offsets, mask=inside, other=0.0)
        g = tl.load(grad + offsets, mask=inside, other=0.0)
        mean, rstd, deviation = _rows.statistics(w, inside, columns, eps)
        tl.store(grad + offsets, _rows.project(g, deviation, rstd, columns), mask=inside)
    else:
        mean = _rows.long_mean(weight, columns, BK)
        rstd = _rows.long_rstd(weight, mean, columns, eps, BK)
        _rows.long_project(grad, weight, grad, mean, rstd, columns, BK)


@triton.jit
def _squares_kernel(
    pointers, shapes, squares, eps,
    BR: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The sum of squares of each row's projected gradient."""
    number, row, rows, columns, place = _tables.find(shapes, BR, WIDTH, ALIGN)
    start = row * columns
    weight = _tables.pointer(pointers, number, 0, 2, tl.float32, ALIGN) + start
    grad = _tables.pointer(pointers, number, 1, 2, tl.float32, ALIGN) + start
    if WHOLE:
        offsets, inside = _rows.tile_of(rows, columns, BR, BK)
        w = tl.load(weight + offsets, mask=inside, other=0.0)
        g = tl.load(grad + offsets, mask=inside, other=0.0)
        mean, rstd, deviation = _rows.statistics(w, inside, columns, eps)
        g = tl.where(inside, _rows.project(g, deviation, rstd, columns), 0.0)
        total = g * g
    else:
        mean = _rows.long_mean(weight, columns, BK)
        rstd = _rows.long_rstd(weight, mean, columns, eps, BK)
        plain, slope = _rows.long_gradient_means(grad, weight, mean, rstd, columns, BK)
        total = tl.zeros((1, BK), tl.float32)
        for at in range(0, columns, BK):
            w, inside = _rows.piece(weight, at, columns, BK)
            g, inside = _rows.piece(grad, at, columns, BK)
            g = _rows.projected(g, w - mean[:, None], rstd, plain, slope)
            g = tl.where(inside, g, 0.0)
            total += g * g
    row = tl.arange(0, BR)
    tl.store(squares + place + row, _rows.row_sum(total), mask=row < rows)


@triton.jit
def _norm_kernel(shapes, squares, norms, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The root of the sum of a tensor's squares; a program a tensor."""
    number, rows, place = _tables.tensor(shapes, tl.program_id(0), WIDTH)
    total = tl.zeros((1, BLOCK), tl.float32)
    for at in range(0, rows, BLOCK):
        total += _rows.piece(squares + place, at, rows, BLOCK)[0]
    tl.store(norms + number + tl.arange(0, 1), tl.sqrt_rn(_rows.row_sum(total)))


# ---- launches


def step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    standardized: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    fresh: bool,
    project: bool,
    eps: float,
) -> None:
    """ops/sgd.py's arguments, float32 weights; lr may be a tensor of one element on their device."""
    roles = [weights, grads]
    if momentum != 0:
        roles.append(momenta)
    if standardized:
        roles.append(standardized)
    with _LaidOut(weights, roles, written=[tensors is not grads for tensors in roles]) as laid_out:
        table = _tables.table(laid_out, whole_rows=bool(standardized))
        rule = (
            lr if isinstance(lr, Tensor) else float(lr),
            float(momentum),
            0.0 if fresh else float(momentum),
            1.0 if fresh else 1.0 - dampening,
            float(weight_decay),
            -1.0 if maximize else 1.0,
        )
        constexprs = dict(
            HAS_VELOCITY=momentum != 0, NESTEROV=nesterov, LR_IN_MEMORY=isinstance(lr, Tensor)
        )
        if standardized:
            constexprs |= dict(PROJECT=project, STANDARDIZED=TYPES[standardized[0].dtype])
            _launch_groups(_step_rows_kernel, table, *rule, eps, **constexprs)
        else:
            _launch_groups(_step_kernel, table, *rule, **constexprs)


def project_gradients(weights: Sequence[Tensor], grads: Sequence[Tensor], eps: float) -> None:
    """Makes gradients of standardized weights those of the raw ones, in place. float32."""
    with _LaidOut(weights, [weights, grads], written=[False, True]) as roles:
        _launch_groups(_project_kernel, _tables.table(roles), eps)


def gradient_norms(weights: Sequence[Tensor], grads: Sequence[Tensor], eps: float) -> Tensor:
    """2-norms (tensors,) of what `project_gradients` would make, in float32."""
    device = weights[0].device
    with _LaidOut(weights, [weights, grads], written=[False, False]) as roles:
        table = _tables.table(roles)
        squares = torch.empty(
            sum(weight.shape[0] for weight in weights), dtype=torch.float32, device=device
        )
        _launch_groups(_squares_kernel, table, squares, eps)
    norms = torch.zeros(len(weights), dtype=torch.float32, device=device)
    for group in table.groups:
        launch(
            _norm_kernel, (group.tensors,), group.shapes, squares, norms,
            WIDTH=group.constexprs["WIDTH"], BLOCK=_BLOCK, contract=False,
        )  # fmt: skip
    return norms


def _launch_groups(kernel, table: Table, *args, **constexprs) -> None:
    for group in table.groups:
        launch(
            kernel, (group.programs,), table.pointers, group.shapes, *args,
            **constexprs, **group.constexprs, **group.options,
        )  # fmt: skip


class _LaidOut:
    """Tensors of all roles in their weights' memory order; what was written to copies is copied back.

    A copy lives until then, which is after the launches.
    """

    def __init__(self, weights, roles: list[Sequence[Tensor]], written: list[bool]):
        self.given, self.written = roles, written
        self.dense = [[lay_out(t, w) for t, w in zip(role, weights, strict=True)] for role in roles]

    def __enter__(self) -> list[list[Tensor]]:
        return self.dense

    def __exit__(self, error, *_) -> None:
        for given, dense, written in zip(self.given, self.dense, self.written, strict=True):
            for tensor, copy in zip(given, dense, strict=True):
                if written and error is None and copy is not tensor:
                    tensor.copy_(copy)
