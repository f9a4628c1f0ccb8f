"""What kernels compute of rows of weights: sums, statistics, the backward of standardization.

The same numbers give the same bits in every kernel, whatever tile and memory layout the compiler
worked with: a sum is written as the additions it consists of (`row_sum`), and launches are made with
`contract=False`, so that no product is fused into a sum but where it says `fma`. The optimizer's
standardized weights are then those of standardize_weight.

Values beyond a row's end are zeros: they change no sum.
"""

import triton
import triton.language as tl


@triton.jit
def row_sum(x):
    """Sums (BR,) of rows (BR, BK), in an order of additions that only the elements' places decide.

    Long rows are first folded, one half on the other, which is done in registers; then neighbours are
    added, and sums of neighbours. Zeros behind a row don't change its sum.
    """
    BR: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    if BK == 1:
        return tl.reshape(x, (BR,))
    elif BK > 1024:
        return row_sum(tl.sum(tl.reshape(x, (BR, 2, BK // 2)), 1))
    else:
        return row_sum(tl.sum(tl.reshape(x, (BR, BK // 2, 2)), 2))


@triton.jit
def reciprocal_root(mean_square, eps):
    return tl.rsqrt(mean_square + eps)


@triton.jit
def tile_of(left, columns, BR: tl.constexpr, BK: tl.constexpr):
    """Offsets (BR, BK) from the first of `left` dense rows, and which exist."""
    row = tl.arange(0, BR)
    column = tl.arange(0, BK)
    inside = (column < columns)[None, :]
    if BR > 1:
        inside = inside & (row < left)[:, None]
    return row[:, None] * columns + column[None, :], inside


@triton.jit
def statistics(x, inside, columns, eps):
    """mean and rstd (BR,) of whole rows, and their elements' deviations from the mean."""
    mean = row_sum(x) / columns.to(tl.float32)
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    square = row_sum(deviation * deviation) / columns.to(tl.float32)
    return mean, reciprocal_root(square, eps), deviation


@triton.jit
def piece(pointer, at, columns, BK: tl.constexpr):
    """Elements (1, BK) of one row from `at` on, in float32, and which exist."""
    column = tl.arange(0, BK)[None, :]
    inside = column < columns - at
    return tl.load(pointer + at + column, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def long_mean(x, columns, BK: tl.constexpr):
    """Mean (1,) of one row in memory."""
    total = tl.zeros((1, BK), tl.float32)
    for at in range(0, columns, BK):
        total += piece(x, at, columns, BK)[0]
    return row_sum(total) / columns.to(tl.float32)


@triton.jit
def long_rstd(x, mean, columns, eps, BK: tl.constexpr):
    """rstd (1,) of one row in memory."""
    total = tl.zeros((1, BK), tl.float32)
    for at in range(0, columns, BK):
        value, inside = piece(x, at, columns, BK)
        deviation = tl.where(inside, value - mean[:, None], 0.0)
        total += deviation * deviation
    return reciprocal_root(row_sum(total) / columns.to(tl.float32), eps)


@triton.jit
def long_standardize(x, output, mean, rstd, columns, BK: tl.constexpr):
    """Writes one row standardized."""
    for at in range(0, columns, BK):
        value, inside = piece(x, at, columns, BK)
        result = (value - mean[:, None]) * rstd[:, None]
        place = output + at + tl.arange(0, BK)[None, :]
        tl.store(place, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def project(gradient, deviation, rstd, columns):
    """The gradients of raw rows from those of their standardized form, which are 0 beyond the end."""
    plain, slope = _gradient_means(row_sum(gradient), row_sum(gradient * deviation), rstd, columns)
    return projected(gradient, deviation, rstd, plain, slope)


@triton.jit
def _gradient_means(plain, along, rstd, columns):
    count = columns.to(tl.float32)
    return plain / count, along / count * rstd * rstd


@triton.jit
def projected(gradient, deviation, rstd, plain, slope):
    return rstd[:, None] * tl.fma(-slope[:, None], deviation, gradient - plain[:, None])


@triton.jit
def long_gradient_means(gradient, x, mean, rstd, columns, BK: tl.constexpr):
    """Of one row in memory, what `projected` needs."""
    plain = tl.zeros((1, BK), tl.float32)
    along = tl.zeros((1, BK), tl.float32)
    for at in range(0, columns, BK):
        grad, inside = piece(gradient, at, columns, BK)
        value, inside = piece(x, at, columns, BK)
        plain += grad
        along += grad * (value - mean[:, None])
    return _gradient_means(row_sum(plain), row_sum(along), rstd, columns)


@triton.jit
def long_project(gradient, x, result, mean, rstd, columns, BK: tl.constexpr):
    """Writes one row's gradient projected."""
    plain, slope = long_gradient_means(gradient, x, mean, rstd, columns, BK)
    for at in range(0, columns, BK):
        grad, inside = piece(gradient, at, columns, BK)
        value, inside = piece(x, at, columns, BK)
        grad = projected(grad, value - mean[:, None], rstd, plain, slope)
        place = result + at + tl.arange(0, BK)[None, :]
        tl.store(place, grad.to(result.dtype.element_ty), mask=inside)
