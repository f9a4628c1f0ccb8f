"""group_norm_relu's CUDA kernels, on the host, against plain float64 code; how they cut tensors."""

import ctypes
import mmap
import random

import pytest
import torch
from checking import assert_as_good, to_float64, with_gradients
from on_host import (
    AMPERE,
    ELEMENTS,
    HOPPER,
    ChannelVector,
    GroupNormForward,
    GroupNormShape,
)

from bit_kernels import reference
from bit_kernels.ops import _cuda

DTYPES = list(ELEMENTS)
NAMES = ["output", "grad_input", "grad_weight", "grad_bias"]

# (shape, groups): why it is here.
SAMPLES = {
    "round": ((2, 64, 6, 8), 32),
    "odd": ((3, 6, 7, 5), 3),  # no vectors
    "one_channel_groups": ((2, 5, 3, 9), 5),
    "one_group": ((2, 7, 11, 3), 1),
    "one_pixel": ((4, 64, 1, 1), 32),
    "groups_across_vectors": ((2, 24, 5, 3), 8),  # 3 channels
    "groups_of_several_vectors": ((1, 160, 3, 5), 2),
    "more_vectors_than_threads": ((1, 4096, 2, 2), 1),  # in a row of float32
    "more_channels_than_threads": ((1, 1055, 2, 2), 1),  # and no vectors
    "rows_that_no_warp_divides": ((2, 96, 9, 5), 4),  # 6 or 12 vectors
}


def make(shape, groups, dtype, affine=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2
    x = (x + torch.randn(shape[1], generator=generator).view(-1, 1, 1)).to(dtype)
    inputs = [x]
    if affine:
        inputs += [torch.randn(shape[1], generator=generator).to(dtype) for _ in range(2)]
    grad = torch.randn(shape, generator=generator).to(dtype)
    # Where the ReLU's input is next to zero, rounding decides the mask: no gradient comes in there.
    linear = reference.group_norm_relu(
        *to_float64([x]), groups, *to_float64(inputs[1:]), relu=False
    )
    grad[linear.abs() < 1e-2] = 0
    return inputs, grad


def both_ways(kernels, inputs, grad, groups, relu=True, skip=None, offset=0):
    """Output and the gradients of the inputs that are there."""
    x, w, b = (*inputs, None, None)[:3]
    y, mean, rstd = kernels.forward(x, groups, w, b, relu=relu, offset=offset)
    dx, dw, db = kernels.backward(grad, x, mean, rstd, w, b, relu=relu, skip=skip, offset=offset)
    results = [y, dx]
    results += [dw.to(w.dtype)] if w is not None else []
    return results + ([db.to(b.dtype)] if b is not None else [])


def check(kernels, inputs, grad, groups, relu=True, offset=0):
    def unfused(x, w=None, b=None):
        return reference.group_norm_relu(x, groups, w, b, relu=relu)

    ours = both_ways(kernels, inputs, grad, groups, relu, offset=offset)
    theirs = with_gradients(unfused, inputs, grad)
    truth = with_gradients(unfused, to_float64(inputs), grad)
    assert_as_good(NAMES[: len(ours)], ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype, group_norm):
    shape, groups = SAMPLES[sample]
    inputs, grad = make(shape, groups, dtype)
    check(group_norm, inputs, grad, groups)
    check(group_norm, inputs, grad, groups, relu=False)


def shrink_until(kernels, blocks, *shape_and_type, backward=False, **device):
    """A device whose blocks have so little shared memory that a slice takes so many of them."""
    while True:
        kernels.reset(**device)
        cut = kernels.cut(*shape_and_type, backward)
        if cut.cluster == blocks:
            return cut
        device["per_block"] = cut.shared - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_clusters(blocks, dtype, group_norm):
    """A slice that takes so many blocks, of which the last has fewer rows."""
    shape, groups = (2, 16, 29, 33), 1
    for backward in (False, True):
        device = dict(multiprocessors=1, per_multiprocessor=1 << 20)  # one block is as good as two
        shrink_until(group_norm, blocks, 2, 29 * 33, 16, groups, dtype, backward=backward, **device)
        inputs, grad = make(shape, groups, dtype)
        if backward:
            check(group_norm, inputs, grad, groups)
        else:
            group_norm.forward(inputs[0], groups)
        assert group_norm.launches()[0]["cluster"] == blocks


def test_blocks_of_a_cluster_without_rows(group_norm):
    cut = shrink_until(group_norm, 8, 1, 9, 512, 1, torch.float32)
    assert cut.cluster * cut.rows >= 9 + 2 * cut.rows
    (x, w, b), _ = make((1, 512, 3, 3), 1, torch.float32)
    y, mean, rstd = group_norm.forward(x, 1, w, b)
    truth = reference.group_norm_relu(x.double(), 1, w.double(), b.double())
    assert (y.double() - truth).abs().max() < 1e-5
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    group_norm.reset()
    expected = group_norm.backward(grad, x, mean, rstd, w, b)
    shrink_until(group_norm, 8, 1, 9, 512, 1, torch.float32, backward=True)
    ours = group_norm.backward(grad, x, mean, rstd, w, b)
    for a, c in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def test_without_clusters(group_norm):
    group_norm.reset(**AMPERE)
    inputs, grad = make((2, 32, 15, 14), 4, torch.bfloat16)
    check(group_norm, inputs, grad, 4)
    assert group_norm.launches()[0]["cluster"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(dtype, group_norm):
    """Tensors that begin between two vectors."""
    inputs, grad = make((2, 64, 5, 5), 8, dtype)
    check(group_norm, inputs, grad, 8, offset=1)


@pytest.mark.parametrize("present", ["neither", "weight", "bias"])
def test_absent_parameters(present, group_norm):
    (x, w, b), grad = make((2, 12, 5, 4), 4, torch.float32)
    w, b = w if present == "weight" else None, b if present == "bias" else None
    linear = reference.group_norm_relu(*to_float64([x]), 4, *to_float64([w, b]), relu=False)
    grad[linear.abs() < 1e-2] = 0
    y, mean, rstd = group_norm.forward(x, 4, w, b)
    ours = [y, *group_norm.backward(grad, x, mean, rstd, w, b)]

    def unfused(x, w, b):
        return reference.group_norm_relu(x, 4, w, b)

    names = ["output", "grad_input"] + ([f"grad_{present}"] if present != "neither" else [])
    ours = ours[:2] + ([ours[2]] if w is not None else []) + ([ours[3]] if b is not None else [])
    theirs = with_gradients(unfused, [x, w, b], grad)
    assert_as_good(names, ours, theirs, with_gradients(unfused, to_float64([x, w, b]), grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype, group_norm):
    (x, w, b), grad = make((2, 32, 5, 5), 8, dtype)
    check(group_norm, [x, w.float(), b.float()], grad, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_skip_gradient(dtype, group_norm):
    (x, w, b), grad = make((2, 48, 7, 3), 6, dtype)
    _, mean, rstd = group_norm.forward(x, 6, w, b)
    groups = x.double().reshape(2, 6, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-5, atol=1e-6)
    expected = (groups.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)
    skip = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with_skip = group_norm.backward(grad, x, mean, rstd, w, b, skip=skip)
    without = group_norm.backward(grad, x, mean, rstd, w, b)
    total = without[0].double() + skip.double()
    rounding = torch.finfo(dtype).eps * total.abs().max()
    assert (with_skip[0].double() - total).abs().max() <= rounding
    assert torch.equal(with_skip[1], without[1]) and torch.equal(with_skip[2], without[2])


def test_mean_far_from_zero(group_norm):
    """E[x^2] - E[x]^2 in float32 would lose every digit of the variance here."""
    x = torch.randn(2, 8, 40, 40, generator=torch.Generator().manual_seed(0)) + 1000
    group_norm.reset(per_block=30000)
    truth = reference.group_norm_relu(x.double(), 4)
    assert (group_norm.forward(x, 4)[0].double() - truth).abs().max() < 2e-4


def test_nan_stays(group_norm):
    x = torch.randn(1, 8, 4, 4)
    x[0, 5, 1, 2] = torch.nan
    y, mean, _ = group_norm.forward(x, 2)
    assert y[0, 4:].isnan().all() and y[0, :4].isfinite().all() and mean[0, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_any_order_of_threads(dtype, group_norm):
    """Which is how a barrier that is missing would show, too."""
    group_norm.reset(per_block=30000, multiprocessors=1)
    inputs, grad = make((2, 24, 33, 31), 4, dtype)
    expected = both_ways(group_norm, inputs, grad, 4)
    assert group_norm.launches()[0]["cluster"] > 1
    for order in (1, 2, 3):
        group_norm.library.shim_order(order)
        for name, a, b in zip(NAMES, both_ways(group_norm, inputs, grad, 4), expected):
            assert torch.equal(a, b), name


def test_more_elements_than_32_bits_count(group_norm):
    """The last slice of a tensor that is nearly all unused address space."""
    samples, pixels, channels, groups = 11_200, 3000, 64, 32
    elements = samples * pixels * channels
    assert elements > 2**31
    x, y = (_zeros(elements) for _ in range(2))
    last = torch.randn(pixels, channels, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[-last.numel() :] = last.flatten()
    mean, rstd = (torch.full((samples, groups), torch.nan) for _ in range(2))
    cut = group_norm.cut(samples, pixels, channels, groups, torch.bfloat16)
    slices = channels // cut.channels
    group_norm.library.shim_first_cluster((samples - 1) * slices)
    arguments = GroupNormForward(
        GroupNormShape(samples, pixels, channels, groups, ELEMENTS[torch.bfloat16]),
        x.data_ptr(),
        ChannelVector(None, False),
        ChannelVector(None, False),
        1e-5,
        True,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    group_norm.call("bit_kernels_group_norm_relu", ctypes.byref(arguments), 0, None)
    ours = y[-last.numel() :].view(pixels, channels)
    truth = reference.group_norm_relu(last.double().T[None], groups)[0].T
    assert (ours.double() - truth).abs().max() < 0.02
    assert mean[:-1].isnan().all() and mean[-1].isfinite().all()


def _zeros(elements: int) -> torch.Tensor:
    """bfloat16 zeros whose memory is only there where it is touched."""
    no_reserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)


@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["hopper", "ampere"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refusal_knows_what_can_be_cut(device, dtype, group_norm):
    """bit_kernels.ops._cuda says beforehand what the launch would say."""
    group_norm.reset(**device)
    capability = (device["major"], 0)
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        groups = chance.choice([1, 2, 3, 8, 32])
        channels = groups * chance.choice([1, 2, 3, 4, 5, 8, 16, 64])
        pixels = int(1.5 ** chance.uniform(0, 32))
        backward = chance.random() < 0.5
        x = torch.empty(2, pixels, 1, channels, dtype=dtype, device="meta").movedim(-1, 1)
        said = _cuda.group_norm_relu_refusal(x, groups, capability, backward=backward)
        try:
            cut = group_norm.cut(2, pixels, channels, groups, dtype, backward)
        except RuntimeError as error:
            assert said is not None and "KiB of shared memory" in said, (error, said)
            assert str(error).split(" takes ")[0] == said.split(" takes ")[0]
            refused += 1
        else:
            assert said is None, (said, pixels, channels, groups)
            assert cut.shared <= device["per_block"] and channels % cut.channels == 0
            assert cut.rows * cut.cluster >= pixels
    assert 30 < refused < 270


def test_code_for_devices_without_clusters_uses_none_on_hopper(group_norm):
    """There every block of a cluster would take itself for the only one."""
    large = 4, 28 * 28, 512, 32, torch.float32, True
    group_norm.reset(**HOPPER)
    assert group_norm.cut(*large).cluster > 1
    group_norm.reset(**HOPPER | {"ptx": 80})
    assert group_norm.cut(*large).cluster == 1


def test_refusals():
    x = torch.empty(2, 64, 8, 8, device="meta").to(memory_format=torch.channels_last)

    def refusal(x, capability=(9, 0)):
        return _cuda.group_norm_relu_refusal(x, 32, capability, backward=True)

    assert refusal(x) is None and refusal(x.half()) is None
    assert "channels_last" in refusal(x.contiguous())
    assert "not torch.float64" in refusal(x.double())
    assert "capability 7.5" in refusal(x, (7, 5))
    assert refusal(torch.empty(2, 64, device="meta")) is None
    assert refusal(x[:0]) is None


# The shapes of R50x1 at 224 px: pixels and channels.
R50X1 = [(112 * 112, 64), (56 * 56, 64), (56 * 56, 256), (28 * 28, 128), (28 * 28, 512)]
R50X1 += [(14 * 14, 256), (14 * 14, 1024), (7 * 7, 512), (7 * 7, 2048)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_cuts_of_a_network(backward, group_norm):
    """On Hopper two blocks share a multiprocessor, so that one computes while the other copies; all
    accesses are 128 bits wide, and no more than half of what is read in one go is another block's."""
    for pixels, channels in R50X1:
        for samples in (32, 256):
            cut = group_norm.cut(samples, pixels, channels, 32, torch.bfloat16, backward)
            assert 2 * (cut.shared + 1024) <= HOPPER["per_multiprocessor"], (pixels, channels)
            assert cut.vector * 2 == 16 and cut.channels * 2 >= 32
            assert cut.blocks >= HOPPER["multiprocessors"]
