"""norm_relu_conv and convolve of JAX: against plain float64 code; what they keep; transformed."""

import importlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import torch
from xla_checking import (
    DTYPES,
    HALF,
    assert_as_reference,
    assert_close,
    assert_exports,
    assert_second_gradients,
    draw,
    nchw,
    nhwc,
    of_jax,
    of_torch,
    oihw,
    to_jax,
    x64,
)

from bit_kernels import reference
from bit_kernels.ops import norm_relu_conv as of_pytorch
from bit_kernels.xla import Conv, Norm, convolve, norm_relu_conv

# The function of that name hides the module.
norm_relu_conv_module = importlib.import_module("bit_kernels.xla.norm_relu_conv")

# Why each is here: (input, groups, convolutions as (kh, kw, C_out) and what else there is of them);
# a None is the input itself.
SAMPLES = {
    "unit": ((2, 9, 7, 16), 4, [((1, 1, 8), {}), None]),
    "projection": ((2, 9, 7, 12), 3, [((1, 1, 8), {}), ((1, 1, 20), dict(stride=(2, 2)))]),
    # Rows and columns that no window reaches.
    "strided": ((3, 8, 6, 8), 8, [((3, 3, 12), dict(stride=(2, 2), padding=(1, 1)))]),
    "asymmetric": (
        (2, 9, 11, 6),
        2,
        [((3, 2, 5), dict(stride=(1, 3), padding=(2, 0), dilation=(2, 1)))],
    ),
    "grouped": ((2, 11, 10, 12), 6, [((3, 3, 6), dict(padding=(2, 2), dilation=(2, 2), groups=3))]),
    "depthwise": ((2, 5, 6, 4), 2, [((3, 3, 8), dict(padding=(1, 0), groups=4))]),
    "four": ((2, 5, 5, 6), 1, [((3, 3, 4), dict(padding=(1, 1))), None, ((1, 1, 5), {}), None]),
}


def convolutions(kind, specs, given, eps, kernel=lambda w: w):
    """Of kind Conv, JAX's or PyTorch's, from tensors by name."""
    return [
        None
        if spec is None
        else kind(kernel(given[f"kernel{i}"]), given.get(f"bias{i}"), eps=eps, **spec[1])
        for i, spec in enumerate(specs)
    ]


def make(sample, dtype=torch.float64, eps=1e-10, relu=True, without=()):
    """(JAX's function, the reference, tensors, gradients of the results); tensors by name."""
    shape, groups, specs = SAMPLES[sample]

    def ours(**given):
        norm = Norm(groups, given.get("weight"), given.get("bias"), relu=relu)
        convs = convolutions(Conv, specs, given, eps)
        return norm_relu_conv(given["input"], norm, convs, residual=given.get("residual"))

    def theirs(**given):
        norm = of_pytorch.Norm(groups, given.get("weight"), given.get("bias"), relu=relu)
        convs = convolutions(of_pytorch.Conv, specs, given, eps, oihw)
        residual = nchw(given["residual"]) if "residual" in given else None
        outputs = reference.norm_relu_conv(nchw(given["input"]), norm, convs, residual)
        return [nhwc(output) for output in outputs]

    tensors = {"input": draw(shape) * 2 + 0.5}
    tensors["weight"], tensors["bias"] = draw(shape[-1:], 1), draw(shape[-1:], 2)
    for i, spec in enumerate(specs):
        if spec is not None:
            (*side, out), more = spec
            tensors[f"kernel{i}"] = (
                draw((*side, shape[-1] // more.get("groups", 1), out), 3 + i) * 0.1
            )
            tensors[f"bias{i}"] = draw((out,), 6 + i)
    outputs = theirs(**tensors)
    tensors["residual"] = draw(outputs[0].shape, 9)
    return (
        ours,
        theirs,
        {name: x.to(dtype) for name, x in tensors.items() if name not in without},
        [draw(output.shape, 10 + i, dtype) for i, output in enumerate(outputs)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype):
    assert_as_reference(*make(sample, dtype))


@pytest.mark.parametrize("sample", [name for name in SAMPLES if name != "depthwise"])
def test_dimensions_of_other_platforms(sample, monkeypatch):
    """A CPU has its own way to gradients; here it takes the other one."""
    taken = []

    def other(*arrays, cpu, default):
        taken.append(default)
        return default(*arrays)

    monkeypatch.setattr(norm_relu_conv_module.lax, "platform_dependent", other)
    assert_as_reference(*make(sample))
    assert taken or sample == "grouped"


def test_a_loop_on_a_cpu_has_convolutions_as_forward():
    """Of other dimensions they are many times slower there."""
    ours, _, tensors, grads = make("strided", torch.float32)
    given, grad = to_jax([tensors, grads[0]])

    def total(given, inputs):
        def add(sum, input):
            return sum + (ours(**given | {"input": input})[0] * grad).sum(), None

        return jax.lax.scan(add, jnp.zeros(()), inputs)[0]

    inputs = jnp.stack([given["input"]] * 3)
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(given, inputs).compile().as_text()
    found = set(re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", compiled))
    assert found == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    "options",
    [
        dict(eps=None),
        dict(relu=False),
        dict(without=("weight", "bias0", "residual")),
        dict(without=("weight", "bias", "bias0", "bias2", "residual")),
    ],
    ids=str,
)
def test_options(options):
    assert_as_reference(*make("four", **options))


def test_mean_far_from_zero():
    ours, theirs, tensors, grads = make("unit", torch.float32)
    tensors["input"] += 1000
    assert_as_reference(ours, theirs, tensors, grads)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_input_with_float32_parameters(dtype):
    """And residual: the result is in the input's dtype, each gradient in its tensor's."""
    ours, theirs, tensors, grads = make("projection", torch.float32)
    tensors["input"] = tensors["input"].to(dtype)
    assert_as_reference(
        ours,
        lambda **given: [output.to(given["input"].dtype) for output in theirs(**given)],
        tensors,
        [grad.to(dtype) for grad in grads],
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradient_of_a_half_kernel_is_float32(dtype):
    """And has digits of the sums that the kernel's dtype would not hold."""
    ours, theirs, *rest = make("strided", dtype, eps=None)
    at = 1 + list(rest[0]).index("kernel0")
    found, true = of_jax(ours, *rest)[at], of_torch(theirs, *rest, wide=True)[at]
    assert found.dtype == torch.float32
    assert error(found, true) < error(found.to(dtype), true)
    # Of a convolution alone nothing else is rounded.
    ours, theirs, *rest = make_alone("strided", dtype, eps=None)
    found, true = of_jax(ours, *rest)[2], of_torch(theirs, *rest, wide=True)[2]
    assert found.dtype == torch.float32 and error(found, true) < 1e-6 * true.abs().max()


def error(ours, true):
    return (ours.double() - true).abs().max()


def make_alone(sample, dtype, eps):
    """As `make`, of the first convolution of a sample alone."""
    _, _, tensors, grads = make(sample, dtype)
    specs = SAMPLES[sample][2][:1]

    def ours(input, **given):
        return convolve(input, *convolutions(Conv, specs, given, eps))

    def theirs(input, **given):
        (conv,) = convolutions(of_pytorch.Conv, specs, given, eps, oihw)
        kernel = conv.weight if eps is None else reference.standardize_weight(conv.weight, eps)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        return nhwc(torch.conv2d(nchw(input), kernel, conv.bias, *geometry))

    return ours, theirs, {n: tensors[n] for n in ("input", "kernel0", "bias0")}, grads[0]


@pytest.mark.parametrize(
    "dtype, eps", [(torch.float64, None), *((d, 1e-10) for d in DTYPES)], ids=str
)
@pytest.mark.parametrize("sample", ["strided", "asymmetric", "grouped"])
def test_convolution_alone(sample, dtype, eps):
    assert_as_reference(*make_alone(sample, dtype, eps))


@pytest.mark.parametrize("sample", ["asymmetric", "four"])
def test_second_gradient(sample):
    assert_second_gradients(*make(sample))


@pytest.mark.parametrize("eps", [None, 1e-10])
def test_second_gradient_of_a_convolution_alone(eps):
    assert_second_gradients(*make_alone("grouped", torch.float64, eps))


def test_second_gradient_in_bfloat16():
    """Sums in float32 between tensors in bfloat16, which JAX must transpose."""
    ours, _, tensors, grads = make("strided", torch.bfloat16, eps=None)

    def penalty(given, grads):
        _, backward = jax.vjp(lambda given: ours(**given), given)
        return sum(
            jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(backward(grads))
        )

    second = jax.jit(jax.grad(penalty))
    found = second(*to_jax([tensors, grads]))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), to_jax([tensors, grads]))
    for name, right in second(*wide).items():
        assert jnp.linalg.norm(found[name] - right) <= 0.03 * jnp.linalg.norm(right), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_for_backward(dtype):
    """The input, the parameters and statistics; of the residual, its dtype."""
    ours, _, tensors, _ = make("four", getattr(torch, dtype))
    _, backward = jax.vjp(lambda given: ours(**given), to_jax(tensors))
    kept = Counter((x.shape, x.dtype.name) for x in jax.tree.leaves(backward))
    given = [tuple(x.shape) for name, x in tensors.items() if name != "residual"]
    statistics = (2, 1, 1, 6), "float32"
    assert kept == Counter([(shape, dtype) for shape in [*given, (0,)]] + 2 * [statistics])


def test_empty_batch():
    ours, _, tensors, grads = make("projection")
    tensors |= {name: tensors[name][:0] for name in ("input", "residual")}
    found = of_jax(ours, tensors, [grad[:0] for grad in grads])
    assert [x.shape for x in found] == [
        (0, 9, 7, 8),
        (0, 5, 4, 20),
        *(x.shape for x in tensors.values()),
    ]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("sample", ["grouped", "strided"])
def test_transformed(sample):
    """Under checkpoint, and differentiated for each sample: the same numbers."""
    ours, _, tensors, grads = make(sample)
    with x64(torch.float64):
        given, grads = to_jax([tensors, grads[0]])

        def loss(given, grads):
            return (ours(**given)[0] * grads).sum()

        gradients = jax.grad(loss)
        right = jax.jit(gradients)(given, grads)
        assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(given, grads), right)
        maps = "input", "residual"
        one_by_one = {name: x[:, None] if name in maps else x for name, x in given.items()}
        axes = {name: 0 if name in maps else None for name in given}
        each = jax.jit(jax.vmap(gradients, (axes, 0)))(one_by_one, grads[:, None])
        assert_close(
            {name: x[:, 0] if name in maps else x.sum(0) for name, x in each.items()}, right
        )


def test_exports():
    ours, _, tensors, _ = make("projection", torch.float32)

    def function(input, residual, kernel0, kernel1):
        return ours(input=input, residual=residual, kernel0=kernel0, kernel1=kernel1)

    shapes = {"input": "b, 9, 7, 12", "residual": "b, 9, 7, 8"}
    shapes |= {"kernel0": "1, 1, 12, 8", "kernel1": "1, 1, 12, 20"}
    assert_exports(function, shapes.values(), to_jax([tensors[name] for name in shapes]))


X, KERNEL = jnp.zeros((2, 4, 4, 8)), jnp.ones((1, 1, 8, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input=X[0]), r"input is \(4, 4, 8\); it must be \(N, H, W, C\)"),
        (dict(input=X.astype(int)), r"input is int32 \(2, 4, 4, 8\); it must be floating"),
        (dict(norm=Norm(3)), "num_groups is 3; it must divide the 8 channels"),
        (dict(norm=Norm(4, jnp.ones(7))), r"weight is \(7,\); it must be \(8,\) or None"),
        (dict(norm=Norm(4, None, jnp.ones(7))), r"bias is \(7,\); it must be \(8,\) or None"),
        (dict(convs=[None]), "residual is given, but there is no first convolution"),
        (dict(convs=[]), "residual is given, but there is no first convolution"),
        (dict(residual=X), r"residual is \(2, 4, 4, 8\); it must be \(2, 4, 4, 2\)"),
    ],
)
def test_refuses(change, message):
    given = dict(input=X, norm=Norm(4), convs=[Conv(KERNEL)], residual=X[..., :2]) | change
    with pytest.raises(ValueError, match=message):
        norm_relu_conv(**given)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(weight=KERNEL[0]),
            r"weight is float32 \(1, 8, 2\) with 1 groups; it must be floating",
        ),
        (dict(weight=KERNEL.astype(int)), r"weight is int32 \(1, 1, 8, 2\) with 1 groups"),
        (
            dict(weight=KERNEL[:, :, 1:]),
            r"weight is float32 \(1, 1, 7, 2\) with 1 groups; it must be floating, "
            r"\(kh, kw, 8 / groups, C_out\), C_out a multiple of groups",
        ),
        (dict(groups=2), r"weight is float32 \(1, 1, 8, 2\) with 2 groups"),
        (dict(weight=jnp.ones((1, 1, 2, 6)), groups=4), r"weight is .* with 4 groups"),
        (dict(groups=0), r"weight is .* with 0 groups"),
        (dict(bias=jnp.ones(3)), r"bias is \(3,\); it must be \(2,\)"),
        (dict(stride=(2, 0)), r"stride is \(2, 0\); it must be two numbers of at least 1"),
        (dict(padding=(0, -1)), r"padding is \(0, -1\); it must be two numbers of at least 0"),
        (
            dict(dilation=(1, 1, 1)),
            r"dilation is \(1, 1, 1\); it must be two numbers of at least 1",
        ),
    ],
)
def test_refuses_a_convolution(change, message):
    conv = Conv(**dict(weight=KERNEL) | change)
    with pytest.raises(ValueError, match=r"convs\[1\]\." + message):
        norm_relu_conv(X, Norm(4), [None, conv])
    with pytest.raises(ValueError, match=r"conv\." + message):
        convolve(X, conv)
