"""The ops of bit_kernels/ops/_cuda.py, their C++ side compiled for CPU tensors (on_host.py)."""

import functools

import pytest
import torch
from checking import DTYPES, LAYOUTS, assert_as_good, to_float64, with_gradients
from test_group_norm_relu import make

from bit_kernels import reference
from bit_kernels.ops import _cuda

pytestmark = pytest.mark.usefixtures("ops_on_host", "group_norm", "sgd")
IN_PIXELS = ["channels_last", "channels_last_slice"]  # where channels are innermost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", IN_PIXELS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_group_norm_relu(layout, grad_layout, dtype):
    (x, w, b), grad = make((2, 32, 5, 6), 8, dtype)
    x, grad = LAYOUTS[layout](x), LAYOUTS[grad_layout](grad)
    y, mean, rstd = _cuda.group_norm_relu(x, 8, w, b, 1e-5, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dx, dw, db = _cuda.group_norm_relu_backward(grad, x, mean, rstd, w, b, True)
    assert dx.stride() == y.stride() and dw.dtype == db.dtype == torch.float32

    def unfused(x, w, b):
        return reference.group_norm_relu(x, 8, w, b)

    names = ["output", "grad_input", "grad_weight", "grad_bias"]
    theirs = with_gradients(unfused, [x, w, b], grad)
    truth = with_gradients(unfused, to_float64([x, w, b]), grad)
    assert_as_good(names, [y, dx, dw.to(dtype), db.to(dtype)], theirs, truth)
    skip = LAYOUTS[grad_layout](torch.ones_like(x))
    with_skip = _cuda.group_norm_relu_backward(grad, x, mean, rstd, w, b, True, skip)
    expected = dx.double() + 1
    rounding = torch.finfo(dtype).eps * expected.abs().max()
    assert (with_skip[0].double() - expected).abs().max() <= 2 * rounding


@pytest.mark.parametrize(
    "shape, format",
    [
        ((3, 8), torch.contiguous_format),
        ((3, 8, 1, 1), torch.contiguous_format),
        ((3, 1, 4, 5), torch.contiguous_format),
        ((2, 8, 3, 4, 5), torch.channels_last_3d),
        ((0, 8, 3, 3), torch.channels_last),
        ((0, 8, 3, 3), torch.contiguous_format),
        ((2, 8, 0, 3), torch.channels_last),
    ],
    ids=str,
)
def test_other_shapes(shape, format):
    x = torch.randn(shape).contiguous(memory_format=format)
    groups = min(4, shape[1])
    assert _cuda.group_norm_relu_refusal(x, groups, (9, 0), backward=True) is None
    ours = _cuda.group_norm_relu(x, groups, None, None, 1e-5, True)
    theirs = torch.ops.bit_kernels.group_norm_relu(x, groups, None, None, 1e-5, True)
    grad = torch.randn_like(x)
    ours += _cuda.group_norm_relu_backward(grad, x, *ours[1:], None, None, True)
    theirs += torch.ops.bit_kernels.group_norm_relu_backward(grad, x, *theirs[1:], None, None, True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_group_norm_relu_opcheck():
    (x, w, b), grad = make((2, 8, 4, 6), 4, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(_cuda.group_norm_relu, (x, 4, w, b, 1e-5, True))
    _, mean, rstd = _cuda.group_norm_relu(x, 4, w, b, 1e-5, True)
    torch.library.opcheck(_cuda.group_norm_relu_backward, (grad, x, mean, rstd, w, b, True, grad))


X = torch.zeros(2, 8, 3, 3).to(memory_format=torch.channels_last)
MEAN = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 8, 3, 3)), "input is contiguous; it must be channels_last"),
        (dict(x=X.double()), "input has a dtype without a .* kernel"),
        (dict(x=torch.zeros(8)), "input must have at least 2 dimensions"),
        (dict(groups=3), "num_groups is 3; it must divide the 8 channels"),
        (dict(groups=0), "num_groups is 0"),
        (dict(w=torch.zeros(7)), r"weight must have shape \(8,\)"),
        (dict(b=torch.zeros(8).half()), "bias must be float32 or have the input's dtype"),
    ],
)
def test_group_norm_relu_refuses(change, message):
    given = dict(x=X, groups=4, w=None, b=None) | change
    with pytest.raises(RuntimeError, match=f"group_norm_relu_cuda: {message}"):
        _cuda.group_norm_relu(*given.values(), 1e-5, True)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grad=X[:, :, :2]), "grad_output has size 2 in dimension 2, the input 3"),
        (dict(grad=X.half()), "grad_output differs from the input in device or dtype"),
        (dict(mean=torch.zeros(2, 4, 1)), "mean must have shape"),
        (dict(mean=torch.zeros(1, 4)), "mean must be a contiguous float32 .* of 8 elements"),
        (dict(rstd=MEAN.double()), "rstd must be a contiguous float32"),
        (dict(skip=X[:1]), "grad_skip has size 1 in dimension 0, the input 2"),
    ],
)
def test_group_norm_relu_backward_refuses(change, message):
    given = dict(grad=X, mean=MEAN, rstd=MEAN, skip=None) | change
    with pytest.raises(RuntimeError, match=f"group_norm_relu_backward_cuda: {message}"):
        _cuda.group_norm_relu_backward(
            given["grad"], X, given["mean"], given["rstd"], None, None, True, given["skip"]
        )


def test_says_why_a_slice_is_too_large(group_norm):
    group_norm.reset(per_block=20_000)
    x = torch.zeros(1, 8, 400, 100).to(memory_format=torch.channels_last)
    message = "a slice of 40000 pixels takes .* KiB of shared memory in each of 8 blocks"
    with pytest.raises(RuntimeError, match=message):
        _cuda.group_norm_relu(x, 4, None, None, 1e-5, True)


# ---- sgd

OPTIONS = dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.02)
FLAGS = dict(nesterov=False, maximize=True, fresh=False, project=True, eps=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_sgd(layout, grad_layout):
    """Weights are stepped where they lie, whatever the layouts of what belongs to them."""
    random = torch.Generator().manual_seed(0)
    plain = [torch.randn(12, 20, 3, 5, generator=random) * 0.1 for _ in range(3)]
    arrange = (LAYOUTS[layout], LAYOUTS[grad_layout], LAYOUTS[layout])
    lists = [[f(t.clone())] for f, t in zip(arrange, plain, strict=True)]
    places = [LAYOUTS[grad_layout](torch.full_like(plain[0], torch.nan))]
    strides = lists[0][0].stride()
    _cuda.sgd(*lists, places, *OPTIONS.values(), *FLAGS.values())
    ours = [lists[0][0], lists[2][0], places[0]]
    results = []
    for wide in (False, True):
        copies = [[t.double() if wide else t.clone()] for t in (*plain, plain[0])]
        reference.sgd(*copies, **OPTIONS, **FLAGS)
        results.append([copies[0][0], copies[2][0], copies[3][0]])
    assert_as_good(["weight", "momentum", "standardized"], ours, *results)
    assert lists[0][0].stride() == strides
    norm = _cuda.sgd_gradient_norm([lists[0][0]], lists[1], 1e-10)
    true = reference.project_gradient(plain[1].double(), lists[0][0].double()).norm()
    torch.testing.assert_close(norm[0].double(), true, rtol=1e-5, atol=0)


def test_sgd_of_nothing():
    step = functools.partial(_cuda.sgd, lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.0)
    for shape in [(0, 4, 3, 3), (4, 0, 3, 3)]:
        empty, full = torch.zeros(shape), torch.ones(2, 3)
        grads, places = [empty, torch.ones(2, 3)], [empty.clone(), torch.zeros(2, 3)]
        step([empty, full], grads, [], places, **FLAGS | dict(project=False))
        torch.testing.assert_close(full, torch.full((2, 3), 1.1))
        assert _cuda.sgd_gradient_norm([empty], [empty], 1e-10).tolist() == [0]


def test_sgd_opcheck():
    w, g, m, wh = (torch.randn(4, 6, 3, 5) for _ in range(4))
    torch.library.opcheck(_cuda.sgd, ([w], [g], [m], [wh], *OPTIONS.values(), *FLAGS.values()))
    torch.library.opcheck(_cuda.sgd_gradient_norm, ([w], [g], 1e-10))


W, DOUBLE = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "lists, message",
    [
        (([W], [W[:2]], [W], [W]), "grads has size 2 in dimension 0, its weight 4"),
        (([W], [W], [], [W]), "momenta has 0 tensors, weights has 1"),
        (([W], [DOUBLE], [W], [W]), "grads must be float32 .* tensors"),
        (([DOUBLE], [W], [W], [W]), "weights must be float32 .* tensors"),
        (([W], [W], [DOUBLE], [W]), "momenta must be float32 .* tensors"),
        (([W], [W], [W], []), "project is True"),
        (([W], [W], [W], [DOUBLE]), "standardized has a dtype without a .* kernel"),
        (([W, W], [W, W], [W, W], [W, W.half()]), "standardized must all have one dtype"),
        (([W[0]], [W[0]], [W[0]], [W[0]]), "must have at least 2 dimensions"),
    ],
)
def test_sgd_refuses(lists, message):
    with pytest.raises(RuntimeError, match=f"sgd_cuda: .*{message}"):
        _cuda.sgd(*lists, *OPTIONS.values(), *FLAGS.values())
    assert not W.any()
