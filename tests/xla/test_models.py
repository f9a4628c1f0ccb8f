"""The flax network is the PyTorch one: same parameters, same logits, same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bit import checkpoint, models
from bit.xla import weights
from bit.xla.models import ResNetV2, is_convolution, linear, shapes
from bit_kernels import xla

NETWORKS = {
    "small_stem": ("R26x0.125", "small", 16),
    "odd_maps": ("R14x0.375", "imagenet", 65),
}


def logits_of(network, params, images):
    return jax.jit(network.apply)({"params": params}, images)


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A PyTorch network, the same in flax with its parameters, and images for both."""
    name, stem, side = NETWORKS[request.param]
    torch.manual_seed(0)
    model = models.create(name, 7, stem=stem, zero_head=False)
    torch.nn.init.normal_(model.head.bias)
    images = np.random.default_rng(0).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    return model, ResNetV2(name, 7, stem), weights.from_torch(model), images


def as_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_logits_are_pytorch_s(pair):
    model, network, params, images = pair
    assert jax.tree.map(lambda p: p.shape, shapes(network)) == jax.tree.map(np.shape, params)
    logits = logits_of(network, params, images)
    expected = model(as_torch(images)).detach().numpy()
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 1e-5


def test_gradients_are_pytorch_s(pair, x64):
    model, network, params, images = pair
    model.double()
    network = network.copy(dtype=jnp.float64)
    params = jax.tree.map(lambda p: p.astype(np.float64), params)
    labels = np.arange(3)

    def loss_of(params):
        scores = jax.nn.log_softmax(logits_of(network, params, images))
        return -scores[np.arange(3), labels].mean()

    found = jax.jit(jax.grad(loss_of))(params)
    F.cross_entropy(model(as_torch(images).double()), torch.from_numpy(labels)).backward()
    grads = weights.to_torch(found, models.create(model.name, 7, stem=model.stem_kind).double())
    for (name, true), mine in zip(model.named_parameters(), grads.parameters(), strict=True):
        scale = true.grad.abs().max()
        assert (true.grad - mine).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("pair", ["odd_maps"], indirect=True)
def test_rematerialised_and_standardized_networks_are_the_same(pair):
    _, network, params, images = pair

    def loss_of(params, network):
        return jnp.square(logits_of(network, params, images)).sum()

    loss_and_grads = jax.jit(jax.value_and_grad(loss_of), static_argnums=1)
    loss, grads = loss_and_grads(params, network)
    again, grads_again = loss_and_grads(params, network.copy(remat=True))
    assert float(loss) == pytest.approx(float(again), rel=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max() + 1e-6
    kept = jax.tree_util.tree_map_with_path(
        lambda path, p: xla.standardize_weight(p) if is_convolution(path, p) else p, params
    )
    logits = logits_of(network.copy(standardized=True), kept, images)
    assert np.abs(logits - logits_of(network, params, images)).max() < 1e-5


def test_bfloat16_is_near_and_gives_float32(pair):
    _, network, params, images = pair
    logits = logits_of(network.copy(dtype=jnp.bfloat16), params, images)
    exact = logits_of(network, params, images)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max() + 0.02


def test_weights_go_through_every_format(pair, tmp_path):
    model, network, params, images = pair
    expected = logits_of(network, params, images)
    for name in ("released.npz", "ours.safetensors"):
        copy = models.create(model.name, 7, stem=model.stem_kind)
        checkpoint.save(weights.to_torch(params, copy), tmp_path / name)
        read = models.create(model.name, 7, stem=model.stem_kind)
        checkpoint.load(read, tmp_path / name)
        logits = logits_of(network, weights.from_torch(read), images)
        assert np.array_equal(logits, expected), name


def test_fresh_parameters_have_pytorch_s_spread():
    params = jax.jit(ResNetV2("R14x0.5", 7).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))[
        "params"
    ]
    drawn = weights.from_torch(models.create("R14x0.5", 7))
    for (path, mine), theirs in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(drawn), strict=True
    ):
        assert mine.std() == pytest.approx(theirs.std(), rel=0.1, abs=1e-6), path


def test_kernel_of_the_head_has_a_float32_gradient():
    x, kernel = jnp.ones((3, 5)), jnp.full((5, 2), 0.3, jnp.bfloat16)
    grad = jax.grad(lambda k: linear(x, k, jnp.bfloat16).sum())(kernel)
    assert grad.dtype == jnp.float32


def test_refusals():
    with pytest.raises(ValueError, match="name is 'R51x1'; it must be R<depth>x<width>"):
        shapes(ResNetV2("R51x1"))
    with pytest.raises(ValueError, match="stem is 'none'; it may be one of imagenet, small"):
        shapes(ResNetV2("R14x1", stem="none"))
    with pytest.raises(ValueError, match="num_classes is 0; it must be at least 1"):
        shapes(ResNetV2("R14x1", 0))
    network = ResNetV2("R14x0.25", 3)
    params = {"params": weights.from_torch(models.create("R14x0.25", 3))}
    with pytest.raises(ValueError, match=r"images is float32 of shape \(1, 3, 32, 32\); it must"):
        network.apply(params, jnp.zeros((1, 3, 32, 32), jnp.float32))
    model = models.create("R14x0.25", 4)
    with pytest.raises(ValueError, match=r"params have head.bias as \(3,\), .* model's is \(4,\)"):
        weights.to_torch(params["params"], model)
    with pytest.raises(
        ValueError, match=r"params differ from .* in \['head.bias', 'head.weight'\]"
    ):
        without = {k: v for k, v in params["params"].items() if k != "head"}
        weights.to_torch(without, model)
