"""The compiled CUDA kernels on a GPU, by their public functions, against float64."""

import functools

import pytest
import torch
from checking import DTYPES, assert_as_good, to_float64, with_gradients

from bit_kernels import _library, reference
from bit_kernels.functional import group_norm_relu, sgd, standardize_weight

if not torch.cuda.is_available():
    pytest.skip("needs a GPU; tests/cuda has the same kernels on the CPU", allow_module_level=True)

# (shape, groups): why it is here.
SAMPLES = {
    "odd": ((3, 6, 7, 5), 3),
    "round": ((2, 64, 8, 8), 32),
    "one_pixel": ((4, 64, 1, 1), 32),
    "r50x1_56": ((2, 256, 56, 56), 32),
    "r50x1_14": ((8, 1024, 14, 14), 32),
    "r50x1_7": ((32, 2048, 7, 7), 32),
    "a_cluster": ((1, 64, 112, 112), 32),
}
NAMES = ["output", "grad_input", "grad_weight", "grad_bias"]


def test_the_library_is_there():
    """On a machine with a GPU the kernels are to be built."""
    assert _library.cuda is not None, _library.why_not_cuda


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_group_norm_relu(sample, dtype, relu):
    shape, groups = SAMPLES[sample]
    x = (torch.randn(shape, device="cuda") + 0.5).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    inputs = [x, *torch.randn(2, shape[1], device="cuda").to(dtype).unbind()]
    grad = torch.randn(shape, device="cuda").to(dtype)
    plain = functools.partial(_plain, groups=groups, relu=relu)
    linear = _plain(*to_float64(inputs), groups=groups, relu=False)
    grad[linear.abs() < 1e-2] = 0  # rounding decides the ReLU's mask there
    fused = functools.partial(_fused, groups=groups, relu=relu)
    ours = with_gradients(fused, inputs, grad)
    truth = with_gradients(plain, to_float64(inputs), grad)
    assert_as_good(NAMES, ours, with_gradients(plain, inputs, grad), truth)
    again = with_gradients(fused, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def _plain(x, w, b, *, groups, relu):
    return reference.group_norm_relu(x, groups, w, b, relu=relu)


def _fused(x, w, b, *, groups, relu):
    return group_norm_relu(x, groups, w, b, relu=relu, backend="cuda")


def test_refuses_in_words():
    with pytest.raises(ValueError, match="'cuda' can't serve.*channels_last"):
        group_norm_relu(torch.zeros(2, 8, 4, 4, device="cuda"), 4, backend="cuda")


@pytest.mark.parametrize("project", [False, True])
def test_sgd(project):
    random = torch.Generator("cuda").manual_seed(0)
    shapes = [(64, 3, 7, 7), (64, 64, 1, 1), (128, 64, 3, 3), (5, 3, 1, 1), (2048, 512, 1, 1)]
    weights = [0.1 * torch.randn(s, device="cuda", generator=random) for s in shapes]
    grads = [torch.randn(s, device="cuda", generator=random) for s in shapes]
    momenta = [torch.randn(s, device="cuda", generator=random) for s in shapes]
    kept = [torch.empty_like(w) for w in weights]
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, project=project)
    truth = [to_float64(tensors) for tensors in (weights, grads, momenta, kept)]
    plain = [[t.clone() for t in tensors] for tensors in (weights, grads, momenta, kept)]
    reference.sgd(*truth, **options)
    reference.sgd(*plain, **options)
    sgd(weights, grads, momenta, kept, **options, backend="cuda")
    for at, shape in enumerate(shapes):
        found = [weights[at], momenta[at], kept[at]]
        assert_as_good(
            [f"{name} of {shape}" for name in ("weight", "momentum", "standardized")],
            found,
            [plain[0][at], plain[2][at], plain[3][at]],
            [truth[0][at], truth[2][at], truth[3][at]],
        )
        assert torch.allclose(kept[at], standardize_weight(weights[at]), atol=1e-5)


def test_a_graph_replays_what_was_captured():
    x = torch.randn(4, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    with torch.no_grad():
        group_norm_relu(x, 32, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = group_norm_relu(x, 32, backend="cuda")
        x.copy_(torch.randn_like(x) + 3)
        graph.replay()
        assert torch.equal(y, group_norm_relu(x, 32, backend="cuda"))
