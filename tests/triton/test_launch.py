"""What kernels make of the process that they are called in, and of tensors that aren't plain ones."""

import numpy as np
import pytest
import torch
from checking import BACKEND, DEVICE

pytest.importorskip("triton")

from bit_kernels import functional, reference
from bit_kernels.functional import Conv, Norm
from bit_kernels.ops import _statistics
from bit_kernels.triton import norm_relu_conv as fused
from bit_kernels.triton import sgd, standardize_weight
from bit_kernels.triton._launch import launch

pytestmark = pytest.mark.skipif(
    BACKEND != "triton", reason="BIT_KERNELS_INTERPRET=1 or a GPU runs the kernels"
)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def another_default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def test_the_default_dtype_reaches_no_result(another_default_dtype):
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float32).to(DEVICE)

    x = (100 + draw(2, 8, 5, 5)).to(memory_format=torch.channels_last).requires_grad_()
    weight, gamma, beta = draw(6, 8, 3, 3).requires_grad_(), draw(8), draw(8)

    def results(x, weight, gamma, beta, fuse=False):
        norm, conv = Norm(4, gamma, beta), Conv(weight, None, padding=(1, 1))
        if fuse:
            with fused.insist_fused():
                (y,) = functional.norm_relu_conv(x, norm, [conv], next_norm=(2, 1e-5))
        elif x.dtype == torch.float64:
            (y,) = reference.norm_relu_conv(x, norm, [conv])
        else:
            (y,) = functional.norm_relu_conv(x, norm, [conv])
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    truth = results(*(t.detach().double().requires_grad_() for t in (x, weight, gamma, beta)))
    for fuse in (False, True):
        for ours, right in zip(results(x, weight, gamma, beta, fuse), truth, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - right).abs().max() < 1e-3 * right.abs().max()
    w, g = [weight.detach()], [draw(6, 8, 3, 3)]
    (standardized,), mean, rstd = standardize_weight.forward_many(w, 1e-10)
    norms = sgd.gradient_norms(w, g, 1e-10)
    assert {t.dtype for t in (standardized, mean, rstd, norms)} == {torch.float32}


def test_the_default_device_is_not_where_tables_are_made():
    weights = [torch.randn(3, 4, 3, 3, device=DEVICE)]
    images = np.zeros((2, 9, 9, 3), np.uint8)
    images = torch.from_numpy(images).to(DEVICE)
    with torch.device("meta"):
        outputs, *_ = standardize_weight.forward_many(weights, 1e-10)
        mixed = functional.mixup(images, [0.5, 1.0], [1, 0], crop=(8, 8))
    assert outputs[0].device == weights[0].device == mixed.device


def test_strided_parameters_are_read_as_they_are():
    x = torch.randn(2, 8, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    gamma, beta = torch.randn(2, 16, device=DEVICE)[:, ::2]
    weight, bias = torch.randn(6, 8, 1, 1, device=DEVICE), torch.randn(12, device=DEVICE)[::2]
    for gamma, beta in ((gamma, beta), (gamma[:1].expand(8), beta[:1].expand(8))):
        norm, conv = Norm(4, gamma, beta), Conv(weight, bias)
        (truth,) = reference.norm_relu_conv(x, norm, [conv])
        (separate,) = functional.norm_relu_conv(x, norm, [conv])
        with fused.insist_fused():
            (in_one,) = functional.norm_relu_conv(x, norm, [conv])
        assert (separate - truth).abs().max() < 1e-4 and (in_one - truth).abs().max() < 1e-4
        y = functional.group_norm_relu(x, 4, gamma, beta)
        assert (y - reference.group_norm_relu(x, 4, gamma, beta)).abs().max() < 1e-5


class Standing(torch.Tensor):
    """A tensor for others, as DTensor is: of a shape, and without memory."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=DEVICE)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise NotImplementedError(function)


def test_a_tensor_without_memory_is_refused():
    standing = Standing((3, 4, 1, 1))
    with pytest.raises(
        ValueError, match=r"a Standing of shape \(3, 4, 1, 1\) has no memory of its"
    ):
        launch(None, (1,), torch.zeros(1, device=DEVICE), standing)


def test_a_capture_takes_no_statistics_from_outside(monkeypatch):
    """A replay would go on with those of the tensor that lay there first."""
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    capturing = False
    monkeypatch.setattr(_statistics, "_in_capture", lambda tensor: capturing)
    _statistics.remember(x, 2, 1e-5, x.mean(), x.mean())
    assert _statistics.recall(x, 2, 1e-5) is not None
    capturing = True
    assert _statistics.recall(x, 2, 1e-5) is None
    _statistics.remember(x, 2, 1e-5, x.mean(), x.mean())
    assert _statistics.recall(x, 2, 1e-5) is not None
