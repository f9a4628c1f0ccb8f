"""The suites of whole networks: the rivals are what they are said to be, and are counted right.

Each suite is run once, on networks so small that the figures mean nothing.
"""

import csv
import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import (
    __main__ as program,
    accuracy,
    data,
    inference,
    memory,
    networks,
    rivals,
    runner,
    step,
    tables,
    timm_networks,
)
from benchmarks.ops import mixup
from bit import checkpoint, models, plan

timm_only = pytest.mark.skipif(not timm_networks.installed(), reason="timm is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # a second one only waits in networks of this size


@pytest.fixture(scope="module")
def weights():
    return rivals.SharedWeights("R14x0.125", 10)


def images(side=33):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["R14x0.125", "R26x0.25"])
def test_plain_network_equals_bit(name, stem):
    bit = models.create(name, 10, stem=stem, zero_head=False).double()
    plain = networks.create(name, 10, stem=stem).double()
    plain.load_state_dict(bit.state_dict())
    torch.testing.assert_close(plain(images()), bit(images()), rtol=1e-10, atol=1e-10)


@timm_only
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_plain_network_equals_timm(norm):
    bit = models.create("R50x1", 10, zero_head=False)
    plain = networks.create("R50x1", 10, norm=norm, standardize=norm == "group")
    timm = timm_networks.create("R50x1", 10, norm=norm)
    plain.load_state_dict(bit.state_dict(), strict=False)
    timm.load_state_dict(checkpoint.views(bit, "timm"), strict=norm == "group")
    for network in (plain, timm):
        network.double()
    torch.testing.assert_close(plain(images()), timm(images()), rtol=1e-9, atol=1e-9)


@timm_only
def test_timm_network_is_timms_own():
    with timm_networks.torchvision_or_stand_ins():
        from timm.models import resnetv2
    for norm, create in (("group", resnetv2.resnetv2_50x1_bit), ("batch", resnetv2.resnetv2_50)):
        ours, theirs = timm_networks.create("R50x1", 10, norm=norm), create(num_classes=10)
        shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (ours, theirs)]
        assert shapes[0] == shapes[1]
        kinds = [
            {k: type(v) for k, v in n.named_modules() if "stem" not in k} for n in (ours, theirs)
        ]
        assert kinds[0] == kinds[1]


def test_conv_only_is_linear_but_for_the_pool_and_the_head(weights):
    network = weights.build("conv_only/NCHW", torch.float64)
    network.pools = False
    with torch.no_grad():
        network.head.bias.zero_()
        torch.testing.assert_close(network(3 * images()), 3 * network(images()))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert convolutions == sum(p.ndim == 4 for p in models.create("R14x0.125", 10).parameters())


def test_networks_refuse():
    with pytest.raises(ValueError, match="norm is 'layer'; it may be 'group', 'batch' or None"):
        networks.create("R26x0.25", norm="layer")
    with pytest.raises(ValueError, match="name is 'R27x1'; it may be"):
        networks.create("R27x1")


def test_shared_weights_keep_off_the_kink_and_use_both_sides(weights):
    network = weights.build("eager/NCHW")
    arguments = []
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda _, inputs, output: arguments.append(output))
    network(images().float())
    on = torch.cat([output.flatten() for output in arguments]) > 0
    assert 0.2 < on.float().mean() < 0.8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_passes_the_gate(dtype):
    case = step._case(step.StepCase("R14x0.125", 2, 33, dtype), 1, False)
    workload = case.prepare()
    assert runner.gate(case, workload) == {}
    for provider in case.providers:
        bias = workload._step(provider)._parameters["head.bias"]
        before = bias.detach().clone()
        loss = workload.calls(provider)[0]()
        assert loss.isfinite()
        assert (not torch.equal(before, bias)) == (not provider.startswith("conv_only"))


@pytest.mark.parametrize("broken", ["decay", "gain"])
def test_gate_refuses_a_step_that_is_wrong(broken, monkeypatch):
    case = step._case(step.StepCase("R14x0.125", 2, 33), 1, False)
    case = dataclasses.replace(case, providers=("bit/NCHW", "eager/channels_last"))
    workload = case.prepare()
    wrong = workload._step("bit/NCHW")
    if broken == "decay":
        for group in wrong.optimizer.param_groups:
            group["weight_decay"] = 0.1
    else:
        with torch.no_grad():
            wrong.network.norm.weight += 0.01
    red = runner.gate(case, workload)
    assert set(red) == {"bit/NCHW"}
    assert "is off by" in red["bit/NCHW"]


class TwoLayers(nn.Module):
    """conv keeps images and kernel, relu its result, which the second conv keeps too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, images):
        hidden = torch.relu(self.first(images))
        return self.second(hidden * 1.0).mean((2, 3))


def test_saved_bytes_of_a_network_known_by_hand():
    network = TwoLayers()
    x, labels = torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64)
    saved = memory.saved_bytes(network, x, labels, "float32")
    # Images, the ReLU's result, its copy that the convolution keeps; log-softmax (2, 5) and the
    # cross-entropy's total weight.
    by_hand = x.nbytes + 2 * 4 * (2 * 8 * 36) + 4 * (2 * 5) + 4
    assert saved == plan.Saved(activations=by_hand, weights=0, kept=0)


def test_saved_bytes_tells_weights_and_what_stays():
    class Scaled(TwoLayers):
        def __init__(self):
            super().__init__()
            self.standing = [torch.rand(5, 8, 1, 1)]  # neither parameter nor buffer

        def forward(self, images):
            made = self.first.weight * 2
            hidden = torch.conv2d(images, made, padding=1)
            return torch.conv2d(hidden, self.standing[0]).mean((2, 3))

    network = Scaled()
    x, labels = torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64)
    saved = memory.saved_bytes(network, x, labels, "float32")
    assert saved.weights == 4 * 8 * 3 * 9
    assert saved.kept == 4 * 5 * 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accounting_counts_what_a_run_keeps(dtype, monkeypatch):
    monkeypatch.setattr(memory, "NETWORKS", ("bit", "timm", "batch_norm", "conv_only"))
    case = memory.MemoryCase("R14x0.125", 10, 2, 64, dtype)
    counted = {(f.provider, f.metric): f.p50 for f in memory._account(case)}
    for provider in step.providers(memory.NETWORKS):
        network = memory._network(case, provider)
        optimizer = memory._optimizer(case, provider, network)
        saved = memory.saved_bytes(network, *memory._batch(case, provider), dtype)
        found = {
            "saved_activations": saved.activations,
            "saved_weights": saved.weights,
            "standardized": saved.kept,
            "weights": sum(p.nbytes for p in network.parameters()),
        }
        for metric, nbytes in found.items():
            # PyTorch's fakes of batch norm have statistics in the input's dtype.
            exact = pytest.approx(nbytes / memory.MB, rel=1e-9 if dtype == "float32" else 0.01)
            assert counted[provider, metric] == exact, (provider, metric)
        assert (counted[provider, "momenta"] == 0) == (optimizer is None)


def test_peak_is_at_least_what_must_be_there():
    case = memory.MemoryCase("R14x0.25", 10, 8, 64)
    found = memory.probe(case, "timm/NCHW" if timm_networks.installed() else "eager/NCHW")
    weights = sum(p.nbytes for p in networks.create("R14x0.25", 10).parameters()) / memory.MB
    # Weights and momenta all the time, and what is kept when backward begins.
    least = 2 * weights + found["saved_activations"] + found["saved_weights"]
    assert least < found["peak_allocated"] < 3 * least


def test_allocations_are_summed_in_order_of_time():
    class Event:
        def __init__(self, at, nbytes, name="[memory]"):
            self.start_ns, self.nbytes, self.name = (lambda: at), (lambda: nbytes), (lambda: name)

    events = [Event(3, -50), Event(1, 100), Event(2, 50), Event(4, 60), Event(2, 999, "aten::mm")]
    fake = type("P", (), {})()
    fake.profiler = type("P", (), {})()
    fake.profiler.kineto_results = type("P", (), {"events": lambda self: events})()
    assert memory._allocated(fake) == 160


def test_every_forward_passes_the_gate():
    case = inference._case(inference.InferenceCase("R14x0.125", 2, 33), 1, False)
    workload = case.prepare()
    assert runner.gate(case, workload) == {}
    for provider in case.providers:
        logits = workload.calls(provider)[1]()
        assert logits.shape == (2, inference.NUM_CLASSES)
        assert not logits.requires_grad


def test_same_updates_with_and_without_loading():
    workload = data.WaitWorkload(data.WaitCase("R14x0.125", 4, 14, stem="small"), 1)
    seen = []
    workload._trainer.update = lambda batch, lr: seen.append((batch.lam, *batch.micro(4)))
    workload.calls(data.LOADED)[0]()
    workload.calls(data.AT_HAND)[0]()
    assert len(seen) == 2 * data.UPDATES
    for (lam, loaded), (same, at_hand) in zip(seen, seen[data.UPDATES :]):
        assert lam == same
        assert all(map(torch.equal, loaded, at_hand))


def tiny_plan():
    config = accuracy.QUICK.config
    schedule = dataclasses.replace(config.schedule, steps=4, batch=16, micro_batch=16)
    network = dataclasses.replace(config.network, model="R14x0.125")
    config = dataclasses.replace(config, schedule=schedule, network=network)
    return accuracy.Plan(config, micro=8, seeds=(1, 1, 1))


def test_fused_and_plain_networks_start_from_the_same_weights():
    config = tiny_plan().config
    task = accuracy.make_task(accuracy.load_dataset(config.data, config.images), config.images)
    (fused, _), (plain, _) = (accuracy.train(config, task, c) for c in accuracy.FUSED.values())
    assert len(fused) == 4
    assert fused == pytest.approx(plain, abs=1e-3)
    batch_norm, _ = accuracy.train(config, task, accuracy.NORMS["batch_norm"])
    assert batch_norm != pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize(
    "suite, patched",
    [
        ("step", ("CASES", [step.StepCase("R14x0.125", 2, 33, quick=True)])),
        ("memory", ("CASES", [memory.MemoryCase("R14x0.125", 10, 2, 33, quick=True)])),
        ("data", ("CASES", [data.WaitCase("R14x0.125", 4, 14, stem="small", quick=True)])),
        ("inference", ("CASES", [inference.InferenceCase("R14x0.125", 1, 33, quick=True)])),
        ("accuracy", ("QUICK", tiny_plan())),
    ],
)
def test_suite_measures_writes_and_shows(suite, patched, tmp_path, monkeypatch, capsys):
    module = program._module(suite)
    monkeypatch.setattr(module, *patched)
    for name, value in {"COUNT": 4, "SIDE": 20, "CROP": 16, "ROTATED_BYTES": 1}.items():
        monkeypatch.setattr(mixup, name, value)
    monkeypatch.setattr(inference, "_onnx_installed", lambda: False)  # an export takes seconds
    monkeypatch.setattr(program.machine, "keep_freed_memory", lambda reserve: True)
    monkeypatch.setattr(program.machine, "load_at_rest", lambda: 0.0)
    out = tmp_path / f"{suite}.csv"
    common = [suite, "--quick", "--threads", "1", "--out", str(out)]
    assert program.main([*common, "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert program.main([*common, "--rounds", "3"]) == 0
    assert out.with_suffix(".png").stat().st_size > 1000
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {row["case"] for row in rows} - {"limit", "at start", "during the run"}
    assert measured == set(listed)
    if suite == "step":
        ratios = [row["provider"] for row in rows if row["metric"] == "times_limit"]
        assert "bit/channels_last" in ratios
        assert sum(name.startswith("conv_only") for name in ratios) == 1
        assert any(row["metric"] == "matrix_gflops" for row in rows)
    capsys.readouterr()
    assert program.main([suite, "--out", str(out), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert all(f"| {name} | float32 |" in shown for name in listed)


def test_all_lists_every_suite(capsys):
    assert program.main(["all", "--quick", "--list"]) == 0
    listed = capsys.readouterr().out
    for part in ("group_norm_relu/", "R26x0.25/8x3x64x64", "/accounting", "wait/", "norms/micro"):
        assert part in listed


def test_rivals_can_be_chosen(capsys):
    options = program._parser().parse_args(["step", "--rivals", "bit/", "timm_batch"])
    for case in program._cases("step", options):
        assert set(case.limits) <= set(case.providers)
        assert {name.partition("/")[0] for name in case.providers} <= {
            "bit",
            "timm_batch_norm",
            "conv_only",
        }
        assert "bit/NCHW" in case.providers
    options = program._parser().parse_args(["step", "--rivals", "bit/NCHW", "conv_only/NCHW"])
    for case in program._cases("step", options):
        assert set(case.providers) == {"bit/NCHW", "conv_only/NCHW"}


def test_compiled_rivals_are_added():
    (case,) = step.cases(threads=[1], dtypes=["float32"], quick=True, compiled=True)
    assert "bit_compiled/channels_last" in case.providers


def test_tables_show_the_newest_run_of_each_case(tmp_path):
    out = program.report.CsvFile(tmp_path / "rows.csv")
    for date, value in (("2026-01-01", 1.0), ("2026-02-01", 2.0)):
        run = program.report.Run("a processor", "torch 0", date)
        for name in ("a", "b")[: 2 if value == 1.0 else 1]:
            case = runner.Count("fake", name, "float32", 1, list)
            figure = runner.Figure.of("ours", "time_ms", [value], "ms")
            out.append([program.report.row(case, figure, run)])
    assert [(row.case, row.p50) for row in tables.read(out.path)] == [("b", 1.0), ("a", 2.0)]
    assert "| a | float32 | 1 | ours | 2 |" in tables.markdown(tables.read(out.path))
