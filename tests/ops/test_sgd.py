"""sgd: the kernel against plain float64 code and against torch.optim.SGD, with every option."""

import itertools

import pytest
import torch
from checking import BACKEND, DEVICE, DTYPES, INTERPRETED, LAYOUTS, assert_as_good, of_the_cpu

from bit_kernels import reference
from bit_kernels.functional import sgd, standardize_weight
from bit_kernels.ops.sgd import gradient_norms, project_gradients

# Why each is here.
SAMPLES = {
    "root": (64, 3, 7, 7),  # rows of 147: no multiple of a vector
    "one_by_one": (48, 64, 1, 1),  # rows that go through the stages 16 at a time
    "three_by_three": (24, 40, 3, 3),
    "short_rows": (7, 5, 1, 1),
    "one_row": (1, 33, 3, 3),
    "past_one_chunk": (3, 520, 3, 3),  # rows of 4680 > 4096
    "linear": (6, 20),
    "volume": (4, 3, 2, 3, 5),
}
OPTIONS = [
    dict(lr=0.1),
    dict(lr=0.1, weight_decay=0.02, maximize=True),
    dict(lr=0.1, momentum=0.9, weight_decay=0.02, fresh=True),
    dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.02),
    dict(lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True),
    dict(lr=0.1, momentum=0.9, maximize=True, nesterov=True, fresh=True),
    dict(lr=0.0, momentum=0.9),
]
NAMES = ("weight", "momentum", "standardized")


def make(shape, layout="contiguous"):
    """Weight, gradient and momentum."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random) * 0.02 + 0.01
    arrange = LAYOUTS[layout] if len(shape) == 4 else LAYOUTS["contiguous"]
    others = [torch.randn(shape, generator=random) * 0.01 for _ in range(2)]
    return [arrange(tensor.to(DEVICE)) for tensor in (weight, *others)]


def step(function, tensors, options, dtype=torch.float32, wide=False, keeps=True):
    """[weight, momentum, standardized] after a step; what must be overwritten is NaN before it."""
    weight, grad, momentum = (t.double() if wide else t.clone() for t in tensors)
    if options.get("fresh"):
        momentum.fill_(torch.nan)
    places = []
    if keeps:
        like = torch.empty_like(weight)  # dense
        places = [like.to(torch.float64 if wide else dtype).fill_(torch.nan)]
    function([weight], [grad], [momentum], places, **options)
    return [weight, momentum, *places]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(options, project, dtype):
    samples = SAMPLES
    if INTERPRETED:  # a program a row takes its time
        samples = SAMPLES | {"root": (5, 3, 7, 7), "three_by_three": (5, 40, 3, 3)}
    for sample, shape in samples.items():
        options = options | dict(project=project, eps=1e-10)
        tensors = make(shape)
        ours = step(sgd, tensors, options, dtype)
        theirs = step(reference.sgd, tensors, options, dtype)
        truth = step(reference.sgd, tensors, options, wide=True)
        assert_as_good([f"{name} of {sample}" for name in NAMES], ours, theirs, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(layout, grad_layout):
    """Weights are stepped where they lie, whatever the gradient's layout."""
    weight, grad, momentum = make(SAMPLES["three_by_three"], layout)
    tensors = [weight, LAYOUTS[grad_layout](grad), momentum]
    options = OPTIONS[3] | dict(project=True)
    truth = step(reference.sgd, tensors, options, wide=True)
    theirs = step(reference.sgd, tensors, options)
    strides = weight.stride()
    places = [standardize_weight(weight).fill_(torch.nan)]
    sgd([weight], [tensors[1]], [momentum], places, **options)
    assert_as_good(NAMES, [weight, momentum, *places], theirs, truth)
    assert weight.stride() == strides


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_torch_sgd_on_plain_tensors(options):
    """Tensors of all sizes in one call, none of them standardized, over three steps."""
    shapes = [(3,), (1,), (17,), (129, 7), (4, 4, 3, 3), (0, 5), ()]
    random = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=random).to(DEVICE) for shape in shapes]
    theirs = [torch.nn.Parameter(w.double()) for w in ours]
    momenta = [torch.full_like(w, torch.nan) for w in ours]
    options = {k: v for k, v in options.items() if k != "fresh"}
    optimizer = torch.optim.SGD(theirs, **options)
    for number in range(3):
        grads = [torch.randn(shape, generator=random).to(DEVICE) for shape in shapes]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
        sgd(ours, grads, momenta, fresh=number == 0, **options)
    for w, p in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w.double(), p.detach(), rtol=1e-5, atol=1e-6)


def test_projection_is_the_backward_of_standardization():
    weight, grad, _ = make(SAMPLES["three_by_three"])
    leaf = weight.double().requires_grad_()
    reference.standardize_weight(leaf, 1e-3).backward(grad.double())
    projected = reference.project_gradient(grad.double(), weight.double(), 1e-3)
    torch.testing.assert_close(projected, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_standardized_has_the_bits_of_standardize_weight(layout, dtype):
    """So training goes on alike whether the optimizer or the layer standardized."""
    streamed = {"streamed": (300, 1024, 1, 1)} if BACKEND == "cpp" else {}
    for shape in (SAMPLES | streamed).values():
        weight, _, standardized = step(sgd, make(shape, layout), OPTIONS[2], dtype)
        assert torch.equal(standardized, standardize_weight(weight, backend=BACKEND).to(dtype))


@of_the_cpu
def test_same_bits_for_any_number_of_threads():
    shapes = [(96, 64, 3, 3), (7, 5, 1, 1), (200, 147, 1, 1), (64, 512, 1, 1)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights, grads, momenta = (list(ts) for ts in zip(*map(make, shapes)))
        places = [torch.full_like(w, torch.nan) for w in weights]
        sgd(weights, grads, momenta, places, project=True, **OPTIONS[3])
        plain = [w.flatten()[: 40000 - i] for i, w in enumerate(weights)]
        sgd(plain, [g.flatten()[: w.numel()] for g, w in zip(grads, plain)], lr=0.1)
        norms = gradient_norms(weights, grads)
        results.append([*weights, *momenta, *places, *norms])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
def test_norm_of_projected_gradients(norm_type):
    # A gradient nearly along the weight, of which the projection leaves next to nothing.
    along = [standardize_weight(make(shape)[0]) for shape in SAMPLES.values()]
    for hidden in (0.0, 1e3):
        weights, grads, _ = (list(ts) for ts in zip(*map(make, SAMPLES.values())))
        grads = [g + hidden * a for g, a in zip(grads, along, strict=True)]
        norms = gradient_norms(weights, grads, 1e-10, norm_type)
        for w, g, norm in zip(weights, grads, norms, strict=True):
            true, plain = (
                torch.linalg.vector_norm(reference.project_gradient(g.to(t), w.to(t)), norm_type)
                for t in (torch.float64, torch.float32)
            )
            bound = 2 * (plain - true).abs() + 1e-5 * true + 1e-5 * hidden
            assert (norm - true).abs() <= bound


def test_gradients_projected_in_place():
    weights, grads, _ = (list(ts) for ts in zip(*map(make, SAMPLES.values())))
    weights[2], grads[2] = (LAYOUTS["slice"](t) for t in (weights[2], grads[2]))
    truth = [
        reference.project_gradient(g.double(), w.double())
        for g, w in zip(grads, weights, strict=True)
    ]
    theirs = [reference.project_gradient(g, w) for g, w in zip(grads, weights, strict=True)]
    versions = [g._version for g in grads]
    project_gradients(weights, grads)
    assert_as_good(list(SAMPLES), grads, theirs, truth)
    assert all(g._version > before for g, before in zip(grads, versions, strict=True))


def test_lr_in_a_tensor():
    weight, grad, momentum = make(SAMPLES["short_rows"])
    for other in (torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64, device=DEVICE)):
        expected = step(sgd, (weight, grad, momentum), OPTIONS[4], keeps=False)
        found = step(sgd, (weight, grad, momentum), OPTIONS[4] | dict(lr=other), keeps=False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="lr is a tensor of 2 elements"):
        sgd([weight], [grad], lr=torch.ones(2))


def test_version_counters_tell_autograd():
    weight, grad, momentum = make((4, 6, 3, 3))
    place = torch.empty_like(weight)
    before = weight._version, place._version
    sgd([weight], [grad], [momentum], [place], **OPTIONS[3])
    assert weight._version > before[0] and place._version > before[1]


def test_opcheck():
    weight, grad, momentum = make((4, 6, 3, 5), "channels_last")
    arguments = (0.1, 0.9, 0.0, 0.01, False, False, False, True, 1e-10)
    op = torch.ops.bit_kernels.sgd.default
    places = [torch.zeros_like(weight)]
    torch.library.opcheck(op, ([weight], [grad], [momentum], places, *arguments))
    torch.library.opcheck(
        torch.ops.bit_kernels.sgd_gradient_norm.default, ([weight], [grad], 1e-10)
    )


def test_empty():
    sgd([], [], lr=0.1)
    assert gradient_norms([], []) == []
    for shape in [(0, 4, 3, 3), (4, 0, 3, 3)]:
        weight = torch.zeros(shape, device=DEVICE)
        sgd([weight], [weight], [], [weight.clone()], lr=0.1, project=True)
        assert gradient_norms([weight], [weight])[0] == 0


def test_plain_op_matches_kernel():
    """What the ops do on a device without a kernel of ours (bit_kernels/ops)."""
    from bit_kernels.ops import sgd as module

    kernel, plain = (
        [*make((6, 5, 3, 3)), torch.zeros(6, 5, 3, 3, device=DEVICE)] for _ in range(2)
    )
    arguments = (0.1, 0.9, 0.0, 0.01, True, False, False, True, 1e-10)
    torch.ops.bit_kernels.sgd(*([t] for t in kernel), *arguments)
    module._plain(*([t] for t in plain), *arguments)
    for a, b in zip(kernel, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    weight, grad, _, _ = kernel
    norms = torch.ops.bit_kernels.sgd_gradient_norm([weight], [grad], 1e-10)
    torch.testing.assert_close(norms, module._plain_norm([weight], [grad], 1e-10))


W, DOUBLE = (torch.zeros(4, 3, dtype=t, device=DEVICE) for t in (torch.float32, torch.float64))


@pytest.mark.parametrize(
    "lists, options, message",
    [
        (([W], []), {}, "grads has 0 tensors; it must have one for each of 1 weights"),
        (([W], [torch.zeros(3, 4)]), {}, r"grads has shape \(3, 4\); its weight has \(4, 3\)"),
        (([W], [DOUBLE]), {}, "grads has torch.float64 on .*; it must be torch.float32 on"),
        (([W, DOUBLE], [W, DOUBLE]), {}, "weights has torch.float64 on .* beside torch.float32"),
        (([W.int()], [W.int()]), {}, "weights has torch.int32"),
        (([W], [W.to_sparse()]), {}, "grads has a torch.sparse_coo tensor; it must be dense"),
        (([W], [W]), dict(momentum=0.9), "momenta has 0 tensors"),
        (([W], [W]), dict(project=True), "project is True; it may be so with standardized"),
        (([W], [W], [], [W.int()]), {}, "standardized has torch.int32; it may be a floating"),
        (([W, W], [W, W], [], [W, DOUBLE]), {}, "standardized has torch.float64 on .*; it must"),
        (([W[0]], [W[0]], [], [W[0]]), {}, r"weights has shape \(3,\); a standardized one must"),
        (([W], [W]), dict(backend="numpy"), "backend is 'numpy'; it may be None or one of"),
        (([DOUBLE], [DOUBLE]), dict(backend=BACKEND), "the kernels take float32"),
        (([W.half()], [W.half()]), dict(backend=BACKEND), "the kernel takes float32 weights"),
    ],
)
def test_refuses(lists, options, message):
    with pytest.raises(ValueError, match=message):
        sgd(*lists, lr=0.1, **options)
    assert not W.any()


def test_the_op_itself_refuses():
    """Reached without the public function, it still touches no memory that isn't there."""
    arguments = (0.1, 0.9, 0.0, 0.0, False, False, False, True, 1e-10)
    op = torch.ops.bit_kernels.sgd
    for lists, message in [
        (([W], [W[:2]], [W], [W]), "grads has s.*2"),
        (([W], [W], [], [W]), "momenta has 0 tensors"),
        (
            ([W], [DOUBLE], [W], [W]),
            "grads (must be float32|has torch.float64 .* must be torch.float32)",
        ),
        (([W], [W], [W], []), "project is True"),
        (([W], [W], [W], [DOUBLE]), "standardized has (a dtype without|torch.float64; the kernel)"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            op(*lists, *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs_own(dtype):
    """Weights without a kernel take the steps that torch.optim.SGD takes, to the same bits."""
    for (nesterov, maximize), dampening in itertools.product([(0, 1), (1, 0)], [0.0, 0.3]):
        dampening = 0.0 if nesterov else dampening
        options = dict(momentum=0.9, dampening=dampening, weight_decay=0.1)
        options |= dict(nesterov=bool(nesterov), maximize=bool(maximize))
        weight, grad, momentum = (t.to(dtype) for t in make((4, 6, 3, 3)))
        p = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([p], lr=0.1, foreach=False, **options)
        for number in range(2):
            p.grad = grad.clone()
            optimizer.step()
            sgd([weight], [grad], [momentum], lr=0.1, fresh=number == 0, **options)
        assert torch.equal(weight, p)
