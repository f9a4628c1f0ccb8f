"""The benchmarks' frame: what may get a figure, how it is taken, and what is written down.

Times here are of fake rivals; nothing asserts how fast anything is.
"""

import csv
import dataclasses
import functools
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarks
from benchmarks import machine, ops, report, runner, tables
from benchmarks.ops import group_norm_relu, mixup, standardize_weight
from benchmarks.runner import (
    Case,
    CopyLimit,
    Racer,
    Result,
    disagreement,
    gate,
    measure,
    orders,
    quantile,
)
from benchmarks.shapes import distinct, network_shapes

RUN = report.Run("a processor, 2 cores", "torch 0; python 0", "2026-01-01T00:00:00+00:00")
COLUMNS = "suite,case,provider,metric,p20,p50,p80,unit,device,threads,dtype,versions,date"


class FakeWorkload:
    """x -> 2x by rivals that are right, slightly off, wrong, raising, or right but slow."""

    copies = 3

    def __init__(self):
        self.calls_of = []
        self._x = torch.linspace(-1, 1, 1000)

    def reference(self):
        return {"output": 2 * self._x.double()}

    def outputs(self, provider):
        if provider == "raises":
            raise RuntimeError("no such kernel")
        error = {"wrong": 1e-3, "unfused": 1e-6, "close": 1.5e-6}.get(provider, 0.0)
        return {"output": 2 * self._x + error}

    def calls(self, provider):
        return [functools.partial(self._call, provider, copy) for copy in range(self.copies)]

    def _call(self, provider, copy):
        self.calls_of.append((provider, copy))
        time.sleep(2e-4 if provider == "slow" else 1e-4)
        return copy


def fake_case(*providers, workload=None, **fields):
    return Case(
        suite="fake",
        name="double/1000",
        dtype="float32",
        threads=1,
        providers=providers,
        baselines=("unfused",),
        prepare=lambda: workload or FakeWorkload(),
        **fields,
    )


@pytest.fixture(scope="module")
def copy():
    return CopyLimit(size=1 << 20)


def test_gate_refuses_wrong_rivals_and_they_get_no_row(copy):
    case = fake_case("close", "unfused", "wrong", "raises", necessary_bytes=8000, passes=2)
    result = measure(case, copy, rounds=3, min_sample=1e-4)
    assert set(result.red) == {"wrong", "raises"}
    assert "output is off by 0.001" in result.red["wrong"]
    assert result.red["raises"] == "RuntimeError: no such kernel"
    assert set(result.seconds) == {"close", "unfused"}
    assert {row.provider for row in report.rows(result, RUN)} == {"close", "unfused"}
    shown = "\n".join(report.lines(result))
    assert f"{'wrong':<30}NO FIGURE: output is off by 0.001" in shown
    assert "2 without a figure:" in report.summary([result])


def test_wrong_rival_is_never_timed(copy):
    workload = FakeWorkload()
    measure(fake_case("wrong", "unfused", workload=workload), copy, rounds=3, min_sample=1e-4)
    assert {provider for provider, _ in workload.calls_of} == {"unfused"}


@pytest.mark.parametrize(
    "error, red", [(0.0, False), (2e-3 + 1.5e-7, False), (2e-3 + 4e-6, True), (math.nan, True)]
)
def test_bound_is_twice_the_unfused_error_plus_two_roundings(error, red):
    right = torch.tensor([1.0, -4.0], dtype=torch.float64)
    off = torch.tensor([error, 0.0], dtype=torch.float64)
    unfused = {"y": right + torch.tensor([1e-3, 0.0], dtype=torch.float64)}
    # 2 x 1e-3, and 2 x 2^-23 at a magnitude of 4: about 9.5e-7; right + off is exact to 6e-8.
    answer = disagreement({"y": (right + off).float()}, {"y": right}, unfused)
    assert (answer is not None) == red


def test_gate_sees_missing_and_misshapen_outputs():
    right = {"y": torch.zeros(3, dtype=torch.float64)}
    assert disagreement({}, right, right) == "gives no y"
    assert "shape (2,)" in disagreement({"y": torch.zeros(2)}, right, right)


def test_rivals_take_turns_on_rotating_copies(copy):
    workload = FakeWorkload()
    measure(fake_case("unfused", "slow", workload=workload), copy, rounds=6, min_sample=1e-5)
    timed = workload.calls_of[-12:]  # 6 rounds of 2 rivals, one call a sample
    for first in range(0, 12, 2):
        assert {provider for provider, _ in timed[first : first + 2]} == {"unfused", "slow"}
    assert [copy for _, copy in timed] == [0, 1, 2] * 4


def test_orders_are_seeded_and_random():
    first = list(orders("abc", 20, seed=1))
    assert first == list(orders("abc", 20, seed=1))
    assert first != list(orders("abc", 20, seed=2))
    assert all(sorted(order) == ["a", "b", "c"] for order in first)
    assert len({order[0] for order in first}) == 3


def test_sample_lasts_long_enough(monkeypatch):
    clock = SimpleNamespace(now=0)

    def call():
        clock.now += 300_000  # nanoseconds

    monkeypatch.setattr(runner.time, "perf_counter_ns", lambda: clock.now)
    racer = Racer([call] * 3, min_sample=2e-3)
    assert racer.inner == 7
    assert racer.sample(1) == pytest.approx(3e-4)


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert quantile(values, 0.2) == pytest.approx(1.8)
    assert quantile(values, 0.5) == 3.0
    assert quantile(values, 0.8) == pytest.approx(4.2)
    assert quantile([7.0], 0.8) == 7.0


def test_rows_and_their_arithmetic():
    case = fake_case("ours", "unfused", necessary_bytes=2_000_000, passes=2)
    result = Result(
        case, {"ours": [1e-4, 2e-4, 3e-4], "unfused": [4e-4, 4e-4, 4e-4]}, [15.0, 20.0, 25.0]
    )
    rows = {(row.provider, row.metric): row for row in report.rows(result, RUN)}
    assert set(rows) == {
        ("ours", "time_ms"),
        ("ours", "share_of_copy"),
        ("ours", "speedup"),
        ("unfused", "time_ms"),
        ("unfused", "share_of_copy"),
    }
    time_ms = rows["ours", "time_ms"]
    assert (time_ms.p20, time_ms.p50, time_ms.p80) == pytest.approx((0.14, 0.2, 0.26))
    # 2 MB in 0.2 ms are 10 GB/s, half of the copy; a short time is a large share.
    share = rows["ours", "share_of_copy"]
    assert (share.p20, share.p50, share.p80) == pytest.approx((0.4, 0.5, 0.8), rel=1e-4)
    speedup = rows["ours", "speedup"]
    assert (speedup.p50, speedup.unit) == (2.0, "x unfused")
    assert speedup.p20 < 2.0 < speedup.p80
    (limit,) = report.limit_rows("fake", [result, result], RUN)
    assert (limit.provider, limit.metric, limit.p50, limit.unit) == (
        "torch_copy",
        "copy_gbps",
        20.0,
        "GB/s",
    )


def test_ratios_over_the_fastest_limit_are_of_pairs():
    case = fake_case("ours", "unfused", "limit_a", "limit_b", limits=("limit_a", "limit_b"))
    seconds = {
        "ours": [2.0, 4.0, 6.0],
        "unfused": [4.0, 4.0, 4.0],
        "limit_a": [1.0, 2.0, 4.0],
        "limit_b": [3.0, 3.0, 3.0],
    }
    result = Result(dataclasses.replace(case, images=8), seconds)
    assert result.limit() == "limit_a"
    low, ratio, high = result.times_limit("ours")
    assert ratio == 2.0  # of medians; of the pairs 2, 2 and 1.5
    assert (low, high) == pytest.approx((1.7, 2.0))
    rows = {(row.provider, row.metric): row for row in report.rows(result, RUN)}
    assert rows["ours", "times_limit"].unit == "x limit_a"
    assert ("limit_a", "times_limit") not in rows
    rates = rows["ours", "images_per_s"]
    assert rates.p50 == 2.0 and rates.p20 < 2.0 < rates.p80


def test_rivals_of_another_network_are_measured_by_their_own_reference():
    class TwoNetworks(FakeWorkload):
        def reference(self):
            return {"doubled": 2 * self._x.double(), "tripled": 3 * self._x.double()}

        def outputs(self, provider):
            factor, name = (3, "tripled") if "tripl" in provider else (2, "doubled")
            return {name: (factor + (provider == "triples_badly")) * self._x}

    names = ("unfused", "tripled", "triples", "triples_badly", "doubles")
    plain = dict.fromkeys(("tripled", "triples", "triples_badly"), "tripled")
    case = fake_case(*names, plain=plain)
    assert set(gate(case, TwoNetworks())) == {"triples_badly"}
    red = gate(dataclasses.replace(case, plain={"tripled": "tripled"}), TwoNetworks())
    assert red["triples"] == "gives no doubled"


def test_gate_gives_room_where_a_case_asks_for_it():
    case = fake_case("wrong", "unfused")
    assert set(gate(case, FakeWorkload())) == {"wrong"}
    # 0.001 of 2.
    assert gate(dataclasses.replace(case, room=1e-3), FakeWorkload()) == {}
    assert set(gate(dataclasses.replace(case, room=4e-4), FakeWorkload())) == {"wrong"}


def test_no_share_without_a_floor():
    result = Result(fake_case("ours"), {"ours": [1e-4]}, [20.0])
    assert [row.metric for row in report.rows(result, RUN)] == ["time_ms"]


def test_csv_appends_and_refuses_other_columns(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    for _ in range(2):
        report.CsvFile(path).append([report.load_row("fake", "at start", 0.25, RUN)])
    written = path.read_text().splitlines()
    assert written[0] == COLUMNS
    assert len(written) == 3
    assert written[1] == (
        'fake,at start,other_processes,busy_cores,0.25,0.25,0.25,cores,"a processor, 2 cores",'
        "0,,torch 0; python 0,2026-01-01T00:00:00+00:00"
    )
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="whose columns are a, b; it may be"):
        report.CsvFile(path)


def test_shapes_are_those_of_r50x1():
    shapes = network_shapes(50, 1, 224)
    assert len(shapes.kernels) == 53
    assert len(shapes.norm_inputs) == 49
    parameters = sum(map(math.prod, shapes.kernels))
    parameters += sum(2 * channels for channels, _, _ in shapes.norm_inputs)
    assert parameters == 23_500_352
    assert distinct(shapes.norm_inputs) == (
        (64, 56, 56),
        (256, 56, 56),
        (128, 56, 56),
        (128, 28, 28),
        (512, 28, 28),
        (256, 28, 28),
        (256, 14, 14),
        (1024, 14, 14),
        (512, 14, 14),
        (512, 7, 7),
        (2048, 7, 7),
    )
    assert len(distinct(shapes.kernels)) == 20
    assert network_shapes(152, 4, 480).norm_inputs[-1] == (8192, 15, 15)


@pytest.mark.parametrize(
    "shape, layout, threads, forward, backward",
    [
        ((8, 256, 56, 56), "NCHW", 1, 2, 3),
        ((8, 256, 56, 56), "channels_last", 1, 3, 5),  # 3.2 MB a sample
        ((8, 256, 14, 14), "channels_last", 1, 2, 3),  # 0.2 MB a sample
        ((1, 256, 28, 28), "channels_last", 1, 3, 5),  # 0.8 MB, one thread
        ((1, 256, 28, 28), "channels_last", 2, 2, 3),  # 0.4 MB for each of two threads
        ((8, 256, 28, 28), "channels_last", 2, 3, 5),  # a whole sample a thread
    ],
)
def test_group_norm_passes_depend_on_l2(shape, layout, threads, forward, backward):
    for direction, passes in (("forward", forward), ("backward", backward)):
        case = ops.OpCase("r50x1", shape, layout, direction)
        assert group_norm_relu.passes(case, 4, threads, 512 << 10) == passes


def test_cases_of_the_ops_suite():
    cases = ops.cases(threads=[1, 2], dtypes=["float32"])
    assert len({(case.name, case.threads) for case in cases}) == len(cases)
    by_name = {case.name: case for case in cases if case.threads == 1}
    forward = by_name["group_norm_relu/r50x1/8x256x56x56/NCHW/forward"]
    assert (forward.passes, forward.necessary_bytes) == (2, 2 * 8 * 256 * 56 * 56 * 4)
    backward = by_name["standardize_weight/r50x1/512x512x3x3/channels_last/backward"]
    assert (backward.passes, backward.necessary_bytes) == (3, 3 * 512 * 512 * 9 * 4)
    assert by_name["group_norm_relu/tiny/1x32x4x4/NCHW/forward"].necessary_bytes is None
    # Only where the two layouts differ in memory.
    assert "standardize_weight/r50x1/64x64x1x1/channels_last/forward" not in by_name
    for op in ops.OPS:
        for why in ("r50x1", "tiny"):
            assert any(name.startswith(f"{op}/{why}/") for name in by_name)


def test_cases_of_the_optimizer():
    cases = ops.cases(threads=[1], dtypes=["float32"])
    steps = {case.name: case for case in cases if case.name.startswith("sgd/")}
    weights = 23_454_912
    assert steps["sgd/r50x1/plain/step"].necessary_bytes == 5 * 4 * weights
    assert steps["sgd/r50x1/standardized-float32/step"].necessary_bytes == 6 * 4 * weights
    assert steps["sgd/r50x1/standardized-bfloat16/step"].necessary_bytes == 22 * weights
    assert not [c for c in ops.cases(threads=[1], dtypes=["bfloat16"]) if c.name[:3] == "sgd"]
    for kept in ("plain", "standardized-float32", "standardized-bfloat16"):
        case = steps[f"sgd/tiny/{kept}/step"]
        workload = case.prepare()
        assert gate(case, workload) == {}
        assert ("standardized" in workload.reference()) == (kept != "plain")
        for provider in case.providers:
            for call in workload.calls(provider):
                call()


@pytest.mark.parametrize(
    "nbytes, forward, backward",
    [
        (1 << 30, 2, 2),
        (16 << 20, 8, 4),
        (16384, 4096, 4096),
        (8192, None, 4096),
        (2048, None, None),
    ],
)
def test_inputs_exceed_the_caches(nbytes, forward, backward):
    for direction, copies in (("forward", forward), ("backward", backward)):
        case = ops.OpCase("test", (1,), "NCHW", direction)
        assert ops.copies_past_cache(case, nbytes) == copies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    "op, shape", [(group_norm_relu, (2, 64, 9, 7)), (standardize_weight, (24, 16, 3, 3))]
)
def test_every_rival_passes_the_gate(op, shape, layout, direction, dtype, monkeypatch):
    monkeypatch.setattr(ops, "ROTATED_BYTES", 1 << 16)
    case = ops._case(op, ops.OpCase("test", shape, layout, direction), dtype, 1, False)
    workload = case.prepare()
    assert gate(case, workload) == {}
    for provider in case.providers:
        calls = workload.calls(provider)
        assert len(calls) == len(workload.calls(case.providers[0])) >= 2
        results = calls[1]()
        large = results if direction == "forward" else results[0]
        assert large.shape == shape
        assert large.dtype == ops.DTYPES[dtype]
        again = calls[1]()  # a backward can be run as often as rounds need it
        assert torch.equal(large, again if direction == "forward" else again[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("partner", mixup.PARTNERS)
def test_every_rival_makes_the_same_batch(partner, dtype, monkeypatch):
    for name, value in {"COUNT": 8, "SIDE": 20, "CROP": 16, "ROTATED_BYTES": 1 << 14}.items():
        monkeypatch.setattr(mixup, name, value)
    (case,) = [
        case
        for case in mixup.cases(threads=[1], dtypes=[dtype])
        if case.name == f"mixup/8x20x20x3/crop16/{partner}"
    ]
    assert case.necessary_bytes == 8 * 16 * 16 * 3 * (6 if dtype == "float32" else 4)
    workload = case.prepare()
    assert gate(case, workload) == {}
    for provider in case.providers:
        calls = workload.calls(provider)
        assert len(calls) >= 2 and calls[1]().dtype == ops.DTYPES[dtype]
        assert not torch.equal(calls[0]().clone(), calls[1]())


def test_gate_is_not_fooled_by_rounding_at_the_relu():
    x = torch.zeros(1, 32, 2, 2, dtype=torch.float64)
    inputs = [x, torch.ones(32, dtype=torch.float64), torch.full((32,), 1e-6).double()]
    assert group_norm_relu.gate_gradient(inputs, torch.ones(1, 32, 2, 2)).count_nonzero() == 0
    inputs[2] += 1
    assert group_norm_relu.gate_gradient(inputs, torch.ones(1, 32, 2, 2)).all()


def test_load_counts_others_only(monkeypatch):
    clocks = SimpleNamespace(wall=100.0, own=5.0, all=50.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clocks.wall)
    monkeypatch.setattr(machine.time, "process_time", lambda: clocks.own)
    monkeypatch.setattr(machine.Load, "_busy", lambda self: clocks.all)
    load = machine.Load()
    clocks.wall, clocks.own, clocks.all = 110.0, 14.0, 64.0
    assert load.others() == pytest.approx(0.5)  # 14 core-seconds in 10, of which 9 were ours


def test_busy_time_is_read_from_the_system():
    if not Path("/proc/stat").exists():
        assert machine.Load().others() is None
    else:
        assert machine.Load._busy() > 0


def command(*arguments, cwd=None):
    root = Path(benchmarks.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_measures_and_writes(tmp_path):
    out = tmp_path / "ops.csv"
    done = command(
        "ops",
        "--quick",
        "--filter",
        "tiny",
        "forward",
        "--threads",
        1,
        "--rounds",
        3,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "group_norm_relu/tiny/1x32x4x4/channels_last/forward  float32, 1 thread" in done.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == COLUMNS
    timed = {(row["case"], row["provider"]) for row in rows if row["metric"] == "time_ms"}
    assert ("group_norm_relu/tiny/1x32x4x4/NCHW/forward", "bit_kernels") in timed
    assert ("standardize_weight/tiny/16x8x3x3/NCHW/forward", "eager_batch_norm") in timed
    assert all(float(row["p50"]) > 0 for row in rows if row["metric"] != "busy_cores")
    assert [row["threads"] for row in rows if row["metric"] == "copy_gbps"] == ["1"]
    shown = tables.markdown(tables.read(out))
    assert "| group_norm_relu/tiny/1x32x4x4/NCHW/forward | float32 | 1 | bit_kernels |" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "--filter", "no-such-case"], "--filter is no-such-case; no case has that"),
        (["ops", "--threads", "4096"], "--threads is 4096; it may be 1 to"),
        (["ops", "--rounds", "1"], "--rounds is 1; it may be 3 or more"),
        (["step", "--rivals", "nobody"], "--rivals is nobody; no case has that"),
        (["all", "--out", "a.csv"], "--out is one file"),
        (["step", "--out", "no-such.csv", "--markdown"], "out is no-such.csv, which is no file"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    from benchmarks import __main__ as program

    measured = []

    def measure_one(case, copy, *, matrix, rounds, seed):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return Result(case, {"bit_kernels": [1e-3], "eager": [2e-3]}, [20.0])

    monkeypatch.setattr(program, "measure", measure_one)
    monkeypatch.setattr(program, "CopyLimit", lambda: None)
    monkeypatch.setattr(program.machine, "keep_freed_memory", lambda reserve: True)
    monkeypatch.setattr(program.machine, "load_at_rest", lambda: 0.0)
    out = tmp_path / "ops.csv"
    assert program.main(["ops", "--filter", "tiny", "--threads", "1", "--out", str(out)]) == 130
    with out.open(newline="") as file:
        metrics = [row["metric"] for row in csv.DictReader(file)]
    assert metrics.count("time_ms") == 2
    assert "copy_gbps" in metrics
    assert "interrupted after 1 of" in capsys.readouterr().err
