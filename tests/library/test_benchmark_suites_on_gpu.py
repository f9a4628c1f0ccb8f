"""The suites on a GPU, without one: what is compared, in which order, and that the gate sees errors.

Networks and ops run on the CPU in the device's place ("cpu:0", which is the CPU and isn't called
"cpu").
"""

import dataclasses
import functools

import gpu_stand_in
import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as program
from benchmarks import cuda, data, gpu_memory, inference, memory, ops, runner, step
from benchmarks.ops import (
    group_norm_relu,
    mixup,
    norm_relu_conv,
    sgd,
    standardize_weight,
)
from benchmarks.runner import gate

INSTEAD = "cpu:0"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # a second one only waits in networks of this size


def test_every_suite_lists_its_cases_without_a_gpu(capsys):
    assert program.main(["all", "--device", "cuda", "--list", "--compile"]) == 0
    listed = capsys.readouterr().out.splitlines()
    for part in (
        "group_norm_relu/r50x1/32x256x56x56/channels_last/backward",
        "norm_relu_conv/r50x1/8x64x56x56-64x64x3x3/channels_last/forward",
        "sgd/r152x4/standardized-bfloat16/step",
        "R50x1/256x3x224x224",
        "R50x1/256x3x224x224/compiled",
        "R152x4/8x3x224x224",
        "R152x4/8x3x224x224/run",
        "R50x1/224x224/largest_batch",
        "mixup/256x256x256x3/crop224/pinned",
        "fused/batch128",
    ):
        assert part in listed, part


def test_the_most_important_cases_come_first():
    cases = ops.cases(threads=[1], dtypes=list(ops.CUDA_DTYPES), device="cuda")
    assert len({(case.name, case.dtype) for case in cases}) == len(cases)
    first = cases[: len(ops.GPU_OPS) + 1]
    assert {case.name.partition("/")[0] for case in first} == {*ops.GPU_OPS, "sgd"}
    (norm,) = [case for case in first if case.name.startswith("group_norm_relu")]
    assert norm.dtype == "bfloat16" and "/32x" in norm.name and "channels_last" in norm.name
    assert norm.providers[:2] == ("triton", "cuda") and norm.capture
    assert {"liger", "apex", "eager"} <= set(norm.providers)
    shapes = {case.name.split("/")[2] for case in cases if case.name.startswith("group_norm")}
    for batch in (1, 8, 32, 128):
        assert f"{batch}x2048x7x7" in shapes
    assert not any(case.capture for case in cases if "/tiny/" in case.name)
    quick = ops.cases(threads=[1], dtypes=["bfloat16", "float32"], device="cuda", quick=True)
    assert 10 < len(quick) < len(cases) / 5


def test_copies_exceed_three_times_the_l2():
    for case in ops.cases(threads=[1], dtypes=["bfloat16"], device="cuda"):
        if case.name.startswith("group_norm_relu/r50x1"):
            shape = tuple(map(int, case.name.split("/")[2].split("x")))
            direction = case.name.rpartition("/")[2]
            each = 2 * torch.Size(shape).numel() * (2 if direction == "backward" else 1)
            declared = ops.OpCase("r50x1", shape, "NCHW", direction)
            copies = ops.copies_past_cache(
                declared, each // (1 + (direction == "backward")), "cuda"
            )
            assert copies * each >= 3 * cuda.l2_bytes()
            passes = {"forward": 2, "backward": 3}[direction]
            assert case.necessary_bytes == passes * 2 * torch.Size(shape).numel()


def test_batches_shrink_with_the_memory(monkeypatch):
    assert step.gpu_images() == 256
    monkeypatch.setattr(cuda, "memory_bytes", lambda: 24 << 30)
    assert step.gpu_images() == 128
    (case, *_) = step.cases(threads=[1], dtypes=["bfloat16"], device="cuda")
    assert case.name == "R50x1/128x3x224x224"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "op, case",
    [
        (group_norm_relu, ops.OpCase("test", (2, 64, 9, 7), "channels_last", "")),
        (standardize_weight, ops.OpCase("test", (24, 16, 3, 3), "NCHW", "")),
        (
            norm_relu_conv,
            ops.OpCase("test", (2, 64, 9, 7), "channels_last", "", kernel=(32, 64, 3, 3)),
        ),
    ],
)
def test_every_op_rival_is_right_or_not_there(op, case, dtype, direction, small):
    case = dataclasses.replace(case, direction=direction)
    declared = ops._case(op, case, dtype, 1, False, "cuda")
    workload = ops.OpWorkload(op, case, ops.DTYPES[dtype], INSTEAD)
    check = runner.Gate(declared, workload)
    served = []
    for provider in declared.providers:
        refusal = check.refusal(provider)
        assert refusal is None or not refusal.red, refusal
        if refusal is None:
            served.append(provider)
            (result, *_) = [call() for call in workload.calls(provider)]
            large = result if direction == "forward" else result[0]
            assert large.shape == (case.output_shape if direction == "forward" else case.shape)
    assert any(name.startswith("eager") for name in served)
    # Here a backend of a GPU can't serve.
    assert "cuda" not in served


def test_gate_refuses_an_op_that_is_wrong(monkeypatch, small):
    case = ops.OpCase("test", (2, 64, 9, 7), "channels_last", "forward")
    monkeypatch.setitem(
        group_norm_relu.GPU_RIVALS, "triton", lambda x, w, b: group_norm_relu.eager(x, w, b) * 1.01
    )
    declared = ops._case(group_norm_relu, case, "float32", 1, False, "cuda")
    workload = ops.OpWorkload(group_norm_relu, case, torch.float32, INSTEAD)
    assert runner.Gate(declared, workload).refusal("triton").red


def test_an_op_that_refuses_a_layout_is_absent_and_one_that_fails_is_red():
    def ours(input, *, backend):
        if input.is_contiguous():
            raise ValueError(f"backend {backend!r} can't serve bit_kernels.op: not in NCHW")
        raise ValueError("input is wrong")

    rival = ops.on_backends("op", ours)["cuda"]
    x = torch.zeros(2, 3, 4, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "serve", lambda *arguments: None)
        with pytest.raises(runner.Absent, match="not in NCHW"):
            rival(x)
        with pytest.raises(ValueError, match="input is wrong"):
            rival(x.to(memory_format=torch.channels_last))


def test_eager_convolves_in_the_layout_of_its_input(monkeypatch, small):
    seen = []

    def conv2d(x, *arguments, **options):
        seen.append((x.is_contiguous(), torch.backends.cudnn.allow_tf32))
        return convolve(x, *arguments, **options)

    def contiguous(*arguments):  # as CUDA's gives it
        return group_norm(*arguments).contiguous()

    convolve, group_norm = F.conv2d, F.group_norm
    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(F, "group_norm", contiguous)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for layout in ops.LAYOUTS:
        case = ops.OpCase("test", (2, 64, 9, 7), layout, "forward", kernel=(32, 64, 3, 3))
        workload = ops.OpWorkload(norm_relu_conv, case, torch.float32, INSTEAD)
        workload.outputs("eager")
        workload.calls("eager")[0]()
    # For the gate in full precision, timed as people have it.
    assert seen == [(True, False), (True, True), (False, False), (False, True)]


def test_optimizers_on_a_gpu(small):
    (case,) = [
        case
        for case in sgd.gpu_cases(dtypes=["float32"], quick=True)
        if case.name == "sgd/tiny/standardized-bfloat16/step"
    ]
    workload = sgd.Workload(sgd.Step("tiny", "bfloat16"), INSTEAD)
    check = runner.Gate(case, workload)
    for provider in case.providers:
        refusal = check.refusal(provider)
        assert (refusal is None) == (provider in sgd.TORCH) or not refusal.red
    total = sgd.Step("r152x4", "bfloat16").necessary_bytes() / 22
    assert total == pytest.approx(928e6, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", mixup.GPU_PLACES)
def test_batches_made_on_a_gpu(place, dtype, monkeypatch):
    for name, value in {"GPU_COUNT": 6, "SIDE": 20, "CROP": 16, "GPU_BATCHES": 2}.items():
        monkeypatch.setattr(mixup, name, value)
    case = next(c for c in mixup.gpu_cases(dtypes=[dtype], quick=False) if c.name.endswith(place))
    assert (case.necessary_bytes is None) == (place == "pinned")
    workload = mixup.GpuMixupWorkload(place, ops.DTYPES[dtype], INSTEAD)
    check = runner.Gate(case, workload)
    assert check.refusal("eager") is None
    assert not check.refusal("cuda").red
    first, second = (call() for call in workload.calls("eager"))
    assert first.shape == (6, 3, 16, 16) and not torch.equal(first, second)


def step_case(dtype="bfloat16", networks=step.GPU_NETWORKS, **fields):
    declared = step.StepCase("R14x0.125", 6, 33, dtype, distinct=2, **fields)
    case = step._gpu_case(declared, networks)
    plains = case.prepare.args[2]
    return case, step.StepWorkload(declared, INSTEAD, plains)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_of_a_repeated_batch_passes_the_gate(dtype, graphs):
    case, workload = step_case(dtype)
    assert {"bit_graph/channels_last", "timm/NCHW"} < {*case.providers}
    assert "timm/NCHW" in case.baselines and "eager/NCHW" not in case.providers
    assert case.limits == ("conv_only/channels_last", "conv_only_graph/channels_last")
    assert gate(case, workload) == {}
    for provider in case.providers:
        calls = workload.calls(provider)
        assert len(calls) == step.BATCHES and calls[0]().isfinite()


def test_a_graph_takes_the_batch_that_it_is_given(graphs):
    _, workload = step_case("float32")
    graphed, eager = (workload._step(f"{name}/channels_last") for name in ("bit_graph", "bit"))
    for images, labels in [*workload._batches, *workload._batches]:
        loss, same = graphed(images, labels).clone(), eager(images, labels)
        torch.testing.assert_close(loss, same)
    assert graphed._graph is not None
    for key, momentum in graphed.learned().items():
        torch.testing.assert_close(momentum, eager.learned()[key])


def test_gate_refuses_a_graph_that_forgets_the_optimizer(graphs, monkeypatch):
    case, workload = step_case("float32", ("bit_graph", "timm", "eager"))

    class Forgets(gpu_stand_in.RunAgain):
        def replay(self):
            super().replay()
            workload._step("bit_graph/channels_last").learned()["head.bias"].mul_(1.5)

    monkeypatch.setattr(cuda, "Graph", Forgets)
    assert set(gate(case, workload)) == {"bit_graph/channels_last"}


def test_one_network_at_a_time_and_a_part_of_its_parameters(graphs, monkeypatch):
    monkeypatch.setattr(step, "GATE_ELEMENTS", 1000)
    case, workload = step_case("float32", step.GPU_LARGE, alone=True)
    assert case.alone and not any("batch_norm" in plain for plain in workload._plains)
    reference = workload.reference()
    learned = reference["eager/channels_last learned"]
    parameters = sum(p.numel() for p in workload._weights._template.parameters())
    assert 1000 <= learned.numel() < parameters / 2
    pools = []
    for provider in case.providers:
        workload.outputs(provider)
        (made,) = workload._steps.values()
        if "_graph" in provider:
            pools.append(made._pool.handle)
    # What a graph that is gone has left in its pool would be in the way of the next one.
    assert len(set(pools)) == len(pools) > 1
    workload.drop(case.providers[-1])
    assert not workload._steps
    assert gate(case, workload) == {}


def test_compiled_steps_are_a_case_of_their_own():
    cases = step.cases(threads=[1], dtypes=["bfloat16"], device="cuda", compiled=True)
    names = [case.name for case in cases]
    assert names[-1] == "R50x1/256x3x224x224/compiled" and len(set(names)) == 3
    # One after the other, the limit and what matters most first: an interrupt leaves those.
    assert cases[-1].alone and cases[-1].providers[:3] == (
        "conv_only/channels_last",
        "bit_compiled/channels_last",
        "timm_compiled/channels_last",
    )
    assert cases[-1].limits == ("conv_only/channels_last",)
    assert [case.subject.partition("/")[0] for case in cases] == ["bit", "bit", "bit_compiled"]


def test_plain_networks_take_the_place_of_timm(monkeypatch):
    monkeypatch.setattr(step.rivals, "installed", lambda name: not name.startswith("timm"))
    (case, *_) = step.cases(threads=[1], dtypes=["bfloat16"], device="cuda")
    expected = {"eager/NCHW", "eager_graph/channels_last", "batch_norm_graph/channels_last"}
    assert expected < {*case.providers} and len({*case.providers}) == len(case.providers)
    assert case.plain["batch_norm_graph/channels_last"] == "batch_norm/channels_last"
    assert "eager/NCHW" in case.baselines


@pytest.mark.parametrize("dtype", inference.CUDA_DTYPES)
def test_every_forward_passes_the_gate(dtype):
    declared = inference.InferenceCase("R14x0.125", 2, 33, dtype=dtype)
    case = inference._gpu_case(declared, False)
    workload = inference.InferenceWorkload(declared, INSTEAD)
    assert "bit_frozen/channels_last" in case.providers and case.capture
    assert gate(case, workload) == {}
    for provider in case.providers:
        assert workload.calls(provider)[1]().dtype == getattr(torch, dtype)


@pytest.mark.parametrize("largest", [0, 15, 16, 17, 100, 1000, 4096])
def test_the_largest_batch_is_found_to_a_sixteenth(largest):
    asked = []

    def fits(images):
        asked.append(images)
        return images <= largest

    found = gpu_memory.search(fits, 16, 2000)
    assert found <= largest and len(asked) < 16
    if largest >= 16:
        assert found == 2000 if largest >= 2000 else largest - found <= max(1, largest // 16)
    else:
        assert found == 0
    assert max(asked) <= 2000


def test_memory_on_a_gpu(gpu, monkeypatch):
    counted = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(counted))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9 + next(counted))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: gpu.log.append("reset"))
    monkeypatch.setattr(gpu_memory, "probe", functools.partial(gpu_memory.probe, device=INSTEAD))
    case = memory.MemoryCase("R14x0.125", 10, 2, 33)
    found = list(gpu_memory._peaks(case))
    metrics = {(figure.provider, figure.metric) for figure in found}
    assert ("bit/channels_last", "saved_activations") in metrics
    assert ("timm/channels_last", "peak_allocated") in metrics
    assert gpu.log.count("reset") == len({figure.provider for figure in found}) == 5
    # What the goals are read from.
    bits = {f.metric: f for f in found if f.provider == "bit/channels_last"}
    peaks = {f.provider: f.p50 for f in found if f.metric == "peak_allocated"}
    best = min(peaks["timm/channels_last"], peaks["timm/NCHW"])
    assert bits["peak_share_of_timm"].unit == bits["saved_share_of_timm"].unit == "1"
    assert bits["peak_share_of_timm"].p50 == pytest.approx(peaks["bit/channels_last"] / best)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
    ],
)
def test_the_largest_batch_is_tried_until_memory_ends(error, gpu, monkeypatch):
    make = memory._batch

    def batch(case, provider):
        if case.images > 5:
            raise error
        return make(case, provider)

    monkeypatch.setattr(memory, "_batch", batch)
    monkeypatch.setattr(
        gpu_memory, "largest_batch", functools.partial(gpu_memory.largest_batch, device=INSTEAD)
    )
    found = list(gpu_memory._largest(memory.MemoryCase("R14x0.125", 10, 2, 33)))
    assert {figure.p50 for figure in found if figure.metric == "largest_batch"} == {5}
    shares = {f.provider: f.p50 for f in found if f.metric == "largest_batch_of_timm"}
    assert shares["bit/channels_last"] == 1 and "timm/channels_last" not in shares
    monkeypatch.setattr(memory, "_batch", lambda case, provider: 1 / 0)
    refusals = list(gpu_memory._largest(memory.MemoryCase("R14x0.125", 10, 2, 33)))
    assert all(refusal.red for refusal in refusals) and "ZeroDivisionError" in refusals[0].reason


def test_waiting_for_data_is_measured_where_training_can_run(monkeypatch):
    names = [case.name for case in data.cases(threads=[1], dtypes=["bfloat16"], device="cuda")]
    assert names[0] == "wait/R50x1/128x3x224x224"
    monkeypatch.setattr(data, "NEEDED", ("no_such_package",))
    assert data.left_out("cuda") == ["wait/, which trains: no_such_package are missing"]
    assert len(data.cases(threads=[1], dtypes=["bfloat16"], device="cuda")) == len(names) - 1


def test_saved_bytes_are_left_out_where_the_plan_cannot_be_made(gpu, monkeypatch):
    def missing(*arguments):
        raise ModuleNotFoundError("No module named 'tyro'")

    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 5)
    monkeypatch.setattr(memory, "saved_bytes", missing)
    case = memory.MemoryCase("R14x0.125", 10, 2, 33)
    assert gpu_memory.probe(case, "bit/channels_last", device=INSTEAD) == {"peak_allocated": 0}
