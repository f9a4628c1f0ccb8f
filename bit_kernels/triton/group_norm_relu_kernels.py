"""The kernels of group_norm_relu; group_norm_relu.py says what they are for, and launches them."""

import triton
import triton.language as tl

# ---- parts of kernels


@triton.jit
def _channels_of(first_group, D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, num_groups):
    """Channels of BG groups from `first_group`, each padded from D to D2 places; and which exist."""
    place = tl.arange(0, BG * D2)
    if D == D2:  # one run of memory, which the compiler must see to load it in wide pieces
        channel = first_group * D + place
        return channel, channel < num_groups * D
    else:
        group = first_group + place // D2
        within = place % D2
        return group * D + within, (group < num_groups) & (within < D)


@triton.jit
def _offsets(pixel, channel, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Of a tile of pixels x channels in its sample, in 64 bits where the sample needs them."""
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    if CHANNELS_LAST:
        return pixel[:, None] * C + channel[None, :]
    else:
        return pixel[:, None] + channel[None, :] * P


@triton.jit
def _sum_of_groups(per_channel, D2: tl.constexpr, BG: tl.constexpr):
    """Sums of channels (BG * D2) over their groups, at each channel again."""
    if BG == 1:  # one number, which takes one register
        return tl.full((D2,), tl.sum(per_channel, 0), tl.float32)
    sums = tl.sum(tl.reshape(per_channel, (BG, D2)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (BG, D2)), (BG * D2,))


@triton.jit
def _scale_and_shift(weight, bias, rstd, channel, exists):
    """rstd * gamma and beta of channels."""
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(rstd)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _normal(x, mean, scale, shift):
    """The normalised x, before the ReLU. One formula, so that forward and backward mask alike."""
    return tl.fma(x - mean[None, :], scale[None, :], shift[None, :])


@triton.jit
def _statistics_of_groups(
    blocks, mean, rstd, weight, bias, n, channel, exists, num_groups,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """`_statistics_of` the channels of `_groups_of_program`."""
    if BG == 1:
        statistic = n.to(tl.int64) * num_groups + tl.program_id(0) % blocks
        center = tl.full((D2,), tl.load(mean + statistic), tl.float32)
        spread = tl.full((D2,), tl.load(rstd + statistic), tl.float32)
        scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
        return center, spread, scale, shift
    else:
        return _statistics_of(mean, rstd, weight, bias, n, channel, exists, num_groups, D)


@triton.jit
def _statistics_of(mean, rstd, weight, bias, n, channel, exists, num_groups, D: tl.constexpr):
    """mean, rstd, rstd * gamma and beta of channels."""
    statistic = n.to(tl.int64) * num_groups + channel // D
    center = tl.load(mean + statistic, mask=exists, other=0.0)
    spread = tl.load(rstd + statistic, mask=exists, other=0.0)
    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    return center, spread, scale, shift


@triton.jit
def _store_statistics(mean, rstd, center, spread, n, channel, exists, num_groups, D: tl.constexpr):
    """Of each group once, by its first channel."""
    statistic = n.to(tl.int64) * num_groups + channel // D
    first = exists & (channel % D == 0)
    tl.store(mean + statistic, center, mask=first)
    tl.store(rstd + statistic, spread, mask=first)


@triton.jit
def _load(tensor, offsets, inside):
    return tl.load(tensor + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sweep_statistics(
    x, other, start, first, end, channel, exists, C, P,
    BP: tl.constexpr, BC: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel, after x += other where that is there."""
    center = tl.zeros((BP, BC), tl.float32)
    square = tl.zeros((BP, BC), tl.float32)
    seen = 0.0
    for at in range(first, end, BP):
        pixel = at + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = _load(x, offsets, inside)
        if other is not None:
            rounded = (value + _load(other, offsets, inside)).to(x.dtype.element_ty)
            tl.store(x + offsets, rounded, mask=inside)
            value = rounded.to(tl.float32)
        # Welford: a place that is inside now was so each time before, `seen` times.
        seen += 1.0
        deviation = tl.where(inside, value - center, 0.0)
        center += deviation * (1.0 / seen)
        square += deviation * tl.where(inside, value - center, 0.0)
    # How often each row of the tile was inside.
    counts = ((end - first - tl.arange(0, BP) + BP - 1) // BP).to(tl.float32)
    mean = tl.sum(center * counts[:, None], 0) / (end - first).to(tl.float32)
    apart = center - mean[None, :]
    return mean, tl.sum(square + apart * apart * counts[:, None], 0)


@triton.jit
def _sweep_result(
    x, y, start, first, end, channel, exists, center, scale, shift, C, P,
    BP: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Writes the output, from the last tile to the first."""
    tiles = tl.cdiv(end - first, BP)
    for i in range(0, tiles):
        pixel = first + (tiles - 1 - i) * BP + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = _normal(_load(x, offsets, inside), center, scale, shift)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _load_gradient(
    grad_output, value, offsets, inside, center, scale, shift, RELU: tl.constexpr
):  # fmt: skip
    """The gradient behind the ReLU."""
    grad = _load(grad_output, offsets, inside)
    if RELU:
        grad = tl.where(_normal(value, center, scale, shift) <= 0, 0.0, grad)
    return grad


@triton.jit
def _sweep_gradients(
    grad_output, x, start, first, end, channel, exists, center, spread, scale, shift, C, P,
    BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Sums of each channel's gradient, and of its product with the normalised x."""
    plain = tl.zeros((BP, BC), tl.float32)
    along = tl.zeros((BP, BC), tl.float32)
    for at in range(first, end, BP):
        pixel = at + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = _load(x, offsets, inside)
        grad = _load_gradient(grad_output, value, offsets, inside, center, scale, shift, RELU)
        plain += grad
        along += grad * (value - center[None, :])
    return tl.sum(plain, 0), tl.sum(along, 0) * spread


@triton.jit
def _sweep_input_gradient(
    grad_output, x, grad_skip, grad_input, start, first, end, channel, exists,
    center, spread, scale, shift, plain, along, C, P,
    BP: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Writes the input's gradient, from the last tile to the first.

    plain, along: rstd times the group's mean of the gradient by the normalised x, and of its
        product with that.
    """
    along = along * spread
    tiles = tl.cdiv(end - first, BP)
    for i in range(0, tiles):
        pixel = first + (tiles - 1 - i) * BP + tl.arange(0, BP)
        inside = (pixel < end)[:, None] & exists[None, :]
        offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
        value = _load(x, offsets, inside)
        grad = _load_gradient(grad_output, value, offsets, inside, center, scale, shift, RELU)
        result = grad * scale[None, :] - plain[None, :]
        result -= (value - center[None, :]) * along[None, :]
        if grad_skip is not None:
            result += _load(grad_skip, offsets, inside)
        tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


# ---- held: a program has all pixels of some groups in its registers


@triton.jit
def _groups_of_program(
    blocks, C, P, num_groups, D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr
):
    """n, where its sample starts, and the channels of the groups."""
    n = tl.program_id(0) // blocks
    first_group = tl.program_id(0) % blocks * BG
    channel, exists = _channels_of(first_group, D, D2, BG, num_groups)
    return n, n.to(tl.int64) * C * P, channel, exists


@triton.jit
def forward_held_kernel(
    x, weight, bias, y, mean, rstd, C, P, num_groups, count, eps, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists = _groups_of_program(blocks, C, P, num_groups, D, D2, BG)
    pixel = tl.arange(0, BP)
    inside = (pixel < P)[:, None] & exists[None, :]
    offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    value = _load(x, offsets, inside)

    center = _sum_of_groups(tl.sum(value, 0), D2, BG) / count
    deviation = tl.where(inside, value - center[None, :], 0.0)
    variance = _sum_of_groups(tl.sum(deviation * deviation, 0), D2, BG) / count
    spread = 1.0 / tl.sqrt_rn(variance + eps)
    _store_statistics(mean, rstd, center, spread, n, channel, exists, num_groups, D)

    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    value = _normal(value, center, scale, shift)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_held_kernel(
    grad_output, x, mean, rstd, weight, bias, grad_skip, grad_input, sums, sums_normal,
    C, P, num_groups, count, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists = _groups_of_program(blocks, C, P, num_groups, D, D2, BG)
    pixel = tl.arange(0, BP)
    inside = (pixel < P)[:, None] & exists[None, :]
    offsets = start + _offsets(pixel, channel, C, P, CHANNELS_LAST, WIDE)
    center, spread, scale, shift = _statistics_of_groups(
        blocks, mean, rstd, weight, bias, n, channel, exists, num_groups, D, D2, BG
    )
    value = _load(x, offsets, inside)
    grad = _load_gradient(grad_output, value, offsets, inside, center, scale, shift, RELU)
    normal = (value - center[None, :]) * spread[None, :]
    plain, along = tl.sum(grad, 0), tl.sum(grad * normal, 0)
    tl.store(sums + n.to(tl.int64) * C + channel, plain, mask=exists)
    tl.store(sums_normal + n.to(tl.int64) * C + channel, along, mask=exists)

    plain = _sum_of_groups(plain * scale, D2, BG) / count
    along = _sum_of_groups(along * scale, D2, BG) / count
    result = grad * scale[None, :] - plain[None, :] - normal * along[None, :]
    if grad_skip is not None:
        result += _load(grad_skip, offsets, inside)
    tl.store(grad_input + offsets, result.to(grad_input.dtype.element_ty), mask=inside)


# ---- swept: a program goes over all pixels of some groups twice


@triton.jit
def forward_swept_kernel(
    x, weight, bias, y, mean, rstd, C, P, num_groups, count, eps, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists = _groups_of_program(blocks, C, P, num_groups, D, D2, BG)
    center, square = _sweep_statistics(
        x, None, start, 0, P, channel, exists, C, P, BP, BG * D2, CHANNELS_LAST, WIDE
    )
    mean_of_channel = tl.where(exists, center, 0.0)
    center = _sum_of_groups(mean_of_channel, D2, BG) * (P / count)
    apart = tl.where(exists, mean_of_channel - center, 0.0)
    variance = _sum_of_groups(square + apart * apart * P, D2, BG) / count
    spread = 1.0 / tl.sqrt_rn(variance + eps)
    _store_statistics(mean, rstd, center, spread, n, channel, exists, num_groups, D)

    scale, shift = _scale_and_shift(weight, bias, spread, channel, exists)
    _sweep_result(
        x, y, start, 0, P, channel, exists, center, scale, shift, C, P,
        BP, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip


@triton.jit
def backward_swept_kernel(
    grad_output, x, mean, rstd, weight, bias, grad_skip, grad_input, sums, sums_normal,
    C, P, num_groups, count, blocks,
    D: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists = _groups_of_program(blocks, C, P, num_groups, D, D2, BG)
    center, spread, scale, shift = _statistics_of_groups(
        blocks, mean, rstd, weight, bias, n, channel, exists, num_groups, D, D2, BG
    )
    plain, along = _sweep_gradients(
        grad_output, x, start, 0, P, channel, exists, center, spread, scale, shift, C, P,
        BP, BG * D2, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip
    tl.store(sums + n.to(tl.int64) * C + channel, plain, mask=exists)
    tl.store(sums_normal + n.to(tl.int64) * C + channel, along, mask=exists)
    plain = _sum_of_groups(plain * scale, D2, BG) / count
    along = _sum_of_groups(along * scale, D2, BG) / count
    _sweep_input_gradient(
        grad_output, x, grad_skip, grad_input, start, 0, P, channel, exists,
        center, spread, scale, shift, plain, along, C, P, BP, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip


# ---- split: pixels among programs; partial sums (N, splits, C) are combined, then applied


@triton.jit
def _part_of_program(splits, C, P, rows, BC: tl.constexpr):
    """n, where its sample starts, channels, and where the pixels begin and end."""
    n = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * rows
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    return n, n.to(tl.int64) * C * P, channel, channel < C, first, tl.minimum(first + rows, P)


@triton.jit
def statistics_kernel(
    x, other, means, squares, C, P, splits, rows,
    BP: tl.constexpr, BC: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists, first, end = _part_of_program(splits, C, P, rows, BC)
    mean, square = _sweep_statistics(
        x, other, start, first, end, channel, exists, C, P, BP, BC, CHANNELS_LAST, WIDE
    )
    place = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(means + place, mean, mask=exists)
    tl.store(squares + place, square, mask=exists)


@triton.jit
def combine_statistics_kernel(
    means, squares, mean, rstd, C, P, num_groups, splits, rows, count, eps,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Chan's combination of all splits and channels of a group."""
    n = tl.program_id(0) // num_groups
    start = n.to(tl.int64) * splits * C + tl.program_id(0) % num_groups * D
    total = tl.zeros((BS, BD), tl.float32)
    for first in range(0, D, BD):
        for at in range(0, splits, BS):
            offsets, inside, pixels = _partials(first, at, splits, C, P, rows, D, BS, BD)
            total += _load(means + start, offsets, inside) * pixels[:, None]
    center = tl.sum(tl.sum(total, 1), 0) / count
    total = tl.zeros((BS, BD), tl.float32)
    for first in range(0, D, BD):
        for at in range(0, splits, BS):
            offsets, inside, pixels = _partials(first, at, splits, C, P, rows, D, BS, BD)
            apart = _load(means + start, offsets, inside) - center
            square = _load(squares + start, offsets, inside)
            total += tl.where(inside, square + apart * apart * pixels[:, None], 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / count
    tl.store(mean + tl.program_id(0), center)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _partials(
    first, at, splits, C, P, rows, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A tile of one group's partial sums: offsets, which exist, and the pixels of each split."""
    split, channel = at + tl.arange(0, BS), first + tl.arange(0, BD)
    inside = (split < splits)[:, None] & (channel < D)[None, :]
    pixels = tl.minimum(rows, P - split * rows).to(tl.float32)
    return split[:, None] * C + channel[None, :], inside, pixels


@triton.jit
def apply_kernel(
    x, mean, rstd, weight, bias, y, C, P, num_groups, splits, rows,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists, first, end = _part_of_program(splits, C, P, rows, BC)
    center, _, scale, shift = _statistics_of(
        mean, rstd, weight, bias, n, channel, exists, num_groups, D
    )
    _sweep_result(
        x, y, start, first, end, channel, exists, center, scale, shift, C, P,
        BP, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip


@triton.jit
def gradient_sums_kernel(
    grad_output, x, mean, rstd, weight, bias, sums, sums_normal, C, P, num_groups, splits, rows,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists, first, end = _part_of_program(splits, C, P, rows, BC)
    center, spread, scale, shift = _statistics_of(
        mean, rstd, weight, bias, n, channel, exists, num_groups, D
    )
    plain, along = _sweep_gradients(
        grad_output, x, start, first, end, channel, exists, center, spread, scale, shift, C, P,
        BP, BC, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(sums + place, plain, mask=exists)
    tl.store(sums_normal + place, along, mask=exists)


@triton.jit
def combine_gradient_sums_kernel(
    parts, parts_normal, weight, sums, sums_normal, group_mean, group_mean_normal,
    C, num_groups, splits, count,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of each channel over the splits, and means over the group of the gradient by the
    normalised x and of its product with that."""
    n = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    start = n.to(tl.int64) * splits * C + group * D
    group_plain = tl.zeros((BD,), tl.float32)
    group_along = tl.zeros((BD,), tl.float32)
    for first in range(0, D, BD):
        plain = tl.zeros((BS, BD), tl.float32)
        along = tl.zeros((BS, BD), tl.float32)
        for at in range(0, splits, BS):
            offsets, inside, _ = _partials(first, at, splits, C, 0, 0, D, BS, BD)
            plain += _load(parts + start, offsets, inside)
            along += _load(parts_normal + start, offsets, inside)
        channel_plain, channel_along = tl.sum(plain, 0), tl.sum(along, 0)
        channel = first + tl.arange(0, BD)
        exists = channel < D
        place = n.to(tl.int64) * C + group * D + channel
        tl.store(sums + place, channel_plain, mask=exists)
        tl.store(sums_normal + place, channel_along, mask=exists)
        if weight is not None:
            gamma = _load(weight + group * D, channel, exists)
            channel_plain *= gamma
            channel_along *= gamma
        group_plain += channel_plain
        group_along += channel_along
    tl.store(group_mean + tl.program_id(0), tl.sum(group_plain, 0) / count)
    tl.store(group_mean_normal + tl.program_id(0), tl.sum(group_along, 0) / count)


@triton.jit
def input_gradient_kernel(
    grad_output, x, mean, rstd, weight, bias, group_mean, group_mean_normal, grad_skip, grad_input,
    C, P, num_groups, splits, rows,
    D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, start, channel, exists, first, end = _part_of_program(splits, C, P, rows, BC)
    center, spread, scale, shift = _statistics_of(
        mean, rstd, weight, bias, n, channel, exists, num_groups, D
    )
    statistic = n.to(tl.int64) * num_groups + channel // D
    plain = _load(group_mean, statistic, exists) * spread
    along = _load(group_mean_normal, statistic, exists) * spread
    _sweep_input_gradient(
        grad_output, x, grad_skip, grad_input, start, first, end, channel, exists,
        center, spread, scale, shift, plain, along, C, P, BP, CHANNELS_LAST, WIDE, RELU,
    )  # fmt: skip


# ---- however it was done


@triton.jit
def parameter_gradients_kernel(
    sums, sums_normal, grad_weight, grad_bias, N, C, BN: tl.constexpr, BC: tl.constexpr
):
    """The sums of all samples for each channel."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < C
    plain = tl.zeros((BN, BC), tl.float32)
    along = tl.zeros((BN, BC), tl.float32)
    for at in range(0, N, BN):
        n = at + tl.arange(0, BN)
        inside = (n < N)[:, None] & exists[None, :]
        offsets = n.to(tl.int64)[:, None] * C + channel[None, :]
        plain += _load(sums, offsets, inside)
        along += _load(sums_normal, offsets, inside)
    tl.store(grad_bias + channel, tl.sum(plain, 0), mask=exists)
    tl.store(grad_weight + channel, tl.sum(along, 0), mask=exists)
