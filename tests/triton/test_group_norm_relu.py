"""group_norm_relu's three ways on a GPU, each over the same shapes, whatever the size would choose."""

import pytest
import torch
from checking import BACKEND, DEVICE, DTYPES, LAYOUTS, assert_as_good, to_float64

from bit_kernels import reference

if BACKEND != "triton":
    pytest.skip(
        "Triton's kernels run under BIT_KERNELS_INTERPRET=1 or on a GPU", allow_module_level=True
    )

from bit_kernels.triton import group_norm_relu as gpu

# (shape, groups): why it is here.
SAMPLES = {
    "round": ((2, 64, 8, 8), 32),
    "odd": ((3, 6, 7, 5), 3),
    "padded_groups": ((2, 20, 5, 5), 4),  # groups of 5 channels, in places for 8
    "wide_groups": ((1, 96, 3, 3), 1),
    "one_pixel": ((4, 64, 1, 1), 32),
    "many_pixels": ((1, 4, 41, 43), 2),  # several tiles, the last not full
}
WAYS = {
    # way: (elements that may be held, multiprocessors)
    "held": (1 << 30, 1),
    "swept": (0, 0),
    "split": (0, 1 << 20),
    "split_once": (0, 1),  # where there is too little work to sweep, but one split is enough
}
KERNELS = {
    "held": "forward_held",
    "swept": "forward_swept",
    "split": "apply",
    "split_once": "apply",
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    held, multiprocessors = WAYS[request.param]
    for name in ("_HELD_FORWARD", "_HELD_BACKWARD"):
        monkeypatch.setattr(gpu, name, held)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: multiprocessors)
    if request.param == "split_once":
        monkeypatch.setattr(gpu._Shape, "swept", lambda self: None)
    return request.param


def make(shape, groups, dtype, layout):
    random = torch.Generator().manual_seed(0)
    x, grad, skip = (torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(3))
    w, b = (torch.randn(shape[1], generator=random).to(DEVICE) for _ in range(2))
    x = LAYOUTS[layout](x + 0.5)
    linear = reference.group_norm_relu(*[x.double(), groups, w.double(), b.double()], relu=False)
    grad[linear.abs() < 1e-2] = 0  # rounding decides the ReLU's mask there
    return x, grad, skip, w, b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_way_matches_reference(way, sample, layout, dtype):
    shape, groups = SAMPLES[sample]
    x, grad, skip, w, b = make(shape, groups, dtype, layout)
    output, mean, rstd = gpu.forward(x, groups, w, b, 1e-5, True)
    again = gpu.apply(x, mean, rstd, w, b, True)
    found = gpu.backward(grad, x, mean, rstd, w, b, True, skip)
    ours = [output, again, mean, rstd, *found]
    names = "output apply mean rstd grad_input grad_weight grad_bias".split()

    def plainly(x, grad, skip, w, b):
        x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = x.detach().to(wide).reshape(x.shape[0], groups, -1)
        var, mean = torch.var_mean(flat, 2, correction=0)
        y = reference.group_norm_relu(x, groups, w.to(x.dtype), b.to(x.dtype))
        of_x, of_w, of_b = torch.autograd.grad(y, (x, w, b), grad)
        y = y.detach()
        return [y, y, mean, (var + 1e-5).rsqrt(), of_x + skip, of_w.to(wide), of_b.to(wide)]

    assert_as_good(
        names, ours, plainly(x, grad, skip, w, b), plainly(*to_float64([x, grad, skip, w, b]))
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_way_is_taken(way, layout):
    """A change that sends every call another way must not go unnoticed."""
    from bit_kernels.triton._launch import recording

    x = LAYOUTS[layout](torch.empty(2, 64, 8, 8, device="meta"))
    with recording() as launches:
        gpu.forward(x, 32, None, None, 1e-5, True)
    assert launches[-1].kernel.__name__ == KERNELS[way] + "_kernel"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sum_with_statistics(way, layout):
    random = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(2, 12, 21, 23, generator=random).to(DEVICE, torch.float16) for _ in range(2)
    )
    x, expected = LAYOUTS[layout](a), a + b
    mean, rstd = gpu.add(x, b, 4, 1e-5)
    assert torch.equal(x, expected)
    flat = x.double().reshape(2, 4, -1)  # of the sum as it was rounded
    var, right = torch.var_mean(flat, 2, correction=0)
    assert (mean - right).abs().max() < 1e-6
    assert (rstd - (var + 1e-5).rsqrt()).abs().max() < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_far_from_zero(way, layout):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 24, 20, generator=random) + 1000
    x[:, :, 0, 0] = 0.0
    x = LAYOUTS[layout](x.to(DEVICE))
    output = gpu.forward(x, 4, None, None, 1e-5, False)[0]
    truth = reference.group_norm_relu(x.double(), 4, relu=False)
    assert (output.double() - truth).abs().max() < 1e-4


def test_same_bits_again(way):
    x, grad, skip, w, b = make((3, 6, 37, 5), 3, torch.float32, "channels_last")
    results = []
    for _ in range(2):
        output, mean, rstd = gpu.forward(x, 3, w, b, 1e-5, True)
        results.append([output, *gpu.backward(grad, x, mean, rstd, w, b, True, skip)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
