"""standardize_weight: every backend against plain float64 code, forward and backward."""

import functools

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
from bit_kernels.functional import standardize_weight

# Why each is here.
SAMPLES = {
    "root": (64, 3, 7, 7),  # rows of 147: no multiple of a vector
    "one_by_one": (16, 64, 1, 1),
    "three_by_three": (24, 40, 3, 3),
    "short_rows": (7, 5, 1, 1),
    "one_row": (1, 33, 3, 3),
    "past_one_chunk": (3, 520, 3, 3),  # rows of 4680 > 4096
    "parallel": (96, 64, 3, 3),  # 55296 elements
}
NAMES = ["output", "grad_weight"]
fused = functools.partial(standardize_weight, backend=BACKEND)


def make(shape, dtype, layout="contiguous"):
    random = torch.Generator().manual_seed(0)
    # Kernels as small as trained ones, off centre.
    weight = torch.randn(shape, generator=random) * 0.02 + 0.01
    grad = torch.randn(shape, generator=random)
    return LAYOUTS[layout](weight.to(DEVICE, dtype)), grad.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, layout, dtype):
    weight, grad = make(SAMPLES[sample], dtype, layout)
    ours = with_gradients(fused, [weight], grad)
    theirs = with_gradients(reference.standardize_weight, [weight], grad)
    truth = with_gradients(reference.standardize_weight, to_float64([weight]), grad)
    assert_as_good(NAMES, ours, theirs, truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last"])
def test_gradient_in_another_layout(layout, grad_layout):
    weight, grad = make((24, 40, 3, 3), torch.float32, layout)
    ours = with_gradients(fused, [weight], LAYOUTS[grad_layout](grad))
    truth = with_gradients(reference.standardize_weight, to_float64([weight]), grad)
    theirs = with_gradients(reference.standardize_weight, [weight], grad)
    assert_as_good(NAMES, ours, theirs, truth)
    assert ours[0].stride() == weight.stride() == ours[1].stride()


@pytest.mark.parametrize("shape", [(6, 20), (6, 4, 5), (4, 3, 2, 3, 5)], ids=str)
def test_linear_and_other_convolutions(shape):
    weight, grad = make(shape, torch.float32)
    ours = with_gradients(fused, [weight], grad)
    theirs = with_gradients(reference.standardize_weight, [weight], grad)
    truth = with_gradients(reference.standardize_weight, to_float64([weight]), grad)
    assert_as_good(NAMES, ours, theirs, truth)


def test_eps_is_inside_the_root():
    weight = torch.tensor([[1.0, -1.0], [3.0, 3.0]], device=DEVICE)
    expected = torch.tensor([[0.5, -0.5], [0.0, 0.0]], device=DEVICE)
    assert torch.allclose(fused(weight, 3.0), expected)


def test_mean_far_from_zero():
    weight = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1000
    truth = reference.standardize_weight(weight.double())
    assert (fused(weight).double() - truth).abs().max() < 5e-4


def test_constant_kernel_has_no_gradient():
    weight = torch.full((2, 8), 0.25, requires_grad=True, device=DEVICE)
    output = fused(weight)
    output.backward(torch.ones_like(output))
    assert not output.any() and not weight.grad.any()


@of_the_cpu
def test_same_bits_for_any_number_of_threads():
    weight, grad = make((96, 64, 3, 3), torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(with_gradients(fused, [weight], grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    weight, grad = make((4, 6, 3, 5), torch.float32, layout)
    op = torch.ops.bit_kernels.standardize_weight.default
    torch.library.opcheck(op, (weight.clone().requires_grad_(), 1e-10))
    _, mean, rstd = op(weight, 1e-10)
    torch.library.opcheck(
        torch.ops.bit_kernels.standardize_weight_backward.default, (grad, weight, mean, rstd)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_compiles_without_graph_break(layout):
    weight, grad = make((8, 6, 3, 3), torch.float32, layout)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(compiled, [weight], grad), with_gradients(fused, [weight], grad), strict=True
    ):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_second_gradient():
    weight, grad = make((3, 4, 2, 2), torch.float32)

    def penalty(function, dtype):
        leaf = (weight * 50).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0]

    ours, truth = (
        penalty(standardize_weight, torch.float32),
        penalty(reference.standardize_weight, torch.float64),
    )
    assert torch.allclose(ours.double(), truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (0, 0)], ids=str)
def test_empty(shape):
    weight = torch.randn(shape, requires_grad=True, device=DEVICE)
    output = fused(weight)
    output.sum().backward()
    assert output.shape == weight.grad.shape == shape


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.zeros(3, 3, dtype=torch.int32, device=DEVICE), "dtype torch.int32"),
        (torch.zeros(3, device=DEVICE), r"shape \(3,\); it must be \(C_out, C_in, \*kernel\)"),
    ],
)
@pytest.mark.parametrize("small_elements", [0, 1000])
def test_refuses(weight, message, small_elements, monkeypatch):
    """On the way to the kernel and on the way around it."""
    leave_small_tensors_to_pytorch(monkeypatch, small_elements)
    with pytest.raises(ValueError, match=message):
        standardize_weight(weight)


def test_insisting_on_a_kernel_that_can_not_serve():
    with pytest.raises(ValueError, match=f"backend '{BACKEND}' can't serve.*'meta'"):
        standardize_weight(torch.zeros(3, 3, device="meta"), backend=BACKEND)


def test_the_op_itself_refuses():
    weight, grad = make((6, 5), torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="weight must have at least 2|shape"):
        torch.ops.bit_kernels.standardize_weight(weight[0], 1e-10)
    mean, rstd = torch.ops.bit_kernels.standardize_weight(weight, 1e-10)[1:]
    backward = torch.ops.bit_kernels.standardize_weight_backward
    for arguments, name in [
        ((grad[:4], weight, mean, rstd), "grad_output"),
        ((grad, weight, mean[:2], rstd), "mean"),
        ((grad, weight, mean, rstd.double()), "rstd"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=name):
            backward(*arguments)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_many_weights_are_each_standardized(dtype):
    shapes = [*SAMPLES.values(), (6, 20), (1, 1), (2, 3, 1, 1)]
    weights = [make(shape, torch.float32)[0].requires_grad_() for shape in shapes]
    weights[2] = LAYOUTS["channels_last"](weights[2].detach()).requires_grad_()
    weights[6] = LAYOUTS["slice"](weights[6].detach()).requires_grad_()
    grads = [make(shape, dtype or torch.float32)[1] for shape in shapes]
    together = standardize_weight(weights, 1e-6, dtype=dtype, backend=BACKEND)
    made = torch.autograd.grad(together, weights, grads)
    with torch.no_grad():
        again = standardize_weight(weights, 1e-6, dtype=dtype, backend=BACKEND)
    for weight, output, same, grad, grad_weight in zip(
        weights, together, again, grads, made, strict=True
    ):
        alone = fused(weight, 1e-6, dtype=dtype)
        (right,) = torch.autograd.grad(alone, weight, grad)
        assert torch.equal(output, alone) and torch.equal(same, alone)
        assert torch.equal(grad_weight, right)
        assert output.stride() == alone.stride() and grad_weight.stride() == right.stride()


def test_many_weights_of_which_few_have_a_gradient():
    weights = [make(shape, torch.float32)[0] for shape in [(3, 5), (4, 2, 3, 3), (7, 6), (2, 9)]]
    weights[1].requires_grad_()
    weights[2].requires_grad_()
    outputs = standardize_weight(weights, backend=BACKEND)
    outputs[2].pow(3).sum().backward()
    alone = weights[2].detach().requires_grad_()
    fused(alone).pow(3).sum().backward()
    assert torch.equal(weights[2].grad, alone.grad)
    assert weights[1].grad is None and weights[0].grad is None


def test_second_gradient_of_many_weights():
    leaves = [(make(shape, torch.float32)[0] * 50).requires_grad_() for shape in [(3, 5), (2, 7)]]
    grad = [make(leaf.shape, torch.float32)[1] for leaf in leaves]
    second = []
    for function in (
        lambda: standardize_weight(leaves, backend=BACKEND),
        lambda: [reference.standardize_weight(leaf) for leaf in leaves],
    ):
        first = torch.autograd.grad(function(), leaves, grad, create_graph=True)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
    for ours, right in zip(*second, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)


def test_many_weights_compile_and_refuse():
    weights = [make(shape, torch.float32)[0] for shape in [(3, 5), (4, 2, 3, 3)]]
    compiled = torch.compile(
        lambda ws: standardize_weight(ws, backend=BACKEND), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(compiled(weights), standardize_weight(weights, backend=BACKEND), strict=True):
        assert torch.equal(a, b)
    assert standardize_weight([]) == []
    with pytest.raises(ValueError, match="weight has torch.float64 on .* beside torch.float32"):
        standardize_weight([weights[0], weights[1].double()])
    with pytest.raises(ValueError, match=r"weight has shape \(5,\); it must be \(C_out"):
        standardize_weight([weights[0], weights[0][0]])


def test_plain_op_matches_kernel():
    """What the op does on a device without a kernel of ours (bit_kernels/ops)."""
    from bit_kernels.ops import standardize_weight as module

    weight, grad = make((6, 5, 3, 3), torch.float32)
    kernel = torch.ops.bit_kernels.standardize_weight(weight, 1e-10)
    for a, b in zip(kernel, module.plain(weight, 1e-10), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    arguments = (grad, weight, *kernel[1:])
    a = torch.ops.bit_kernels.standardize_weight_backward(*arguments)
    assert torch.allclose(a, module.plain_backward(*arguments), rtol=1e-4, atol=1e-3)
