"""Anybody's network on this package's layers: what is found, what is left, what stays the same."""

import copy
import gc
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bit_kernels
from benchmarks.timm_networks import torchvision_or_stand_ins
from bit_kernels import _recompute
from bit_kernels.modules import Conv2d, GroupNorm, StdConv2d

# Layers as others write them.


class BitStdConv2d(nn.Conv2d):
    """eps is in the forward alone, as in Big Transfer's release for PyTorch."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BatchNormStdConv2d(nn.Conv2d):
    """The batch norm trick, an eps of its own, and TensorFlow's padding where asked for."""

    def __init__(self, *args, eps=1e-8, same=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps, self.same = eps, same

    def forward(self, x):
        if self.same:
            pads = []
            for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
                total = max((-(-n // s) - 1) * s + k - n, 0)
                pads = [total // 2, total - total // 2, *pads]
            x = F.pad(x, pads)
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OutsideEpsConv2d(nn.Conv2d):
    """The unbiased deviation, and eps beside it: not what a kernel here computes."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.flatten(1).std(1).reshape(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / deviation, self.bias, self.stride, self.padding)


class ScaledStdConv2d(BatchNormStdConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain.flatten()[:, None, None]


class GroupNormAct(nn.GroupNorm):
    """Channels before groups, the activation in a module of any name, dropout between them."""

    def __init__(self, channels, groups, activation, drop=None):
        super().__init__(groups, channels)
        self.drop = drop or nn.Identity()
        self.activation = activation

    def forward(self, x):
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.activation(self.drop(x))


class WideGroupNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Failing(nn.Conv2d):
    def forward(self, x):
        raise KeyError("never again")


class WithMethods(BitStdConv2d):
    def standardized(self):
        return self.weight


# Networks as others write them.


class PreActivation(nn.Module):
    """A unit of ResNet-v2: one activation feeds two convolutions, norms hold their ReLU."""

    def __init__(self, conv=BitStdConv2d, norm=lambda c: GroupNormAct(c, 4, nn.ReLU())):
        super().__init__()
        self.norm1, self.proj, self.conv1 = norm(8), conv(8, 16, 1, bias=False), conv(8, 8, 1)
        self.norm2, self.conv2 = norm(8), conv(8, 16, 3, padding=1)

    def forward(self, x):
        activated = self.norm1(x)
        return self.conv2(self.norm2(self.conv1(activated))) + self.proj(activated)


class PostActivation(nn.Module):
    """A block of ResNet: one in-place nn.ReLU for every place, the last of them after a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1, bias=False), nn.GroupNorm(4, 8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Untraceable(PostActivation):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class NormWithTwoTakers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.conv = nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.norm(x)
        return self.conv(self.relu(y)) + y


class NoisyNorm(nn.Module):
    """Only when training is there something between the norm and its ReLU."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.GroupNorm(4, 8), nn.ReLU()

    def forward(self, x):
        y = self.norm(x)
        if self.training:
            y = y - 1
        return self.relu(y)


def images(*shape, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (2, 8, 9, 8)), generator=generator, **kwargs)


def found(report):
    """{name: what it is now} of what was replaced."""
    return {entry.name: entry.now for entry in report.replaced}


def reasons(report):
    return {entry.name: entry.why for entry in report.left}


def kept_bytes(function):
    """Bytes of the (N, ...) tensors kept for backward, each storage once."""
    storages = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == 2:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return sum(storages.values()), output


ONE_LAYER = [
    (lambda: BitStdConv2d(8, 6, 3, padding=1), "StdConv2d(eps=1e-10)"),
    (lambda: BitStdConv2d(8, 1, (3, 1), stride=2, bias=False), "StdConv2d(eps=1e-10)"),
    (lambda: BatchNormStdConv2d(8, 8, 3, groups=4), "StdConv2d(eps=1e-08)"),
    (lambda: BatchNormStdConv2d(8, 8, 3, eps=0.01, dilation=2), "StdConv2d(eps=0.01)"),
    (lambda: BatchNormStdConv2d(8, 8, 3, stride=2, same=True), "StdConv2dSame(eps=1e-08)"),
    (lambda: BatchNormStdConv2d(8, 8, 1, stride=2, same=True), "StdConv2d(eps=1e-08)"),
    (lambda: nn.GroupNorm(4, 8), "GroupNorm(activation=None)"),
    (lambda: nn.GroupNorm(2, 8, eps=1e-3, affine=False), "GroupNorm(activation=None)"),
    (lambda: GroupNormAct(8, 4, nn.ReLU()), "GroupNorm(activation='relu')"),
    (lambda: GroupNormAct(8, 4, nn.Identity()), "GroupNorm(activation=None)"),
    (lambda: WideGroupNorm(4, 8), "GroupNorm(activation=None)"),
]


@pytest.mark.parametrize("layer, now", ONE_LAYER, ids=[now for _, now in ONE_LAYER])
def test_layers_are_known_by_what_they_compute(layer, now):
    model, x = layer(), images()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    expected = model(x)
    report = bit_kernels.convert(model, example=x, verify=True)
    assert found(report) == {"": now} and report.left == []
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


LEFT = [
    (lambda: OutsideEpsConv2d(8, 8, 3), "standardized another way"),
    (lambda: ScaledStdConv2d(8, 8, 3), "parameters or buffers of its own: gain"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "of its own: parametriz"),
    (lambda: nn.LazyConv2d(8, 3), "no shape yet"),
    (lambda: Failing(8, 8, 3), "failed on a random input: 'never again'"),
    (lambda: WithMethods(8, 8, 3), "methods of its own: standardized"),
    (lambda: nn.Conv2d(8, 8, 3), "no GroupNorm before it"),
    (lambda: GroupNormAct(8, 4, nn.SiLU()), "isn't a GroupNorm with a ReLU or nothing after it"),
    (lambda: GroupNormAct(8, 4, nn.ReLU(), nn.Dropout()), "isn't a GroupNorm with a ReLU"),
]


@pytest.mark.parametrize("layer, why", LEFT, ids=[why for _, why in LEFT])
def test_what_is_left_says_why(layer, why):
    model = layer()
    before = type(model)
    report = bit_kernels.convert(model)
    assert type(model) is before and report.replaced == []
    assert why in reasons(report)[""] and why in str(report)


def test_a_forward_replaced_on_the_object_is_left():
    model = BitStdConv2d(8, 8, 1)
    model.forward = lambda x: x
    assert "replaced on the object" in reasons(bit_kernels.convert(model))[""]


def test_inner_hooks_leave_a_module_and_outer_ones_stay():
    seen = []
    inner, outer = GroupNormAct(8, 4, nn.ReLU()), GroupNormAct(8, 4, nn.ReLU())
    inner.activation.register_forward_hook(lambda *_: seen.append("inner"))
    outer.register_forward_hook(lambda *_: seen.append("outer"))
    report = bit_kernels.convert(nn.ModuleDict({"inner": inner, "outer": outer}))
    assert list(found(report)) == ["outer"] and "hooks" in reasons(report)["inner"]
    outer(images())
    assert seen == ["outer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("network", [PreActivation, PostActivation])
def test_networks_compute_and_hold_the_same(network, dtype):
    torch.manual_seed(0)
    model = network().to(dtype)
    original, x = copy.deepcopy(model), images(dtype=dtype)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    report = bit_kernels.convert(model, example=x, verify=True)
    assert "error" in report.proof and report.proof in str(report)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    original.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert bit_kernels.convert(model, example=x).replaced == []


@pytest.mark.parametrize("example", [None, images()], ids=["traced", "run"])
def test_the_relu_after_a_norm_is_done_in_it(example):
    model = PostActivation()
    report = bit_kernels.convert(model, example=example)
    assert found(report) == {
        "bn1": "GroupNorm(activation='relu')",
        "conv2": "Conv2d",
        "bn2": "GroupNorm(activation=None)",
        "relu": "ReLU",
    }
    assert reasons(report) == {"conv1": "there is no GroupNorm right before it"}
    assert "without the ReLU" not in str(report)  # bn2's sum is no longer what bn2 made
    normal = model.bn1(model.conv1(images()))
    assert model.relu(normal) is normal
    assert model.relu(-normal.detach()) is not normal
    with torch.no_grad():
        normal.sub_(1)  # no longer what the norm made
    assert (model.relu(normal.detach()) >= 0).all() and model.relu(normal).min() >= 0


@pytest.mark.parametrize("example", [None, images()], ids=["traced", "run"])
def test_a_norm_with_other_takers_keeps_its_output(example):
    model = NormWithTwoTakers()
    report = bit_kernels.convert(model, example=example)
    assert found(report) == {"norm": "GroupNorm(activation=None)"}
    assert "add takes its output too" in str(report) or "add.Tensor takes" in str(report)


@pytest.mark.parametrize("example", [None, images()], ids=["traced", "run"])
def test_both_modes_count(example):
    model = NoisyNorm().eval()
    report = bit_kernels.convert(model, example=example, verify=example is not None)
    assert found(report) == {"norm": "GroupNorm(activation=None)"} and not model.training


def test_a_norm_with_hooks_keeps_its_output():
    model = PostActivation()
    model.bn1.register_forward_hook(lambda *_: None)
    report = bit_kernels.convert(model, example=images())
    assert found(report)["bn1"] == "GroupNorm(activation=None)" and "its hooks would" in str(report)


def test_what_cant_be_traced_needs_an_example():
    model = Untraceable()
    report = bit_kernels.convert(copy.deepcopy(model))
    assert "can't be traced; give an example" in reasons(report)["conv2"]
    assert "relu" not in found(report)
    report = bit_kernels.convert(model, example=images(), verify=True)
    assert found(report)["bn1"] == "GroupNorm(activation='relu')"


def test_examples_by_position_and_by_name():
    for example in (images(), (images(),), {"x": images()}):
        report = bit_kernels.convert(PostActivation(), example=example, verify=True)
        assert "relu" in found(report)


def test_the_running_model_and_its_optimizer_stay():
    torch.manual_seed(0)
    model, x = PreActivation(), images()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    bit_kernels.convert(model)
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_failed_proof_restores_the_model(monkeypatch):
    from bit_kernels import modules

    monkeypatch.setattr(
        modules.functional, "standardize_weight", lambda weight, eps: weight * (1 + eps + 1e-3)
    )
    model, x = PreActivation(), images()
    classes, expected = [type(m) for m in model.modules()], model(x)
    with pytest.raises(RuntimeError, match=r"output 0 is off by .* the model is as it was"):
        bit_kernels.convert(model, example=x, verify=True)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected) and isinstance(model.norm1.activation, nn.ReLU)


def test_refusals():
    with pytest.raises(ValueError, match="model is a list; it must be an eager nn.Module"):
        bit_kernels.convert([])
    with pytest.raises(ValueError, match="it must be an eager nn.Module"):
        bit_kernels.convert(torch.jit.script(nn.ReLU()))
    with pytest.raises(ValueError, match="verify is True and example None"):
        bit_kernels.convert(nn.ReLU(), verify=True)


# What the convolutions keep.


def results(model, x):
    x = x.detach().requires_grad_()
    with torch.random.fork_rng():
        y = model(x)
        torch.manual_seed(0)
        loss = (y * torch.randn_like(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


@pytest.mark.parametrize("network", [PreActivation, PostActivation])
def test_activations_are_not_kept(network):
    torch.manual_seed(0)
    model, x = network(), images()
    before, _ = kept_bytes(lambda: model(x.requires_grad_()))
    expected = results(model, x)
    bit_kernels.convert(model, example=x)
    gc.collect()
    notes = len(_recompute._notes)  # of tensors that other tests have left alive
    after, y = kept_bytes(lambda: model(x))
    one = x.untyped_storage().nbytes()
    # Each activation is as large as the input. PreActivation: both; PostActivation: bn1's alone,
    # for its last ReLU keeps the sum.
    assert before - after == (2 if network is PreActivation else 1) * one
    y.sum().backward()
    del y
    assert len(_recompute._notes) == notes
    for ours, theirs in zip(results(model, x), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_an_activation_is_made_again_once(monkeypatch):
    made = []
    original = _recompute.normalisation._apply_op
    monkeypatch.setattr(
        _recompute.normalisation, "_apply_op", lambda *args: (made.append(0), original(*args))[1]
    )
    model, x = PreActivation(), images(requires_grad=True)
    bit_kernels.convert(model)
    y = model(x).sum()
    for backward in (1, 2):  # and again by a retained graph
        y.backward(retain_graph=True)
        assert len(made) == 2 * backward


def chain():
    torch.manual_seed(0)
    return nn.Sequential(GroupNorm(4, 8, activation="relu"), StdConv2d(8, 4, 3), Conv2d(4, 4, 1))


def test_an_output_changed_in_place_is_kept_as_it_is():
    norm, conv, _ = chain()
    x = images()
    changed = norm(x)
    changed.mul_(2)
    expected = torch.autograd.grad(conv(norm(x) * 2).square().sum(), conv.weight)
    (found,) = torch.autograd.grad(conv(changed).square().sum(), conv.weight)
    assert torch.allclose(found, expected[0], rtol=1e-4, atol=1e-4)


def test_an_input_changed_in_place_is_noticed():
    norm, conv, _ = chain()
    x = images()
    y = conv(norm(x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    activated = norm(x)
    x.add_(1)  # before the convolution, which then keeps the activation
    assert _recompute.noted(activated) is None


def test_saved_and_sent_outputs_carry_nothing():
    norm, *_ = chain()
    x = images(requires_grad=True)
    y = norm(x)
    assert vars(y) == {} and len(pickle.dumps(y.detach())) < 2 * y.untyped_storage().nbytes()


def test_autocast():
    model, x = chain(), images()
    plain = copy.deepcopy(model)
    plain[1].__class__ = BitStdConv2d
    plain[2].__class__ = nn.Conv2d
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    for m, y in ((model, ours), (plain, theirs)):
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in m.parameters())
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.03 * b.grad.norm(), name


def test_double_backward():
    model, x = chain(), images(1, 8, 4, 4)
    penalties = []
    for m in (model, copy.deepcopy(model).double()):
        leaf = x.to(m[1].weight.dtype).requires_grad_()
        inner = torch.autograd.grad(m(leaf).square().sum(), [leaf, m[1].weight], create_graph=True)
        penalty = sum(g.square().sum() for g in inner)
        penalties.append(torch.autograd.grad(penalty, [leaf, *m.parameters()]))
    for ours, truth in zip(*penalties, strict=True):
        assert (ours - truth).norm() < 1e-3 * truth.norm()


def test_checkpointing():
    model, x = chain(), images(requires_grad=True)
    expected = results(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    kept, _ = kept_bytes(lambda: Checkpointed()(x))
    assert kept == x.untyped_storage().nbytes()
    for ours, theirs in zip(results(Checkpointed(), x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_other_ways_through_the_network():
    model, x = PostActivation(), images()
    bit_kernels.convert(model, example=x)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-5)
    per_sample = torch.func.vmap(lambda image: model(image[None]))(x)[:, 0]
    assert torch.allclose(per_sample, expected, atol=1e-5)
    assert model(x[:0]).shape == (0, 8, 9, 8)


# The networks themselves, where they can be imported.


def timm_network(conv, **kwargs):
    """timm's ResNetV2 as its resnetv2_50x1_bit and resnetv2_50d_gn are made, of two units."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with torchvision_or_stand_ins():
        from timm import layers
        from timm.models.resnetv2 import ResNetV2
    kwargs |= dict(layers=(1, 1), channels=(128, 256), stem_chs=64, num_classes=4)
    return ResNetV2(conv_layer=getattr(layers, conv), norm_layer=layers.GroupNormAct, **kwargs)


def transformers_network():
    transformers = pytest.importorskip("transformers")
    try:
        network = transformers.BitForImageClassification
    except ImportError as error:  # it looks for torchvision, which may not fit this torch
        pytest.skip(str(error))
    config = transformers.BitConfig(
        depths=[1, 1], hidden_sizes=[32, 64], embedding_size=16, num_groups=4, num_labels=4
    )
    return network(config)


def torchvision_network():
    try:
        from torchvision.models.resnet import Bottleneck, ResNet
    except (ImportError, RuntimeError) as error:  # absent, or built for another torch
        pytest.skip(str(error))
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, norm_layer=lambda c: nn.GroupNorm(8, c))


NETWORKS = {
    "resnetv2_50x1_bit": (
        lambda: timm_network("StdConv2d"),
        {"StdConv2d(eps=1e-06)": 9, "GroupNorm(activation='relu')": 7},
    ),
    "resnetv2_50d_gn": (
        lambda: timm_network("create_conv2d", stem_type="deep", avg_down=True),
        {"Conv2d": 9, "GroupNorm(activation='relu')": 9},
    ),
    "BitForImageClassification": (
        transformers_network,
        {"StdConv2d(eps=1e-08)": 9, "GroupNorm(activation='relu')": 7},
    ),
    "resnet50": (
        torchvision_network,
        {
            "GroupNorm(activation='relu')": 9,
            "GroupNorm(activation=None)": 8,
            "Conv2d": 8,
            "ReLU": 5,
        },
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries(name):
    create, expected = NETWORKS[name]
    torch.manual_seed(0)
    model = create()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # a head at zero would hide everything before it
            nn.init.normal_(parameter)
    keys, x = list(model.state_dict()), images(2, 3, 32, 32)
    report = bit_kernels.convert(model, example=x, verify=True)
    counts = {}
    for now in found(report).values():
        counts[now] = counts.get(now, 0) + 1
    assert counts == expected
    assert list(model.state_dict()) == keys
