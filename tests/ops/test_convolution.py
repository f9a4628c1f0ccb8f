"""The backward of a convolution against PyTorch's in float64."""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
from checking import DTYPES, LAYOUTS, assert_as_good, of_the_cpu

from bit_kernels import _library, reference
from bit_kernels.functional import Conv, Norm, norm_relu_conv
from bit_kernels.ops._convolution import convolution_backward, plain

pytestmark = of_the_cpu  # on GPUs it is cuDNN's


def _has_products() -> bool:
    return _library.native is not None and _library.native.isa() != "avx512"


IN_PARTS = "patches of 17 MB, in two parts"
# (input, C_out, kernel, stride, padding, dilation, groups): a reason each.
SAMPLES = {
    "pointwise": ((2, 5, 6, 7), 4, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise with strides": ((2, 5, 6, 7), 4, (1, 1), (2, 3), (0, 0), (1, 1), 1),
    "pointwise over a border": ((2, 5, 6, 7), 4, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    "3x3": ((2, 5, 6, 7), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strides that leave a rest": ((2, 5, 8, 9), 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "nothing is symmetric": ((3, 4, 9, 6), 6, (5, 2), (1, 2), (3, 0), (1, 2), 1),
    "dilated past the border": ((1, 3, 5, 5), 2, (3, 3), (1, 1), (3, 3), (3, 3), 1),
    "kernel as large as the input": ((2, 3, 4, 5), 2, (4, 5), (1, 1), (0, 0), (1, 1), 1),
    "groups": ((2, 6, 6, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "one channel": ((2, 1, 6, 5), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one pixel": ((3, 7, 1, 1), 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    IN_PARTS: ((1, 768, 10, 64), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def make(sample, dtype, layout="channels_last"):
    shape, out, kernel, *geometry = SAMPLES[sample]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    w = torch.randn(out, shape[1] // geometry[-1], *kernel, generator=generator)
    y = torch.nn.functional.conv2d(x, w, None, *geometry)
    g = torch.randn(y.shape, generator=generator)
    return [LAYOUTS[layout](t.to(dtype)) for t in (g, x, w)], geometry


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample != IN_PARTS])
def test_as_good_as_pytorch(sample, dtype, layout):
    tensors, geometry = make(sample, dtype, layout)
    ours = convolution_backward(*tensors, *geometry, [1, 1, 0])
    unfused = plain(*tensors, *geometry, [1, 1, 0])
    truth = plain(*(t.double() for t in tensors), *geometry, [1, 1, 0])
    assert_as_good(("input", "weight"), ours, unfused, truth)


def test_in_parts():
    """As good as one matrix product: over long sums convolutions may be better, by more sums."""
    (g, x, w), geometry = make(IN_PARTS, torch.float32)
    (ours,) = convolution_backward(g, x, w, *geometry, [0, 1, 0])

    def product(g, x):
        patches = torch.nn.functional.unfold(x, (3, 3), padding=(1, 1))
        return torch.einsum("nop,nkp->ok", g.flatten(2), patches).view(w.shape)

    assert_as_good(["weight"], [ours], [product(g, x)], [product(g.double(), x.double())])


@pytest.mark.parametrize("needs", list(itertools.product((0, 1), repeat=3)))
def test_what_is_needed_comes(needs):
    tensors, geometry = make("3x3", torch.float32)
    ours = convolution_backward(*tensors, *geometry, needs)
    truth = plain(*(t.double() for t in tensors), *geometry, needs)
    assert len(ours) == sum(needs)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", ["pointwise", "pointwise with strides", "3x3"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_lies_as_its_weight(sample, layout):
    """Else autograd would copy it on its way into `grad`."""
    if not _has_products():
        pytest.skip("PyTorch's own lies as it likes")
    (g, x, w), geometry = make(sample, torch.float32)
    w = LAYOUTS[layout](w)
    (ours,) = convolution_backward(g, x, w, *geometry, [0, 1, 0])
    assert ours.stride() == w.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
@pytest.mark.parametrize(
    "out, kernel, stride, dilation", [(6, 1, 1, 1), (6, 1, 2, 1), (3, 3, 1, 1), (3, 3, 2, 2)]
)
def test_few_positions_forward_and_back(out, kernel, stride, dilation, layout):
    """The forward has no op of its own: it is norm_relu_conv's."""
    generator = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 512, 6, 5, generator=generator))
    w = LAYOUTS[layout](torch.randn(out, 512, kernel, kernel, generator=generator) * 0.05)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        geometry = (stride, stride), (kernel // 2, kernel // 2), (dilation, dilation)
        (y,) = function(leaves[0], Norm(32), [Conv(leaves[1], None, *geometry, eps=None)])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    ours = run(functools.partial(norm_relu_conv, backend="cpp"), torch.float32)
    unfused = run(reference.norm_relu_conv, torch.float32)
    truth = run(reference.norm_relu_conv, torch.float64)
    assert_as_good(("output", "input", "weight"), ours, unfused, truth)
    assert ours[0].stride() == unfused[0].stride() or layout == "channels_last_slice"


@pytest.mark.parametrize("sample", ["pointwise", "3x3", IN_PARTS])
def test_views_into_larger_memory(sample):
    """Dense, but not at the beginning of their storage: as torch.cat's backward hands them out."""
    tensors, geometry = make(sample, torch.float32)

    def behind(tensor):
        larger = torch.cat([torch.full_like(tensor, float("nan")), tensor])
        return larger.contiguous(memory_format=torch.channels_last)[len(tensor) :]

    expected = convolution_backward(*tensors, *geometry, [1, 1, 0])
    ours = convolution_backward(*map(behind, tensors), *geometry, [1, 1, 0])
    for mine, same in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, same)
    _, x, w = tensors
    convs = [Conv(weight, None, *map(tuple, geometry[:3]), eps=None) for weight in (w, behind(w))]
    (a,), (b,) = (norm_relu_conv(x, Norm(1), [conv], backend="cpp") for conv in convs)
    torch.testing.assert_close(a, b)


def test_empty():
    tensors = torch.ones(0, 4, 6, 6), torch.ones(0, 5, 6, 6), torch.ones(4, 5, 1, 1)
    (ours,) = convolution_backward(*tensors, [1, 1], [0, 0], [1, 1], 1, [0, 1, 0])
    assert torch.equal(ours, torch.zeros(4, 5, 1, 1))


def test_refusals():
    (g, x, w), geometry = make("3x3", torch.float32)
    with pytest.raises(RuntimeError, match="of input, weight and bias"):
        convolution_backward(g, x, w, *geometry, [1])
    with pytest.raises(RuntimeError, match="2-d"):
        convolution_backward(g[0], x[0], w, *geometry, [1, 1, 1])
    # Of which a product could be computed, and would be wrong.
    with pytest.raises(RuntimeError):
        convolution_backward(g[:, :3], x, w, *geometry, [0, 1, 0])
    with pytest.raises(RuntimeError):
        convolution_backward(g, x[:, :4], w, *geometry, [0, 1, 0])
    with pytest.raises(RuntimeError):
        convolution_backward(g, x, w, [0, 0], *geometry[1:], [0, 1, 0])
    wide = torch.ones(8, 16, 1, 1)
    for weight in (wide, wide[:, :4].contiguous()):
        with pytest.raises(ValueError, match="with 8 channels in 1 groups it must be"):
            norm_relu_conv(
                LAYOUTS["channels_last"](torch.ones(2, 8, 3, 3)), Norm(4), [Conv(weight)]
            )


def test_matrix_products_where_the_processor_would_do_without():
    """With AVX-512 all of the above ran PyTorch's own convolution."""
    if _has_products():
        pytest.skip("what is above ran them")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "BIT_KERNELS_ISA": "avx2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "1 skipped" in run.stdout  # this one
