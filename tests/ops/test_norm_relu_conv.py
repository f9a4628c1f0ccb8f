"""norm_relu_conv: against plain float64 code, forward and backward; what it keeps; its statistics."""

import functools

import pytest
import torch
from checking import BACKEND, DEVICE, DTYPES, LAYOUTS, assert_as_good, of_the_cpu
from torch.utils.checkpoint import checkpoint

import bit_kernels
from bit_kernels import reference
from bit_kernels.functional import group_norm_relu, norm_relu_conv
from bit_kernels.ops.norm_relu_conv import Conv, Norm

# Why each is here: (input, groups, convolutions as (C_out, side, stride, padding, dilation,
# groups)); a None is the input itself.
SAMPLES = {
    "unit": ((2, 16, 9, 7), 4, [(8, 1, 1, 0, 1, 1), None]),
    "projection": ((2, 12, 9, 7), 3, [(8, 1, 1, 0, 1, 1), (20, 1, 2, 0, 1, 1)]),
    "strided": ((3, 8, 8, 6), 8, [(12, 3, 2, 1, 1, 1)]),
    "dilated_grouped": ((1, 12, 11, 10), 6, [(6, 3, 1, 2, 2, 3)]),
    "three": ((2, 6, 5, 5), 2, [(4, 3, 1, 1, 1, 1), None, (5, 1, 1, 0, 1, 1)]),
    "one_pixel": ((4, 32, 1, 1), 8, [(16, 1, 1, 0, 1, 1)]),
    "parallel": ((4, 64, 14, 14), 32, [(32, 1, 1, 0, 1, 1), None]),  # 50176 elements
}
fused = functools.partial(norm_relu_conv, backend=BACKEND)


class Case:
    """Inputs of a sample, what is done with them, and gradients for its outputs."""

    def __init__(self, sample, dtype=torch.float32, layout="contiguous", residual=True, eps=1e-10):
        shape, self.groups, specs = SAMPLES[sample]
        random = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=random).to(DEVICE, dtype)

        self.specs = specs
        self.eps = eps
        self.tensors = {"input": LAYOUTS[layout](draw(*shape) * 2 + 0.5)}
        self.tensors["weight"], self.tensors["bias"] = draw(shape[1]), draw(shape[1])
        for at, spec in enumerate(specs):
            if spec is not None:
                kernel = draw(spec[0], shape[1] // spec[5], spec[1], spec[1]) * 0.1
                self.tensors[f"weight{at}"] = LAYOUTS[layout](kernel)
                self.tensors[f"bias{at}"] = draw(spec[0])
        outputs = self(reference.norm_relu_conv, self.tensors)
        if residual:
            self.tensors["residual"] = LAYOUTS[layout](draw(*outputs[0].shape))
        self.grads = [LAYOUTS[layout](draw(*output.shape)) for output in outputs]

    def __call__(self, function, tensors, **keywords):
        norm = Norm(self.groups, tensors["weight"], tensors["bias"])
        convs = [
            None
            if spec is None
            else Conv(
                tensors[f"weight{at}"],
                tensors[f"bias{at}"],
                *((n, n) for n in spec[2:5]),
                spec[5],
                self.eps,
                tensors.get(f"standardized{at}"),
            )
            for at, spec in enumerate(self.specs)
        ]
        return function(tensors["input"], norm, convs, residual=tensors.get("residual"), **keywords)

    def results(self, function, double=False, **keywords):
        """Outputs, and the gradient of every tensor."""
        leaves = {
            name: (t.double() if double else t).detach().requires_grad_()
            for name, t in self.tensors.items()
        }
        outputs = self(function, leaves, **keywords)
        grads = [g.to(o.dtype) for g, o in zip(self.grads, outputs, strict=True)]
        return [o.detach() for o in outputs] + list(
            torch.autograd.grad(outputs, list(leaves.values()), grads)
        )

    @property
    def names(self):
        return [f"output{at}" for at in range(len(self.specs))] + list(self.tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, layout, dtype):
    case = Case(sample, dtype, layout)
    ours = case.results(fused)
    theirs = case.results(reference.norm_relu_conv)
    truth = case.results(reference.norm_relu_conv, double=True)
    assert_as_good(case.names, ours, theirs, truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_stays(layout):
    case = Case("three", layout=layout)
    results = dict(zip(case.names, case.results(fused), strict=True))
    for name, given in case.tensors.items():
        assert results[name].stride() == given.stride(), name
    assert results["output0"].stride() == case.tensors["residual"].stride()


def test_without_standardization():
    case = Case("strided", eps=None)
    ours, truth = case.results(fused), case.results(reference.norm_relu_conv, double=True)
    assert_as_good(case.names, ours, case.results(reference.norm_relu_conv), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype):
    case = Case("projection", dtype)
    for name in case.tensors:
        if name not in ("input", "residual"):
            case.tensors[name] = case.tensors[name].float()
    ours = case.results(fused)
    assert [t.dtype for t in ours] == [dtype, dtype] + [t.dtype for t in case.tensors.values()]
    truth = case.results(reference.norm_relu_conv, double=True)
    assert_as_good(case.names, ours, case.results(reference.norm_relu_conv), truth)


def same(a, b):
    """Equal on the CPU; a GPU adds up in one order for a tensor alone, in another in a sum's pass."""
    if BACKEND == "cpp":
        return torch.equal(a, b)
    wide = 1e-5 if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=wide, atol=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_the_sum(layout, dtype):
    """They are found, and they are those that the next GroupNorm would have taken."""
    case = Case("unit", dtype, layout)
    with torch.no_grad():
        total, _ = case(fused, case.tensors, next_norm=(4, 1e-5))
        known = total._group_statistics
        assert known[1:3] == (4, 1e-5)
        kernel = torch.ops.bit_kernels.group_norm_relu
        _, mean, rstd = kernel(total.clone(), 4, None, None, 1e-5, True)
        assert same(known.mean, mean) and same(known.rstd, rstd)
        assert same(group_norm_relu(total, 4), group_norm_relu(total.clone(), 4))
        # Another number of groups, and a tensor written to since, take their own.
        assert torch.equal(group_norm_relu(total, 2), group_norm_relu(total.clone(), 2))
        total.mul_(3).add_(1)
        assert torch.equal(group_norm_relu(total, 4), group_norm_relu(total.clone(), 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parts_match_plain_ones(layout):
    """What the parts do on a device without a kernel, and the shortcut's gradient in the pass."""
    from bit_kernels.ops import group_norm_relu as module

    ops, random = torch.ops.bit_kernels, torch.Generator().manual_seed(0)
    x, other, grad, skip = (
        LAYOUTS[layout](torch.randn(2, 12, 5, 4, generator=random).to(DEVICE)) for _ in range(4)
    )
    w, b = (torch.randn(12, generator=random).to(DEVICE) for _ in range(2))
    sums = x.clone(), x.clone()
    ours = ops.add_group_statistics(sums[0], other, 4, 1e-5)
    theirs = module.plain_add(sums[1], other, 4, 1e-5)
    assert torch.equal(*sums) and not torch.equal(sums[0], x)
    for a, c in zip(ours, theirs, strict=True):
        assert torch.allclose(a, c, atol=1e-5)
    known = (sums[0], *ours, w, b, True)
    applied = ops.group_norm_relu_apply(*known)
    assert same(applied, ops.group_norm_relu(sums[0], 4, w, b, 1e-5, True)[0])
    assert torch.allclose(applied, module.plain_apply(*known), atol=1e-5)
    with_skip = ops.group_norm_relu_backward(grad, *known, skip)
    for a, c in zip(with_skip, module.plain_backward(grad, *known, skip), strict=True):
        assert torch.allclose(a, c, atol=1e-5)
    without = ops.group_norm_relu_backward(grad, *known)[0]
    assert torch.allclose(with_skip[0], without + skip, atol=1e-5)
    for op, arguments in (
        (ops.group_norm_relu_apply, known),
        (ops.add_group_statistics, (x, other, 4, 1e-5)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_inference_mode():
    """Its tensors have no version to check statistics by."""
    case = Case("unit")
    with torch.no_grad():
        plain = case(fused, case.tensors, next_norm=(4, 1e-5))[0]
        expected = group_norm_relu(plain.clone(), 4)
    with torch.inference_mode():
        total, _ = case(fused, case.tensors, next_norm=(4, 1e-5))
        assert same(group_norm_relu(total, 4), expected)
        total.mul_(3).add_(1)
        assert torch.equal(group_norm_relu(total, 4), group_norm_relu(total.clone(), 4))


def test_known_statistics_give_the_same_gradients():
    def two_units(x, w, use):
        (total,) = fused(x, Norm(4), [Conv(w)], residual=x, next_norm=(4, 1e-5))
        return fused(total if use else total * 1, Norm(4), [Conv(w)])[0]

    x, grad = torch.randn(2, 2, 16, 6, 6, device=DEVICE)
    w = torch.randn(16, 16, 1, 1, device=DEVICE)
    for use in (True, False):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        found = torch.autograd.grad(two_units(*leaves, use), leaves, grad)
        if use:
            first = found
    assert all(
        torch.equal(a, b) if BACKEND == "cpp" else torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(first, found, strict=True)
    )


@pytest.mark.parametrize("frozen", ["input", "weight0", "norm", "kernels", "all but bias0"])
def test_frozen_tensors_have_no_gradient(frozen):
    case = Case("unit")
    leaves = {name: t.detach().clone() for name, t in case.tensors.items()}
    everything = case.results(reference.norm_relu_conv, double=True)[2:]
    truth = dict(zip(leaves, everything, strict=True))
    fixed = {
        "norm": {"weight", "bias"},
        "kernels": {"weight0", "bias0"},
        "all but bias0": set(leaves) - {"bias0"},
    }.get(frozen, {frozen})
    for name in leaves:
        leaves[name].requires_grad_(name not in fixed)
    outputs = case(fused, leaves)
    used = [(o, g) for o, g in zip(outputs, case.grads, strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    for name, leaf in leaves.items():
        if name in fixed:
            assert leaf.grad is None
        else:
            assert torch.allclose(leaf.grad.double(), truth[name], atol=1e-3), name


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_only_some_outputs_are_used(used):
    case = Case("three", torch.float64)
    found = []
    for function in (norm_relu_conv, reference.norm_relu_conv):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in case.tensors.items()}
        outputs = case(function, leaves)
        sum((outputs[at] * case.grads[at]).sum() for at in used).backward()
        found.append({n: leaf.grad for n, leaf in leaves.items()})
    for name in case.tensors:
        ours, theirs = (grads[name] for grads in found)
        assert (theirs is None and ours is None) or torch.allclose(
            torch.zeros_like(theirs) if ours is None else ours, theirs
        ), name
    # And with the kernels.
    leaves = {n: t.float().requires_grad_() for n, t in case.tensors.items()}
    outputs = case(fused, leaves)
    sum((outputs[at] * case.grads[at]).sum() for at in used).backward()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert torch.allclose(leaf.grad.double(), found[1][name], atol=1e-3), name


def test_kept_weights_get_the_gradient_of_the_standardized():
    case = Case("projection")
    for at in (0, 1):
        case.tensors[f"standardized{at}"] = reference.standardize_weight(
            case.tensors[f"weight{at}"]
        )
    kept = {n: t for n, t in case.tensors.items() if n.startswith("standardized")}

    def run(function, dtype):
        leaves = {n: t.to(dtype).requires_grad_(n not in kept) for n, t in case.tensors.items()}
        outputs = case(function, leaves)
        torch.autograd.backward(outputs, [g.to(dtype) for g in case.grads])
        grads = [leaf.grad for name, leaf in leaves.items() if name not in kept]
        return [o.detach() for o in outputs] + grads

    names = [name for name in case.names if name not in kept]
    truth = run(reference.norm_relu_conv, torch.float64)
    assert_as_good(
        names, run(fused, torch.float32), run(reference.norm_relu_conv, torch.float32), truth
    )
    # Not the raw weight's: that has a zero mean over each kernel.
    assert truth[names.index("weight0")].mean((1, 2, 3)).abs().min() > 1e-6
    leaves = {n: t.detach().clone().requires_grad_() for n, t in case.tensors.items()}
    y, _ = case(fused, leaves)
    y.sum().backward(retain_graph=True)
    assert leaves["standardized0"].grad is None and leaves["weight0"].grad is not None
    with pytest.raises(RuntimeError, match="release"):
        torch.autograd.grad(y.sum(), leaves["weight0"], create_graph=True)


def test_what_is_kept_for_backward():
    x, w, gamma, beta = (
        torch.randn(shape, device=DEVICE, requires_grad=True)
        for shape in ((2, 64, 12, 12), (32, 64, 3, 3), (64,), (64,))
    )
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = fused(x, Norm(32, gamma, beta), [Conv(w, padding=(1, 1)), None])
    for given in (x, w, gamma, beta):
        kept.pop(given.untyped_storage().data_ptr())
    assert sorted(t.numel() for t in kept.values()) == [2 * 32, 2 * 32]  # mean and rstd
    y.sum().backward()


def test_input_changed_before_backward_is_noticed():
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    w = torch.randn(8, 8, 1, 1, device=DEVICE, requires_grad=True)
    (y,) = fused(x, Norm(4), [Conv(w)])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_the_cpu
def test_same_bits_with_any_number_of_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = torch.randn(3, 64, 14, 14, generator=torch.Generator().manual_seed(1))
        w = torch.randn(64, 64, 1, 1, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            (y,) = fused(x, Norm(32), [Conv(w)], residual=x, next_norm=(32, 1e-5))
        # PyTorch's convolution is free to differ; the sum's statistics are ours.
        known = y._group_statistics
        results.append((y.clone(), known.mean, known.rstd))
    if torch.equal(results[0][0], results[1][0]):
        assert torch.equal(results[0][1], results[1][1])
        assert torch.equal(results[0][2], results[1][2])
    else:
        assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_empty_batch():
    leaves = {n: t.clone().requires_grad_() for n, t in Case("projection").tensors.items()}
    case = Case("projection")
    none = {"input": torch.zeros(0, 12, 9, 7), "residual": torch.zeros(0, 8, 9, 7)}
    empty = leaves | {name: tensor.to(DEVICE) for name, tensor in none.items()}
    outputs = case(fused, empty)
    assert [o.shape for o in outputs] == [(0, 8, 9, 7), (0, 20, 5, 4)]
    sum(o.sum() for o in outputs).backward()
    assert leaves["weight0"].grad.count_nonzero() == 0


def test_autocast():
    half = torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float16
    case = Case("projection")
    # Rounded beforehand: an input next to the ReLU's corner could fall to the other side.
    case.tensors["input"] = case.tensors["input"].to(half).float()
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items()}
    with torch.autocast(DEVICE, half):
        outputs = case(norm_relu_conv, leaves)
        plain = case(reference.norm_relu_conv, {n: t.to(half) for n, t in leaves.items()})
    for ours, theirs in zip(outputs, plain, strict=True):
        assert ours.dtype == half
        assert torch.allclose(ours.float(), theirs.float(), atol=0.1, rtol=0.05)
    torch.autograd.backward(outputs, [g.to(half) for g in case.grads])
    truth = case.results(reference.norm_relu_conv, double=True)[2:]
    for (name, leaf), true in zip(leaves.items(), truth, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - true).norm() < 0.05 * true.norm(), name


@pytest.mark.parametrize("sample", ["unit", "three"])
def test_compiled(sample):
    case = Case(sample, layout="channels_last")
    compiled = torch.compile(norm_relu_conv, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(case.results(compiled), case.results(fused), strict=True):
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()


def test_exported():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bit_kernels.GroupNorm(4, 8, activation="relu")
            self.conv = bit_kernels.StdConv2d(8, 6, 3, padding=1)

        def forward(self, x):
            return bit_kernels.norm_relu_conv(x, self.norm, self.conv)[0]

    layer, x = Layer().to(DEVICE), torch.randn(3, 8, 5, 5, device=DEVICE)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    assert torch.equal(program.module()(x[:2]), layer(x[:2]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(dtype):
    case = Case("projection", dtype, "channels_last")
    t = {n: v.requires_grad_() for n, v in case.tensors.items()}
    convs = [t["weight0"], t["bias0"], t["weight1"], t["bias1"]]
    geometry = [1, 1, 0, 0, 1, 1, 1, 1, 0, 2, 2, 0, 0, 1, 1, 1, 1, 0]
    arguments = (t["input"], None, None, t["residual"], t["weight"], t["bias"], convs)
    arguments += (3, 1e-5, True, geometry, [1e-10, 1e-10], 2, 1e-5)
    torch.library.opcheck(torch.ops.bit_kernels.norm_relu_conv.default, arguments)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    case = Case("unit")
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items()}

    def run(input):
        return tuple(case(fused, dict(leaves, input=input), next_norm=(4, 1e-5)))

    outputs = checkpoint(run, leaves["input"], use_reentrant=reentrant)
    torch.autograd.backward(outputs, case.grads)
    plain = case.results(fused)[2:]
    for leaf, expected in zip(leaves.values(), plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_gradients_in_float64():
    """The plain parts, which serve what no kernel serves, and double backward."""
    case = Case("three", torch.float64)

    def run(*tensors):
        return tuple(case(norm_relu_conv, dict(zip(case.tensors, tensors, strict=True))))

    tensors = [t.double().requires_grad_() for t in case.tensors.values()]
    assert torch.autograd.gradcheck(run, tensors)
    ours, plain = case.results(norm_relu_conv), case.results(reference.norm_relu_conv)
    for name, a, b in zip(case.names, ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11), name
    grads = torch.autograd.grad(run(*tensors), tensors, case.grads, create_graph=True)
    norm = sum(g.square().sum() for g in grads)
    second = torch.autograd.grad(norm, tensors, allow_unused=True)
    plain = case(reference.norm_relu_conv, dict(zip(case.tensors, tensors, strict=True)))
    grads = torch.autograd.grad(plain, tensors, case.grads, create_graph=True)
    norm = sum(g.square().sum() for g in grads)
    expected = torch.autograd.grad(norm, tensors, allow_unused=True)
    for a, b in zip(second, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_torch_func():
    case = Case("unit")

    def loss(weight, input):
        outputs = case(norm_relu_conv, dict(case.tensors, weight0=weight, input=input[None]))
        return sum(o.square().sum() for o in outputs)

    case.tensors["residual"] = case.tensors["residual"][:1]
    inputs = case.tensors["input"]
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(case.tensors["weight0"], inputs)
    for n in range(2):
        weight = case.tensors["weight0"].clone().requires_grad_()
        loss(weight, inputs[n]).backward()
        assert torch.allclose(per_sample[n], weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input=torch.zeros(2, 8, 4)), r"input has shape \(2, 8, 4\); it must be \(N, C, H, W"),
        (dict(input=torch.zeros(2, 8, 4, 4, dtype=torch.int32)), "floating"),
        (dict(groups=3), "num_groups is 3; it must divide the input's 8 channels"),
        (dict(convs=[]), "at least one Conv"),
        (dict(convs=[None]), "at least one Conv"),
        (dict(convs=[None, Conv(torch.ones(2, 8, 1, 1)), None]), "at most one None"),
        (dict(convs=[Conv(torch.ones(2, 7, 1, 1))]), r"convs\[0\].weight has shape \(2, 7, 1, 1"),
        (
            dict(convs=[Conv(torch.ones(2, 8, 1, 1).double())]),
            r"convs\[0\].weight is torch.float64",
        ),
        (dict(convs=[Conv(torch.ones(2, 8, 5, 5))]), "smaller than the kernel"),
        (dict(convs=[Conv(torch.ones(2, 8, 1, 1), torch.ones(3))]), r"convs\[0\].bias has shape"),
        (dict(residual=torch.ones(2, 2, 4, 3)), r"residual has shape \(2, 2, 4, 3\)"),
        (
            dict(residual=torch.ones(2, 2, 4, 4).double()),
            f"torch.float64 on {DEVICE}.*; with this input",
        ),
        (
            dict(convs=[None, Conv(torch.ones(2, 8, 1, 1))], next_norm=(2, 1e-5)),
            "next_norm is .*, of the first of convs, which is None",
        ),
        (dict(next_norm=(3, 1e-5)), "next_norm has 3 groups; it must divide the first result's 2"),
        (
            dict(residual=torch.ones(2, 2, 4, 4), next_norm=(3, 1e-5)),
            "next_norm has 3 groups; it must divide the first result's 2 channels",
        ),
    ],
)
def test_refuses(change, message):
    arguments = dict(input=torch.zeros(2, 8, 4, 4), groups=4, convs=[Conv(torch.ones(2, 8, 1, 1))])
    arguments = on_device(arguments | change)
    norm = Norm(arguments.pop("groups"))
    input, convs = arguments.pop("input"), arguments.pop("convs")
    for backend in (None, BACKEND):
        with pytest.raises(ValueError, match=message):
            norm_relu_conv(input, norm, convs, backend=backend, **arguments)


def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: on_device(each) for name, each in value.items()}
    if isinstance(value, Conv):
        return Conv(*map(on_device, value))
    return [on_device(each) for each in value] if isinstance(value, list) else value
