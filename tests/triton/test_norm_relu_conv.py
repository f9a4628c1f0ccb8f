"""norm_relu_conv in one kernel: against float64, its statistics, its gradients; and who chooses it."""

import functools

import pytest
import torch
from checking import BACKEND, DEVICE, DTYPES, LAYOUTS, assert_as_good, to_float64

from bit_kernels import reference
from bit_kernels.functional import Conv, Norm, group_norm_relu, norm_relu_conv

if BACKEND != "triton":
    pytest.skip("for Triton's kernels: BIT_KERNELS_INTERPRET=1 or a GPU", allow_module_level=True)

from bit_kernels.triton import group_norm_relu as norms
from bit_kernels.triton import norm_relu_conv as gpu
from bit_kernels.triton._launch import device_name, launch
from bit_kernels.triton.norm_relu_conv import DEFAULT, Case, Tile

SMALL = Tile(16, 16, 16, 4, 2)
# Why each is here: input, groups, (C_out, kernel, stride, padding, dilation), tile.
SAMPLES = {
    "round": ((2, 64, 8, 8), 32, (64, (1, 1), (1, 1), (0, 0), (1, 1)), DEFAULT),
    "odd": ((3, 20, 7, 7), 4, (24, (3, 3), (1, 1), (1, 1), (1, 1)), DEFAULT),
    "1x1_strided": ((1, 12, 9, 7), 3, (20, (1, 1), (2, 2), (0, 0), (1, 1)), DEFAULT),
    "3x3_strided": ((3, 40, 9, 7), 8, (10, (3, 3), (2, 2), (1, 1), (1, 1)), DEFAULT),
    "no_padding": ((1, 6, 5, 6), 2, (5, (3, 3), (1, 1), (0, 0), (1, 1)), DEFAULT),
    "one_pixel": ((3, 32, 1, 1), 8, (48, (1, 1), (1, 1), (0, 0), (1, 1)), DEFAULT),
    "one_pixel_padded": ((2, 8, 1, 1), 4, (12, (3, 3), (1, 1), (1, 1), (1, 1)), DEFAULT),
    "uneven": ((2, 6, 8, 9), 3, (7, (3, 2), (2, 1), (2, 0), (1, 3)), DEFAULT),
    # More tiles of rows than are in a band, several of columns and of channels, none of them full.
    "many_tiles": ((1, 20, 13, 11), 5, (36, (1, 1), (1, 1), (0, 0), (1, 1)), SMALL),
    "many_taps": ((2, 20, 5, 4), 5, (20, (3, 3), (1, 1), (1, 1), (1, 1)), SMALL),
}
NEXT_EPS = 1e-5


def make(sample, dtype, full):
    """input, gamma, beta, weight, bias, residual; `full` says whether to leave nothing out."""
    shape, _, (C_out, kernel, *geometry), _ = SAMPLES[sample]
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random).to(DEVICE, dtype)

    x = draw(*shape) * 2 + 0.5
    weight = reference.standardize_weight(draw(C_out, shape[1], *kernel))
    output_shape = Conv(weight, None, *geometry).output_shape(x)
    rest = [draw(shape[1]), draw(shape[1]), draw(C_out), draw(*output_shape)]
    gamma, beta, bias, residual = rest if full else [None] * 4
    return [x, gamma, beta, weight, bias, residual]


def fused(sample, x, gamma, beta, weight, bias, residual, relu=True, next_norm=None, tile=None):
    _, groups, (_, _, *geometry), of_sample = SAMPLES[sample]
    mean, rstd = norms.statistics(x, groups, 1e-5)
    return gpu.convolve(
        x, gpu.coefficients(mean, rstd, gamma, x.shape[1]), beta, relu, weight, bias, *geometry,
        tile or of_sample, residual, next_norm,
    )  # fmt: skip


def unfused(sample, x, gamma, beta, weight, bias, residual, relu=True):
    _, groups, (_, _, *geometry), _ = SAMPLES[sample]
    norm, conv = Norm(groups, gamma, beta, 1e-5, relu), Conv(weight, bias, *geometry, eps=None)
    return reference.norm_relu_conv(x, norm, [conv], residual)[0]


def next_groups(sample):
    return {24: 4, 10: 5, 5: 1, 7: 7}.get(SAMPLES[sample][2][0], 4)


@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype, full):
    tensors = make(sample, dtype, full)
    tensors[0] = LAYOUTS["channels_last"](tensors[0])
    groups = next_groups(sample)
    output, mean, rstd = fused(sample, *tensors, relu=full, next_norm=(groups, NEXT_EPS))
    theirs = unfused(sample, *tensors, relu=full)
    truth = unfused(sample, *to_float64(tensors), relu=full)
    assert_as_good(["output"], [output], [theirs], [truth])
    # Of the result as it was rounded, which is what the next GroupNorm reads.
    var, center = torch.var_mean(output.double().reshape(*mean.shape, -1), 2, correction=0)
    assert (mean - center).abs().max() < 1e-5 * (1 + center.abs().max())
    assert (rstd * (var + NEXT_EPS).sqrt() - 1).abs().max() < 1e-5
    (again,) = fused(sample, *tensors, relu=full)
    assert torch.equal(again, output)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_serves(layout):
    """All but channels_last are copied; NaN lies around a slice."""
    tensors = make("3x3_strided", torch.float32, True)
    for at in (0, 3, 5):
        tensors[at] = LAYOUTS[layout](tensors[at])
    (output,) = fused("3x3_strided", *tensors)
    assert output.stride() == unfused("3x3_strided", *tensors).contiguous(
        memory_format=torch.channels_last if "last" in layout else torch.contiguous_format
    ).stride()  # fmt: skip
    truth = unfused("3x3_strided", *to_float64(tensors))
    assert (output - truth).abs().max() < 1e-4


@pytest.mark.parametrize("sample", ["many_taps", "many_tiles"])
def test_64_bit_offsets(sample, monkeypatch):
    """What a tensor of more than 2^31 elements a sample goes through, on a small one."""

    def wide(*args, **options):
        launch(*args, **options | ({"WIDE": True} if "WIDE" in options else {}))

    tensors = make(sample, torch.float32, True)
    (expected,) = fused(sample, *tensors)
    monkeypatch.setattr(gpu, "launch", wide)
    assert torch.equal(fused(sample, *tensors)[0], expected)


def test_statistics_far_from_zero():
    """E[x^2] - E[x]^2 in float32 would lose the variance."""
    tensors = make("many_tiles", torch.float32, True)
    tensors[4] = tensors[4] * 0 + 3000.0
    output, mean, rstd = fused("many_tiles", *tensors, next_norm=(36, NEXT_EPS))
    var, center = torch.var_mean(output.double().reshape(*mean.shape, -1), 2, correction=0)
    assert ((mean - center) / center).abs().max() < 1e-6
    assert (rstd * (var + NEXT_EPS).sqrt() - 1).abs().max() < 1e-4


def test_nan_is_not_hidden_and_stays_in_its_sample():
    tensors = make("odd", torch.float32, True)
    tensors[0][1, 3, 2, 2] = float("nan")
    output, mean, _ = fused("odd", *tensors, next_norm=(4, NEXT_EPS))
    # All of its group is NaN, and with that every pixel of the sample.
    assert output[1].isnan().all() and mean[1].isnan().all()
    assert output[[0, 2]].isfinite().all() and mean[[0, 2]].isfinite().all()


# ---- through the op


def call(function, tensors, **keywords):
    """A unit's first convolutions with its shortcut; tensors by name."""
    t = tensors
    convs = [
        Conv(t["weight0"], t["bias0"]),
        None,
        Conv(t["weight1"], None, (2, 2), (1, 1)),
    ]
    norm = Norm(4, t["gamma"], t["beta"])
    return function(t["input"], norm, convs, residual=t["residual"], **keywords)


def leaves(dtype):
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(shape, generator=random).to(DEVICE, dtype)
        return LAYOUTS["channels_last"](drawn) if len(shape) == 4 else drawn

    tensors = {
        "input": draw(3, 20, 6, 5),
        "gamma": draw(20),
        "beta": draw(20),
        "weight0": draw(12, 20, 1, 1),
        "bias0": draw(12),
        "weight1": draw(8, 20, 3, 3),
        "residual": draw(3, 12, 6, 5),
    }
    grads = [draw(3, 12, 6, 5), draw(3, 20, 6, 5), draw(3, 8, 3, 3)]
    return tensors, grads


def results(function, tensors, grads):
    given = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = call(function, given)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, list(given.values()), grads)]


@pytest.fixture
def kernels(monkeypatch):
    """The fused kernels that ran, by their number of output channels."""
    ran = []

    def noted(*args, **keywords):
        ran.append(args[4].shape[0])
        return convolve(*args, **keywords)

    convolve = gpu.convolve
    monkeypatch.setattr(gpu, "convolve", noted)
    return ran


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_behind_the_fused_forward(dtype, kernels):
    tensors, grads = leaves(dtype)
    ours = functools.partial(norm_relu_conv, backend=BACKEND)
    with gpu.insist_fused():
        found = results(ours, tensors, grads)
    assert kernels == [12, 8]
    plain = results(reference.norm_relu_conv, tensors, grads)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = results(reference.norm_relu_conv, wide, grads)
    names = ["output0", "shortcut", "output1", *tensors]
    assert_as_good(names, *([t.detach() for t in each] for each in (found, plain, truth)))


def test_known_statistics_are_used_and_next_ones_given(kernels):
    tensors, _ = leaves(torch.float32)
    with torch.no_grad(), gpu.insist_fused():
        total, *_ = call(norm_relu_conv, tensors, next_norm=(3, 1e-5))
        known = total._group_statistics
        mean, rstd = norms.statistics(total, 3, 1e-5)
        assert torch.allclose(known.mean, mean, atol=1e-6)
        assert torch.allclose(known.rstd, rstd, rtol=1e-5)
        next_one = Conv(torch.randn(4, 12, 1, 1, device=DEVICE))
        known.mean.add_(1)  # told apart from those that would be taken
        (off,) = norm_relu_conv(total, Norm(3, eps=1e-5, relu=False), [next_one])
        (right,) = norm_relu_conv(total.clone(), Norm(3, eps=1e-5, relu=False), [next_one])
    assert (off - right).abs().max() > 1e-2 and kernels == [12, 8, 4, 4]


def test_statistics_without_a_residual_come_from_the_fused_kernel_alone(kernels):
    tensors, _ = leaves(torch.float32)
    for residual in (tensors["residual"], None):
        with gpu.insist_fused():
            (y, *_) = call(norm_relu_conv, tensors | {"residual": residual}, next_norm=(3, 1e-5))
        mean, rstd = norms.statistics(y.detach(), 3, 1e-5)
        assert torch.allclose(y._group_statistics.mean, mean, atol=1e-6)
        assert torch.allclose(y._group_statistics.rstd, rstd, rtol=1e-5)
        (y, *_) = call(norm_relu_conv, tensors | {"residual": residual}, next_norm=(3, 1e-5))
        assert hasattr(y, "_group_statistics") == (residual is not None)
    assert kernels == [12, 8, 12, 8]


@pytest.mark.parametrize("next_norm", [None, (4, 1e-5)])
def test_compiled_graphs_call_the_fused_kernel(next_norm, kernels):
    tensors, _ = leaves(torch.float32)
    run = functools.partial(call, norm_relu_conv, next_norm=next_norm)
    with torch.no_grad(), gpu.insist_fused():
        eager = run(tensors)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    assert kernels == [12, 8, 12, 8]
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_unit_of_the_network(layout, kernels):
    """Everything around the call: modules, kept statistics, a projection, all gradients."""
    from bit.models import Unit

    torch.manual_seed(0)
    unit, x = Unit(16, 8, 2).to(DEVICE), torch.randn(2, 16, 7, 6, device=DEVICE)
    runs = []
    for dtype, insist in ((torch.float32, layout == "channels_last"), (torch.float64, False)):
        module = unit.to(dtype, memory_format=getattr(torch, layout, torch.contiguous_format))
        leaf = LAYOUTS[layout](x.to(dtype)).requires_grad_()
        if insist:
            with gpu.insist_fused():
                y = group_norm_relu(module(leaf), module.next_norms[-1][0])
        else:
            y = group_norm_relu(module(leaf), module.next_norms[-1][0])
        runs.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
    assert kernels == ([8, 32, 8, 32] if layout == "channels_last" else [])
    for ours, right in zip(*runs, strict=True):
        assert (ours - right).abs().max() < 1e-4 * (1 + right.abs().max())


def test_who_insists_is_told_what_cannot_be():
    tensors, _ = leaves(torch.float32)
    with gpu.insist_fused():
        with pytest.raises(ValueError, match="can't be fused: its input is not channels_last"):
            call(norm_relu_conv, tensors | {"input": tensors["input"].contiguous()})
        grouped = Conv(torch.randn(4, 5, 1, 1, device=DEVICE), groups=4)
        with pytest.raises(ValueError, match="can't be fused: it has 4 groups"):
            norm_relu_conv(tensors["input"], Norm(4), [grouped])


# ---- the choice

FIRST = Case("float32", 4, 20, 12, 1, 1, 0, 6, 5, True)
SECOND = Case("float32", 4, 20, 8, 3, 2, 1, 6, 5, False)
SEPARATE = {"group_norm_relu": 5.0, "group_norm_relu_apply": 4.0, "statistics": 1.5}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes what was measured, as if it had been here."""
    path = tmp_path / "measured.csv"
    monkeypatch.setattr(gpu, "TABLE", path)

    def forget():
        gpu._measured.cache_clear()
        gpu.fastest.cache_clear()

    def measured(rows, device=None):
        device = device or device_name(torch.empty(0, device=DEVICE).device)
        gpu.write(path, {(device, case): ways for case, ways in rows.items()})
        forget()

    yield measured
    monkeypatch.undo()
    forget()


def test_the_faster_way_is_taken(table, kernels):
    """Separate: 5 to normalise, or 4 where statistics are known, and 3 + 3 for the convolutions."""
    tensors, _ = leaves(torch.float32)
    run = functools.partial(call, norm_relu_conv, tensors)
    first = SEPARATE | {"convolution": 3.0, "16x16x16x4x2": 5.0, "32x16x16x4x2": 4.0}
    second = SEPARATE | {"convolution": 3.0, "16x32x16x4x2": 5.0}
    with torch.no_grad():
        table({FIRST: first, SECOND: second})
        assert gpu.choose(tensors["input"], _convs(tensors), True, False) == (
            Tile(32, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2),
        )  # fmt: skip
        expected = run()
        assert kernels == [12, 8]  # 1.5 + 4 + 5 against 5 + 6
        table({FIRST: first | {"statistics": 2.5}, SECOND: second})
        run()
        assert kernels == [12, 8]  # 2.5 + 4 + 5
        assert gpu.choose(tensors["input"], _convs(tensors), True, True) is not None  # 9 against 10
        table({FIRST: first})
        found = run()
        assert kernels == [12, 8]  # nobody knows of the second
        table({FIRST: first, SECOND: second}, device="another GPU")
        run()
        assert kernels == [12, 8]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def _convs(tensors):
    return [Conv(tensors["weight0"]), Conv(tensors["weight1"], None, (2, 2), (1, 1))]


@pytest.mark.parametrize(
    "change",
    [
        dict(dilation=(2, 2)),
        dict(stride=(2, 1)),
        dict(padding=(1, 0)),
        dict(groups=4, weight=torch.ones(8, 5, 3, 3)),
    ],
    ids=str,
)
def test_what_the_table_cannot_hold_is_separate(table, change):
    table({FIRST: SEPARATE | {"convolution": 9.0, "16x16x16x4x2": 1.0}})
    x = LAYOUTS["channels_last"](torch.randn(3, 20, 6, 5, device=DEVICE))
    conv = Conv(**(dict(weight=torch.ones(8, 20, 3, 3)) | change))
    assert gpu.choose(x, [conv], False, False) is None


def test_batches_share_a_class():
    assert [gpu.batch_class(n) for n in (0, 1, 5, 6, 90, 91, 256)] == [1, 1, 4, 8, 64, 128, 256]


def test_the_table_of_this_repository():
    """Every row can be read, and says all that the choice asks."""
    assert gpu.TABLE.read_text().splitlines()[0].split(",") == [
        "device", *Case._fields, "way", "seconds",
    ]  # fmt: skip
    for (device, case), ways in gpu.read(gpu.TABLE).items():
        assert set(gpu.PARTS) <= set(ways) and device
        assert all(seconds > 0 for seconds in ways.values())
        assert gpu.batch_class(case.batch) == case.batch
        for way in set(ways) - set(gpu.PARTS):
            assert str(Tile.parse(way)) == way
