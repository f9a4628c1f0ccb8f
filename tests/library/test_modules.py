"""The drop-ins take what torch's classes take, hold what they hold, and go where they go."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bit_kernels
from bit_kernels import reference

CONVOLUTIONS = [
    ((3, 8, 3), {}),
    ((4, 8, (3, 1), 2, 1, 1, 2, False, "reflect"), {}),
    ((4, 6, 3), dict(padding="same", dilation=2, padding_mode="circular", bias=True)),
    ((2, 4, 1), dict(dtype=torch.float64)),
]


@pytest.mark.parametrize("args, kwargs", CONVOLUTIONS, ids=str)
def test_std_conv2d_is_conv2d_on_standardized_weights(args, kwargs):
    ours, plain = bit_kernels.StdConv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, args[0], 9, 8, dtype=ours.weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(reference.standardize_weight(plain.weight))
    assert torch.allclose(ours(x), plain(x), atol=1e-5)
    ours.load_state_dict(nn.Conv2d(*args, **kwargs).state_dict())


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kwargs", [{}, dict(eps=1e-3), dict(affine=False)], ids=str)
def test_group_norm_is_group_norm(kwargs, activation):
    ours = bit_kernels.GroupNorm(4, 8, activation=activation, **kwargs)
    plain = nn.GroupNorm(4, 8, **kwargs)
    if ours.affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 5, 4)
    expected = plain(x).relu() if activation else plain(x)
    assert torch.allclose(ours(x), expected, atol=1e-5)
    ours.load_state_dict(nn.GroupNorm(4, 8, **kwargs).state_dict())


def test_repr_tells_what_is_ours():
    assert "eps=1e-10" in repr(bit_kernels.StdConv2d(3, 4, 3))
    assert "activation='relu'" in repr(bit_kernels.GroupNorm(2, 4, activation="relu"))
    assert "kernel_size=(3, 3)" in repr(bit_kernels.StdConv2d(3, 4, 3))


def network():
    return nn.Sequential(
        bit_kernels.StdConv2d(3, 8, 3, padding=1, bias=False),
        bit_kernels.GroupNorm(4, 8, activation="relu"),
        bit_kernels.StdConv2d(8, 4, 1),
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model, x = network(), torch.randn(2, 3, 6, 6)
    assert torch.equal(copied(model)(x), model(x))


def test_device_and_dtype():
    conv = bit_kernels.StdConv2d(3, 4, 3, device="meta", dtype=torch.bfloat16)
    norm = bit_kernels.GroupNorm(2, 4, device="meta", dtype=torch.bfloat16)
    assert conv.weight.is_meta and norm.weight.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="without a fused kernel"):
        assert norm(conv(torch.empty(1, 3, 5, 5, device="meta", dtype=torch.bfloat16))).is_meta


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'gelu'; it may be None or 'relu'"):
        bit_kernels.GroupNorm(2, 4, activation="gelu")


def test_wrong_channel_count():
    with pytest.raises(ValueError, match=r"weight has shape \(8,\); with this input it must be"):
        bit_kernels.GroupNorm(4, 8)(torch.randn(1, 16, 2, 2))
    with pytest.raises(RuntimeError, match="channels"):
        bit_kernels.StdConv2d(3, 8, 3)(torch.randn(1, 4, 5, 5))


def test_compiles_and_exports():
    model, x = network(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    expected_gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    gradients = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"input": {0: batch}})
    more = torch.randn(5, 3, 6, 6)
    assert torch.allclose(program.module()(more), model(more), atol=1e-5)


def test_autocast_keeps_half_activations_and_float32_parameters():
    model = network().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    wide = model(x)
    assert (y.float() - wide).abs().max() < 0.05 * wide.abs().max()


def test_double_precision_gradients():
    model = network().double()
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))


def test_torch_func_sees_through():
    model, x = network(), torch.randn(4, 3, 6, 6)
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model.zero_grad()
    sum(loss(parameters, sample) for sample in x).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(per_sample[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)


def test_a_forward_replaced_on_the_object_is_called():
    norm = bit_kernels.GroupNorm(2, 4, activation="relu")
    conv = bit_kernels.StdConv2d(4, 3, 1)
    conv.forward = lambda x: x.new_zeros(())
    (y,) = bit_kernels.norm_relu_conv(torch.randn(1, 4, 5, 5), norm, conv)
    assert y.shape == ()
