"""A frozen network: the live one's outputs, nothing to train, PyTorch's own operations to export."""

import copy

import pytest
import torch
from test_convert import BatchNormStdConv2d, BitStdConv2d, GroupNormAct, PreActivation, images
from torch import nn

import bit_kernels
from bit import checkpoint, models
from bit_kernels import freeze
from bit_kernels.modules import FrozenConv2d


def of_bit():
    return models.create("R14x0.125", num_classes=4, zero_head=False), images(2, 3, 40, 33)


def of_others():
    unit = PreActivation()
    strided = BatchNormStdConv2d(16, 8, 3, stride=2, same=True)
    model = nn.Sequential(BitStdConv2d(3, 8, 3), unit, strided, GroupNormAct(8, 4, nn.ReLU()))
    bit_kernels.convert(model)
    return model, images(2, 3, 12, 11)


def of_separate_relus():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    bit_kernels.convert(model)
    return model, images(2, 3, 12, 11)


NETWORKS = [of_bit, of_others, of_separate_relus]
networks = pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)


@networks
@pytest.mark.parametrize("inplace", [True, False])
def test_outputs_are_the_live_networks(network, inplace):
    torch.manual_seed(0)
    model, x = network()
    live = copy.deepcopy(model).eval()
    frozen = freeze(model, inplace=inplace)
    assert (frozen is model) == inplace
    with torch.no_grad():
        expected = live(x)
        assert torch.allclose(frozen(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(copy.deepcopy(frozen)(x), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(frozen(x), live(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        if not inplace:
            assert torch.equal(model.eval()(x), expected)
            assert all(p.requires_grad for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half, theirs = frozen(x), live(x)
    assert half.dtype == theirs.dtype
    assert (half - theirs).norm() < 0.03 * theirs.norm()


def test_weights_are_folded_once():
    model, _ = of_bit()
    live = copy.deepcopy(model)
    freeze(model)
    kernel = model.root.conv.weight.clone()
    assert torch.equal(
        kernel, bit_kernels.functional.standardize_weight(live.root.conv.weight, 1e-10).detach()
    )
    assert freeze(model) is model and freeze(model, inplace=False) is not model
    assert torch.equal(model.root.conv.weight, kernel)
    assert bit_kernels.convert(model).replaced == []
    assert isinstance(model.root.conv, nn.Conv2d) and isinstance(model.root.conv, FrozenConv2d)


def test_training_by_mistake():
    model, x = of_bit()
    model(x).sum().backward()
    freeze(model)
    assert not model.training and model.eval() is model
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="this network is frozen: its weights are standardized"):
        model.train()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(x).sum().backward()
    model.requires_grad_()
    with pytest.raises(RuntimeError, match="this network is frozen"):
        model(x)
    with torch.no_grad():
        model(x)


def test_a_head_on_frozen_features_and_an_inputs_gradient():
    model, x = of_bit()
    expected = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)[0]
    freeze(model).head.requires_grad_()
    loss = model(x).square().sum()
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0
    assert torch.allclose(x.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_of_frozen_and_live_networks_dont_mix(strict, tmp_path):
    live, x = of_bit()
    frozen = freeze(live, inplace=False)
    with pytest.raises(RuntimeError, match=r"root\.conv\.weight is a frozen network's"):
        live.load_state_dict(frozen.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"root\.conv\.weight is a live network's"):
        frozen.load_state_dict(live.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="model is frozen"):
        checkpoint.save(frozen, tmp_path / "frozen.safetensors")
    other = freeze(models.create("R14x0.125", num_classes=4))
    other.load_state_dict(frozen.state_dict(), strict=strict)
    assert torch.equal(other(x), frozen(x))


def test_refusals():
    with pytest.raises(ValueError, match=r"no StdConv2d or GroupNorm .* bit_kernels.convert"):
        freeze(PreActivation())

    class Derived(bit_kernels.StdConv2d):
        pass

    model = nn.Sequential(Derived(3, 8, 3), bit_kernels.GroupNorm(4, 8))
    with pytest.raises(ValueError, match="0 is a Derived, a class derived from"):
        freeze(model)
    assert model.training and type(model[1]) is bit_kernels.GroupNorm


@networks
def test_export_has_pytorchs_operations_alone(network):
    torch.manual_seed(0)
    model, x = network()
    live = torch.export.export(copy.deepcopy(model).eval(), (x,))
    assert "bit_kernels" in str(live.graph)  # what the test looks for
    freeze(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    name = "images" if network is of_bit else "input"
    program = torch.export.export(model, (x,), dynamic_shapes={name: {0: batch}})
    assert "bit_kernels" not in str(program.graph)
    more = images(5, *x.shape[1:])
    assert torch.allclose(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@networks
def test_onnx_runs_elsewhere(network, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = network()
    freeze(model)
    name = "images" if network is of_bit else "input"
    torch.onnx.export(
        model,
        (x,),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes={name: {0: torch.export.Dim("batch", min=1, max=64)}},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (input,) = session.get_inputs()
    for n in (2, 5):
        more = images(n, *x.shape[1:])
        (logits,) = session.run(None, {input.name: more.numpy()})
        expected = model(more)
        error = (torch.from_numpy(logits) - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()
