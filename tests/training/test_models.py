"""The network against the paper's numbers, a plain float64 twin written here, and timm's."""

import copy
import importlib.util
import resource

import pytest
import timm_twin
import torch
import torch.nn.functional as F
from checking import leave_small_tensors_to_pytorch
from torch import nn

from bit import checkpoint, models

# Parameters without a head and with one of 10, 100, 1000 and 21843 classes. 928 million for
# R152x4 is the paper's own figure; the others are sums over the layers.
COUNTS = {
    "R50x1": (23_500_352, 23_520_842, 23_705_252, 25_549_352, 68_256_659),
    "R50x3": (211_174_080, 211_235_530, 211_788_580, 217_319_080, 345_399_315),
    "R101x1": (42_492_480, 42_512_970, 42_697_380, 44_541_480, 87_248_787),
    "R101x3": (381_789_888, 381_851_338, 382_404_388, 387_934_888, 516_015_123),
    "R152x2": (232_238_208, 232_279_178, 232_647_908, 236_335_208, 321_728_979),
    "R152x4": (928_340_224, 928_422_154, 929_159_524, 936_533_224, 1_107_299_923),
}
NORM_COUNTS = {
    "R50x1": 45_440, "R50x3": 136_320, "R101x1": 97_664,
    "R101x3": 292_992, "R152x2": 287_488, "R152x4": 574_976,
}  # fmt: skip


def randomize(model, seed=0):
    """Give every parameter, scales and biases and the head included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = name.endswith(".weight") and parameter.dim() == 1
            parameter.copy_(0.3 * noise + (1.0 if scale else 0.0))
    return model


def images(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def plain_forward(model, x, units, stem):
    """Return logits and maps by the paper's equations, from nothing but the state_dict."""
    state = model.state_dict()

    def conv(x, layer, stride=1, pad=0):
        w = state[f"{layer}.weight"]
        axes = (1, 2, 3)
        centred = w - w.mean(axes, keepdim=True)
        w = centred / ((centred**2).mean(axes, keepdim=True) + 1e-10).sqrt()
        return F.conv2d(F.pad(x, (pad,) * 4), w, stride=stride)

    def norm_relu(x, layer):
        n, c, h, w = x.shape
        groups = 32 if c >= 64 else c // 2
        x = x.reshape(n, groups, -1)
        centred = x - x.mean(2, keepdim=True)
        x = centred / ((centred**2).mean(2, keepdim=True) + 1e-5).sqrt()
        scale, shift = state[f"{layer}.weight"], state[f"{layer}.bias"]
        return (x.reshape(n, c, h, w) * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    if stem == "imagenet":
        x = conv(x, "root.conv", stride=2, pad=3)
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=0.0), 3, stride=2)
    else:
        x = conv(x, "root.conv", pad=1)
    maps = {"stem": x}
    for block in range(1, 5):
        for unit in range(1, units[block - 1] + 1):
            here = f"block{block}.unit{unit:02d}"
            stride = 2 if block > 1 and unit == 1 else 1
            p = norm_relu(x, f"{here}.norm1")
            shortcut = conv(p, f"{here}.proj", stride) if unit == 1 else x
            y = conv(p, f"{here}.conv1")
            y = conv(norm_relu(y, f"{here}.norm2"), f"{here}.conv2", stride, pad=1)
            x = shortcut + conv(norm_relu(y, f"{here}.norm3"), f"{here}.conv3")
        maps[f"block{block}"] = x
    pooled = norm_relu(x, "norm").sum((2, 3)) / (x.shape[2] * x.shape[3])
    return pooled @ state["head.weight"].T + state["head.bias"], maps


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    for classes, count in zip((0, 10, 100, 1000, 21843), COUNTS[name], strict=True):
        model = models.create(name, classes, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert sum(p.numel() for m in norms for p in m.parameters()) == NORM_COUNTS[name]
    assert {m.num_groups for m in norms} == {32}


def test_meta_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        by_context = models.create("R152x4", 21843)
    by_argument = models.create("R152x4", 21843, device="meta")
    for model in (by_context, by_argument):
        assert all(p.is_meta for p in model.parameters())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kB; the weights would be 4,400,000


@pytest.mark.parametrize(
    "pixels, final",
    [(1, 1), (32, 1), (33, 2), (128, 4), (160, 5), (197, 7), (224, 7), (384, 12), (448, 14),
     (480, 15), (512, 16)],
)  # fmt: skip
def test_map_sizes(pixels, final):
    model = models.create("R50x1", device="meta")
    maps = model.features(torch.empty(2, 3, pixels, 64, device="meta"))
    quarter = -(-pixels // 4)
    heights = (quarter, quarter, -(-quarter // 2), -(-quarter // 4), final)
    expected = {
        stage: (2, channels, height, width)
        for stage, channels, height, width in zip(
            ("stem", "block1", "block2", "block3", "block4"),
            (64, 256, 512, 1024, 2048), heights, (16, 16, 8, 4, 2), strict=True,
        )
    }  # fmt: skip
    assert {stage: tuple(m.shape) for stage, m in maps.items()} == expected


def test_small_stem_keeps_the_resolution():
    model = models.create("R26x0.25", 10, stem="small", device="meta")
    maps = model.features(torch.empty(2, 3, 32, 29, device="meta"))
    shapes = [tuple(m.shape)[1:] for m in maps.values()]
    assert shapes == [(16, 32, 29), (64, 32, 29), (128, 16, 15), (256, 8, 8), (512, 4, 4)]
    imagenet = models.create("R26x0.25", 10, device="meta")
    assert list(model.state_dict()) == list(imagenet.state_dict())


@pytest.mark.parametrize(
    "width, smallest", [("0.03125", 2), ("0.25", 16), ("0.75", 48), ("1.5", 96)]
)
def test_fractional_widths(width, smallest):
    model = models.create(f"R14x{width}", device="meta")
    assert model.root.conv.out_channels == smallest
    assert model.num_features == 32 * smallest
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert all(m.num_groups == min(32, m.num_channels // 2) for m in norms)


@pytest.mark.parametrize("stem", models.STEMS)
@pytest.mark.parametrize("name", ["R14x0.25", "R26x0.125"])
def test_matches_the_plain_network(name, stem):
    model = randomize(models.create(name, 7, stem=stem, dtype=torch.float64))
    x = images(2, 3, 45, 38, dtype=torch.float64)
    units = {"R14x0.25": (1, 1, 1, 1), "R26x0.125": (2, 2, 2, 2)}[name]
    logits, maps = plain_forward(model, x, units, stem)
    with torch.no_grad():
        assert relative_error(model(x), logits) < 1e-12
        features = model.features(x)
    assert list(features) == ["stem", "block1", "block2", "block3", "block4"]
    for stage, expected in maps.items():
        assert relative_error(features[stage], expected) < 1e-12


def test_root_pool_pads_with_zeros():
    root = randomize(models.create("R14x0.5", 7)).root
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        pooled, conv = root(x), root.conv(x)
    by_minus_infinity = F.max_pool2d(conv, 3, stride=2, padding=1)
    # A window over the border can't be negative, an inner one can.
    assert pooled[:, :, 0].min() == 0 and pooled[:, :, :, 0].min() == 0
    assert by_minus_infinity[:, :, 0].min() < 0
    assert pooled[:, :, 1:, 1:].min() < 0
    assert torch.equal(pooled[:, :, 1:, 1:], by_minus_infinity[:, :, 1:, 1:])


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_equal_timms(dtype, bound):
    model = randomize(models.create("R50x1", 1000)).to(dtype)
    twin = timm_twin.create("resnetv2_50x1_bit", 1000).to(dtype)
    twin.load_state_dict(checkpoint.views(model, "timm"))
    for pixels in (224, 197):
        x = images(1, 3, pixels, pixels, dtype=dtype)
        with torch.no_grad():
            assert relative_error(model(x), twin(x)) < bound


def test_channels_last_is_kept_and_agrees():
    model = randomize(models.create("R14x0.25", 7))
    x = images(2, 3, 64, 40)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        assert relative_error(model(x), expected) < 1e-5
        for maps in model.features(x).values():
            assert maps.is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_every_parameter():
    model = randomize(models.create("R14x0.25", 7))
    F.cross_entropy(model(images(2, 3, 64, 64)), torch.tensor([1, 5])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_empty_batch():
    assert models.create("R14x0.25", 7)(torch.empty(0, 3, 32, 32)).shape == (0, 7)


def test_heads():
    x = images(2, 3, 32, 32)
    model = models.create("R14x0.25", 7)
    assert torch.equal(model(x), torch.zeros(2, 7))
    drawn = models.create("R14x0.25", 1000, zero_head=False).head
    assert abs(drawn.weight.std().item() - 0.01) < 1e-4
    assert torch.equal(drawn.bias, torch.zeros(1000))
    headless = models.create("R14x0.25", 0)
    pooled = model.norm(model.features(x)["block4"]).mean((2, 3))
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k})
    assert torch.equal(headless(x), pooled) and pooled.shape == (2, model.num_features)


def test_initial_weights():
    torch.manual_seed(3)
    model = models.create("R26x0.5", 10)
    torch.manual_seed(3)
    again = models.create("R26x0.5", 10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    conv = model.block4.unit02.conv2.weight  # 256 outputs of 3 x 3: variance 2 / fan-out
    assert abs(conv.std().item() - (2 / (256 * 9)) ** 0.5) < 1e-4
    norm = model.block4.unit02.norm2
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_dtype_and_default_device():
    assert models.create("R14x0.25").norm.weight.dtype == torch.float32
    model = models.create("R14x0.25", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_config_rebuilds():
    model = models.create("R26x0.25", 10, stem="small")
    assert model.config == {"name": "R26x0.25", "num_classes": 10, "stem": "small"}
    again = models.create(**model.config)
    again.load_state_dict(model.state_dict())
    assert (
        repr(again)
        == repr(model)
        == ("ResNetV2('R26x0.25', num_classes=10, stem='small': 880,474 parameters)")
    )


def test_copies():
    model = randomize(models.create("R14x0.25", 7))
    x = images(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.fixture
def kernels_only(monkeypatch):
    """A compiled graph has the kernels in it; eager code must not leave small maps to PyTorch."""
    leave_small_tensors_to_pytorch(monkeypatch, 0)


def test_compiles_without_a_break(kernels_only):
    model = randomize(models.create("R14x0.25", 7))
    x = images(2, 3, 48, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_exports_with_any_batch(kernels_only):
    model = randomize(models.create("R14x0.25", 7))
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (images(2, 3, 48, 32),), dynamic_shapes={"images": {0: batch}}
    )
    x = images(5, 3, 48, 32)
    with torch.no_grad():
        assert relative_error(program.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="R18x1"), "name is 'R18x1'.*14, 26, 50, 101, 152"),
        (dict(name="r50x1"), "name is 'r50x1'.*R<depth>x<width>"),
        (dict(name="R50x"), "name is 'R50x'"),
        (dict(name="R50x0"), "width of 0 .*multiple of 0.5"),
        (dict(name="R50x1.3"), "width of 1.3 .*multiple of 0.5"),
        (dict(name="R50x1.25"), "width of 1.25 .*multiple of 0.5"),
        (dict(name="R50x1", num_classes=-1), "num_classes is -1; .*at least 1, or 0"),
        (dict(name="R50x1", stem="big"), "stem is 'big'; it may be one of imagenet, small"),
    ],
)
def test_refuses_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.create(**arguments, device="meta")


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 1, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 3, 0, 32),
        torch.zeros(2, 3, 32, 0),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
    ids=["grey", "no batch", "channels last axis", "no height", "no width", "uint8"],
)
def test_refuses_images(bad):
    model = models.create("R14x0.25", 7)
    for call in (model, model.features):
        with pytest.raises(ValueError, match=r"images is torch\..*must be floating point of shape"):
            call(bad)


@pytest.mark.parametrize("side", [(7, 9), (8, 8), (1, 1), (2, 1), (6, 5)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_root_pool_is_a_pool_over_a_border_of_zeros(side, layout):
    x = torch.randn(2, 3, *side, dtype=torch.float64) - 0.5
    x = x.contiguous(memory_format=layout).requires_grad_()
    ours, plain = models._max_pool(x), F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
    assert torch.equal(ours, plain)
    grad = torch.randn_like(ours)
    found = torch.autograd.grad(ours, x, grad)[0]
    assert torch.equal(found, torch.autograd.grad(plain, x, grad)[0])
    assert found.is_contiguous(memory_format=layout)
    assert torch.autograd.gradgradcheck(models._max_pool, x)


def test_what_a_step_keeps():
    """Of each GroupNorm its input, of each pool its result; no activation, no standardized weight."""
    model = models.create("R26x0.5", 10).to(memory_format=torch.channels_last)
    inputs = 0

    def count(module, arguments):
        nonlocal inputs
        inputs += arguments[0].numel()

    hooks = [
        m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, nn.GroupNorm)
    ]
    images = torch.randn(2, 3, 64, 64)
    model(images)
    for hook in hooks:
        hook.remove()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), images)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    indices = 2 * 32 * 16 * 16 * 8
    total = sum(size for at, size in kept.items() if at not in own)
    assert 4 * inputs + indices <= total < 1.05 * (4 * inputs + indices)


def test_inference_mode():
    model, images = models.create("R14x0.5", 5, zero_head=False), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model(images)
    assert torch.allclose(logits, model(images), atol=1e-5)
