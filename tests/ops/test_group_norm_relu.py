"""group_norm_relu: every backend against plain float64 code, forward and backward."""

import functools
import importlib

import pytest
import torch
from checking import (
    BACKEND,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_as_good,
    leave_small_tensors_to_pytorch,
    of_the_cpu,
    to_float64,
    with_gradients,
)

from bit_kernels import reference
from bit_kernels.functional import group_norm_relu

# (shape, groups): why it is here. No larger: each runs in every dtype and layout.
SAMPLES = {
    "round": ((2, 64, 8, 8), 32),
    "odd": ((3, 6, 7, 5), 3),
    "one_channel_groups": ((2, 5, 3, 9), 5),
    "one_group": ((2, 7, 11, 3), 1),
    "one_pixel": ((4, 64, 1, 1), 32),
    "one_row_of_lanes": ((1, 16, 1, 16), 2),
    "tail_of_every_vector": ((2, 18, 3, 7), 2),
    "past_one_chunk": ((1, 4, 67, 71), 2),  # contiguous groups of 9514 > 4096, 4757 pixels > 256
    "past_one_run": ((1, 2, 131, 127), 1),  # channels of 16637 > 16384 elements
    "wide": ((1, 2080, 3, 3), 32),
    "parallel": ((5, 32, 24, 24), 8),  # 92160 elements: threads, and samples that are left over
}
# Outputs past kStreamBytes (4 MiB) in every dtype, in the layouts that can be streamed.
STREAMED = {
    "streamed": ((2, 32, 256, 144), 32),  # rows of whole cache lines
    "streamed_unaligned": ((1, 33, 267, 263), 3),  # runs that start and end anywhere
}
CASES = [(name, layout) for name in SAMPLES for layout in LAYOUTS]
if BACKEND == "cpp":
    CASES += [(name, layout) for name in STREAMED for layout in ("contiguous", "channels_last")]
NAMES = ["output", "grad_input", "grad_weight", "grad_bias"]


def unfused(relu, groups, eps=1e-5):
    return functools.partial(_unfused, relu=relu, groups=groups, eps=eps)


def _unfused(x, w=None, b=None, *, relu, groups, eps):
    return reference.group_norm_relu(x, groups, w, b, eps, relu=relu)


def make(shape, groups, dtype, layout="contiguous", affine=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * 2 + torch.randn(shape[1], generator=random).view(
        -1, *[1] * (len(shape) - 2)
    )
    x = LAYOUTS[layout](x.to(DEVICE, dtype))
    inputs = [x]
    if affine:
        inputs += [torch.randn(shape[1], generator=random).to(DEVICE, dtype) for _ in range(2)]
    grad = torch.randn(shape, generator=random).to(DEVICE, dtype)
    # Where the ReLU's input is next to zero, rounding decides the mask: no gradient comes in there.
    linear = unfused(False, groups)(*to_float64(inputs))
    grad[linear.abs() < 1e-2] = 0
    return inputs, grad


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample, layout", CASES)
def test_matches_reference(sample, layout, dtype, relu):
    shape, groups = (SAMPLES | STREAMED)[sample]
    inputs, grad = make(shape, groups, dtype, layout)
    fused = functools.partial(_fused, groups=groups, relu=relu)
    ours = with_gradients(fused, inputs, grad)
    theirs = with_gradients(unfused(relu, groups), inputs, grad)
    truth = with_gradients(unfused(relu, groups), to_float64(inputs), grad)
    assert_as_good(NAMES, ours, theirs, truth)


def _fused(x, w=None, b=None, *, groups, relu, eps=1e-5):
    return group_norm_relu(x, groups, w, b, eps, relu=relu, backend=BACKEND)


@pytest.mark.parametrize("present", ["neither", "weight", "bias"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_absent_parameters(present, layout):
    (x, w, b), grad = make((2, 12, 5, 4), 4, torch.float32, layout)
    inputs = [x, w if present == "weight" else None, b if present == "bias" else None]
    linear = unfused(False, 4)(*to_float64(inputs))
    grad[linear.abs() < 1e-2] = 0
    names = ["output", "grad_input"] + ([f"grad_{present}"] if present != "neither" else [])
    ours = with_gradients(functools.partial(_fused, groups=4, relu=True), inputs, grad)
    theirs = with_gradients(unfused(True, 4), inputs, grad)
    truth = with_gradients(unfused(True, 4), to_float64(inputs), grad)
    assert_as_good(names, ours, theirs, truth)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (2, 8, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dimensions(shape, dtype):
    inputs, grad = make(shape, 4, dtype)
    ours = with_gradients(functools.partial(_fused, groups=4, relu=True), inputs, grad)
    theirs = with_gradients(unfused(True, 4), inputs, grad)
    assert_as_good(NAMES, ours, theirs, with_gradients(unfused(True, 4), to_float64(inputs), grad))


def test_channels_last_3d():
    inputs, grad = make((2, 8, 3, 4, 5), 4, torch.float32)
    inputs[0] = inputs[0].to(memory_format=torch.channels_last_3d)
    ours = with_gradients(functools.partial(_fused, groups=4, relu=True), inputs, grad)
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d)
    theirs = with_gradients(unfused(True, 4), inputs, grad)
    assert_as_good(NAMES, ours, theirs, with_gradients(unfused(True, 4), to_float64(inputs), grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype):
    (x, w, b), grad = make((2, 32, 5, 5), 8, dtype)
    inputs = [x, w.float(), b.float()]
    ours = with_gradients(functools.partial(_fused, groups=8, relu=True), inputs, grad)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    truth = with_gradients(unfused(True, 8), to_float64(inputs), grad)
    theirs = with_gradients(unfused(True, 8), inputs, grad)
    assert_as_good(NAMES, ours, theirs, truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(layout):
    """E[x^2] - E[x]^2 in float32 would lose every digit of the variance here."""
    x = LAYOUTS[layout](
        torch.randn(2, 8, 40, 40, generator=torch.Generator().manual_seed(0)) + 1000
    )
    truth = reference.group_norm_relu(x.double(), 4)
    assert (group_norm_relu(x, 4).double() - truth).abs().max() < 2e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_element_far_from_the_rest(layout):
    """The sums are taken about a value near the first elements."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 300.0
    x = LAYOUTS[layout](x)
    truth = reference.group_norm_relu(x.double(), 2, relu=False)
    assert (group_norm_relu(x, 2, relu=False).double() - truth).abs().max() < 1e-4


@of_the_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 8, 96, 96), (3, 6, 70, 70), (5, 32, 24, 24)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, layout):
    inputs, grad = make(shape, 2, torch.float32, layout)
    fused = functools.partial(_fused, groups=2, relu=True)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(with_gradients(fused, inputs, grad))
    for other in results[1:]:
        for name, first, second in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(first, second), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    (x, w, b), _ = make((2, 8, 4, 6), 4, torch.float32, layout)
    args = (x.requires_grad_(), 4, w.requires_grad_(), b.requires_grad_(), 1e-5, True)
    torch.library.opcheck(torch.ops.bit_kernels.group_norm_relu.default, args)
    statistics = torch.ops.bit_kernels.group_norm_relu(*[_detached(a) for a in args])[1:]
    backward_args = (torch.randn_like(x), x, *statistics, w, b, True)
    torch.library.opcheck(
        torch.ops.bit_kernels.group_norm_relu_backward.default,
        tuple(_detached(a) for a in backward_args),
    )


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_compiles_without_graph_break(layout):
    inputs, grad = make((2, 8, 5, 6), 4, torch.float32, layout)
    fused = functools.partial(_fused, groups=4, relu=True)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = with_gradients(fused, inputs, grad)
    for name, a, b in zip(NAMES, with_gradients(compiled, inputs, grad), expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), name


def test_second_gradient():
    (x, w, b), grad = make((2, 4, 3, 3), 2, torch.float32)

    def penalty(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        output = function(leaves[0], 2, leaves[1], leaves[2])
        first = torch.autograd.grad(output, leaves, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for ours, truth in zip(
        penalty(group_norm_relu, torch.float32),
        penalty(reference.group_norm_relu, torch.float64),
        strict=True,
    ):
        assert torch.allclose(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for():
    (x, w, b), grad = make((2, 8, 4, 4), 4, torch.float32)
    w.requires_grad_()
    output = group_norm_relu(x, 4, w, b)
    output.backward(grad)
    assert w.grad is not None and x.grad is None and b.grad is None


def test_groups_of_one_element():
    """The normalised value is 0 and the input has no influence."""
    x = torch.randn(2, 3, 1, 1, requires_grad=True)
    w, b = torch.randn(3), torch.tensor([1.0, -1.0, 0.5])
    y = group_norm_relu(x, 3, w, b)
    assert torch.equal(y, b.relu().view(1, 3, 1, 1).expand(2, 3, 1, 1))
    y.sum().backward()
    assert x.grad.abs().max() < 1e-4


def test_nan_is_not_hidden():
    x = torch.randn(2, 4, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    y = group_norm_relu(x, 2)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (0, 8)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    w, b = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = group_norm_relu(x, 4, w, b)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and not w.grad.any() and not b.grad.any()


def test_expanded_input():
    x = torch.randn(1, 8, 1, 4).expand(3, 8, 5, 4)
    assert torch.allclose(group_norm_relu(x, 2), reference.group_norm_relu(x, 2), atol=1e-6)


def test_float64_runs_plain_and_says_so_once(monkeypatch):
    # The package offers a function of the module's name.
    monkeypatch.setattr(importlib.import_module("bit_kernels.backends"), "_told", set())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="without a fused kernel.*float64"):
        y = group_norm_relu(x, 2)
    assert torch.equal(y, reference.group_norm_relu(x, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_groups=3), "num_groups is 3; it must divide the input's 8 channels"),
        (dict(num_groups=0), "num_groups is 0"),
        (dict(num_groups=-2), "num_groups is -2"),
        (dict(input=torch.zeros(2, 8, 3, dtype=torch.int64)), "dtype torch.int64"),
        (dict(input=torch.zeros(8)), r"shape \(8,\); it must be \(N, C, \*\)"),
        (dict(weight=torch.ones(7)), r"weight has shape \(7,\).*must be \(8,\)"),
        (dict(bias=torch.ones(8, 1)), r"bias has shape \(8, 1\)"),
        (dict(weight=torch.ones(8, dtype=torch.float64)), "weight has dtype torch.float64"),
        (dict(weight=torch.ones(8, device="meta")), "weight is on meta, the input on cpu"),
        (dict(backend="fast"), "backend is 'fast'; it may be None or one of"),
        (dict(backend="cuda"), "backend 'cuda' can't serve.*no kernel for device type 'cpu'"),
        (
            dict(input=torch.zeros(2, 8, dtype=torch.float64), backend="cpp"),
            "backend 'cpp' can't serve.*float64",
        ),
    ],
)
@pytest.mark.parametrize("small_elements", [0, 1000])
def test_refuses(change, message, small_elements, monkeypatch):
    """On the way to the kernel and on the way around it."""
    leave_small_tensors_to_pytorch(monkeypatch, small_elements)
    arguments = dict(input=torch.zeros(2, 8, 3), num_groups=4) | change
    with pytest.raises(ValueError, match=message):
        group_norm_relu(**arguments)


def test_the_op_itself_refuses_what_does_not_fit():
    op = torch.ops.bit_kernels.group_norm_relu
    refusal = (RuntimeError, ValueError)
    with pytest.raises(refusal, match="num_groups is 3; it must divide the (input's )?8 channels"):
        op(torch.zeros(2, 8, 3), 3, None, None, 1e-5, True)
    with pytest.raises(refusal, match="weight (must have|has) shape"):
        op(torch.zeros(2, 8, 3), 4, torch.ones(9), None, 1e-5, True)
    _, mean, rstd = op(torch.zeros(2, 8, 3), 4, None, None, 1e-5, True)
    with pytest.raises(refusal, match="grad_output (has size 4 in dimension 2|is .*2, 8, 4)"):
        torch.ops.bit_kernels.group_norm_relu_backward(
            torch.zeros(2, 8, 4), torch.zeros(2, 8, 3), mean, rstd, None, None, True
        )


@of_the_cpu
def test_more_elements_than_32_bits_count():
    """2^31 + 2^20 elements, the last of them the ones that matter."""
    page = 4 << 30
    free = _free_bytes()
    if free < 3 * page:
        pytest.skip(f"needs {3 * page >> 30} GiB of free memory, {free >> 30} are")
    torch.utils.deterministic.fill_uninitialized_memory = False  # 9 GB of NaN take seconds
    pixels = (1 << 30) + (1 << 19)
    x = torch.zeros(1, 2, pixels, dtype=torch.bfloat16)
    x[0, 1, -4:] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    y = group_norm_relu(x, 2, relu=True)
    deviation = (10 / pixels + 1e-5) ** 0.5
    expected = torch.tensor([1.0, 0.0, 2.0, 0.0]) / deviation
    assert torch.allclose(y[0, 1, -4:].float(), expected, rtol=1e-2)
    assert y[0, 0, -4:].tolist() == [0, 0, 0, 0]


def _free_bytes() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 0


def test_plain_op_matches_kernel():
    """What the op does on a device without a kernel of ours (bit_kernels/ops)."""
    from bit_kernels.ops import group_norm_relu as module

    (x, w, b), grad = make((2, 12, 5, 4), 4, torch.float32)
    kernel = torch.ops.bit_kernels.group_norm_relu(x, 4, w, b, 1e-5, True)
    plain = module.plain(x, 4, w, b, 1e-5, True)
    for a, c in zip(kernel, plain, strict=True):
        assert torch.allclose(a, c, atol=1e-5)
    arguments = (grad, x, kernel[1], kernel[2], w, b, True)
    kernel = torch.ops.bit_kernels.group_norm_relu_backward(*arguments)
    for a, c in zip(kernel, module.plain_backward(*arguments), strict=True):
        assert torch.allclose(a, c, atol=1e-5)
