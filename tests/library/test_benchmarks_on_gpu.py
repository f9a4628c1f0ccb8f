"""The benchmarks' frame on a GPU, without one: how time is taken, what is said, when it stops.

The device is a stand-in whose time is a number; the suites' own networks and ops run on the CPU in
its place ("cpu:0", which is the CPU and isn't called "cpu").
"""

import contextlib
import csv
import dataclasses
import functools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    __main__ as program,
)
from benchmarks import (
    cuda,
    gpu_state,
    machine,
    report,
    runner,
    sanitize,
    step,
    tables,
)
from benchmarks.runner import Absent, Case, Result, measure

INSTEAD = "cpu:0"
RUN = report.Run("a GPU", "torch 0", "2026-01-01T00:00:00+00:00")


class FakeWorkload:
    """x -> 2x; every provider's calls take device time, and some go wrong."""

    copies = 3

    def __init__(self, gpu):
        self._gpu, self._x = gpu, torch.linspace(-1, 1, 100)
        self.alive: set[str] = set()
        self.most_alive = 0
        self.called: list[tuple[str, int]] = []

    def reference(self):
        return {"output": 2 * self._x.double()}

    def outputs(self, provider):
        if provider == "absent":
            raise Absent("no such library")
        return {"output": 2 * self._x + (0.1 if provider == "wrong" else 0.0)}

    def calls(self, provider):
        self.alive.add(provider)
        self.most_alive = max(self.most_alive, len(self.alive))
        return [functools.partial(self._call, provider, copy) for copy in range(self.copies)]

    def drop(self, provider):
        self.alive.discard(provider)

    def _call(self, provider, copy):
        self.called.append((provider, copy))
        if provider == "waits":
            self._gpu.synchronize()
        if provider == "grows" and len([c for c in self.called if c[0] == "grows"]) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self._gpu.launch({"slow": 0.6}.get(provider, 0.3))


def fake_case(gpu, *providers, capture=True, workload=None, **fields):
    workload = workload or FakeWorkload(gpu)
    return Case(
        suite="fake",
        name="double/100",
        dtype="bfloat16",
        threads=1,
        providers=providers,
        baselines=("plain",),
        prepare=lambda: workload,
        device="cuda",
        capture=capture,
        **fields,
    )


def probe(gbps=100.0):
    return SimpleNamespace(sample=lambda: gbps)


def test_samples_are_replays_of_one_graph_of_all_copies(gpu):
    workload = FakeWorkload(gpu)
    racer = cuda.CudaRacer(workload.calls("plain"), 2e-3, capture=True)
    assert racer.why_eager is None
    # Warmed up on every copy before the capture, on the stream that is captured, then only replays.
    assert [copy for _, copy in workload.called] == [0, 1, 2, 0, 1, 2]
    (captured,) = [at for at, entry in enumerate(gpu.log) if entry.startswith("capture")]
    assert gpu.log[:captured].count("launch") == 3 and "launch" not in gpu.log[captured:]
    assert gpu.log[captured] == "capture on default into (0, 1)"
    # A lap of three calls of 0.3 ms is 0.9 ms: three laps make 2 ms.
    assert racer.inner == 9
    before = gpu.log.count("replay")
    assert racer.sample(1) == pytest.approx(3e-4)
    assert gpu.log.count("replay") == before + 3


def test_what_cannot_be_captured_is_launched_call_by_call(gpu):
    workload = FakeWorkload(gpu)
    calls = workload.calls("waits")
    racer = cuda.CudaRacer(calls, 2e-3, capture=True)
    assert "RuntimeError" in racer.why_eager
    # What the allocator believes to be a capture still going on is ended.
    assert "end of (0, 1)" in gpu.log
    assert racer.inner == 7
    workload.called.clear()
    assert racer.sample(4) == pytest.approx(3e-4)
    assert [copy for _, copy in workload.called] == [1, 2, 0, 1, 2, 0, 1]


def test_a_pool_in_which_a_capture_failed_is_left(gpu):
    pool = cuda.Pool()
    for function in (lambda: gpu.launch(0.3), gpu.synchronize, lambda: gpu.launch(0.3)):
        with contextlib.suppress(RuntimeError):
            cuda.Graph(function, pool)
    pools = [entry.rpartition("into ")[2] for entry in gpu.log if entry.startswith("capture")]
    assert pools == ["(0, 1)", "(0, 1)", "(0, 2)"]


def test_whole_steps_are_not_captured(gpu):
    racer = cuda.CudaRacer(FakeWorkload(gpu).calls("plain"), 2e-3, capture=False)
    assert racer.why_eager is not None
    assert not [entry for entry in gpu.log if entry.startswith("capture")]


def test_a_python_error_in_a_capture_is_raised_as_it_is(gpu):
    def broken():
        raise ValueError("this shape")

    with pytest.raises(ValueError, match="this shape"):
        cuda.Graph(broken)
    assert gpu.capturing is None


def test_all_work_on_a_case_is_on_one_stream_and_memory_is_given_back_before(gpu):
    clock = cuda.clock()
    assert torch.backends.cudnn.benchmark
    with clock.session(1):
        assert gpu.stream == "a stream"
        with cuda.untuned():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
    assert gpu.stream == "default"
    assert gpu.log[:2] == ["empty_cache", "synchronize"]


def test_rows_say_what_was_timed_how(gpu):
    case = fake_case(gpu, "plain", "waits", "absent", "wrong", "slow", necessary_bytes=30_000_000)
    result = measure(case, probe(), rounds=5)
    assert result.absent == {"absent": "no such library"}
    assert set(result.red) == {"wrong"} and set(result.seconds) == {"plain", "waits", "slow"}
    rows = {(row.provider, row.metric): row for row in report.rows(result, RUN)}
    assert rows["plain", "graph_replay"].p50 == 1 and rows["waits", "graph_replay"].p50 == 0
    assert rows["plain", "time_ms"].p50 == pytest.approx(0.3)
    assert rows["slow", "speedup"].p50 == pytest.approx(0.5)
    assert rows["plain", "share_of_copy"].p50 == pytest.approx(1.0)  # 100 GB/s, as the probe
    shown = "\n".join(report.lines(result))
    assert "double/100  bfloat16, copy" in shown  # and nothing of threads
    assert "left out: no such library" in shown and "NO FIGURE: output is off" in shown
    assert "(no graph: RuntimeError" in shown
    (limit,) = report.limit_rows("fake", [result], RUN)
    assert (limit.provider, limit.dtype, limit.threads) == ("torch_copy", "float32", 1)


def test_matrix_rates_are_of_each_dtype(gpu):
    results = []
    for dtype in ("bfloat16", "float32"):
        case = dataclasses.replace(fake_case(gpu, "plain", images=8), dtype=dtype)
        results.append(measure(case, probe(), matrix=probe(7e5), rounds=3))
    limits = {(row.provider, row.dtype) for row in report.limit_rows("fake", results, RUN)}
    assert limits == {
        ("torch_copy", "float32"),
        ("torch_matmul", "bfloat16"),
        ("torch_matmul_tf32", "float32"),
    }


def test_a_rival_that_runs_out_of_memory_leaves_the_others_alone(gpu):
    result = measure(fake_case(gpu, "grows", "plain", capture=False), probe(), rounds=5)
    assert "OutOfMemoryError: CUDA out of memory" in result.red["grows"]
    assert len(result.seconds["plain"]) == 5 and "grows" not in result.seconds


def test_rivals_that_fill_the_memory_run_alone(gpu):
    workload = FakeWorkload(gpu)
    case = fake_case(gpu, "plain", "slow", "wrong", workload=workload, alone=True)
    result = measure(case, probe(), rounds=4)
    assert workload.most_alive == 1 and workload.alive == set()
    assert [len(values) for values in result.seconds.values()] == [4, 4]
    assert set(result.red) == {"wrong"}
    assert len(result.copy_gbps) == 8  # the limit is taken beside each


def test_an_interrupted_case_keeps_its_rounds(gpu):
    samples = []

    def sample():
        samples.append(100.0)
        if len(samples) == 8:
            raise KeyboardInterrupt
        return 100.0

    with pytest.raises(KeyboardInterrupt) as stopped:
        measure(fake_case(gpu, "plain", "slow"), SimpleNamespace(sample=sample), rounds=15)
    kept = stopped.value.result
    assert all(5 <= len(values) <= 7 for values in kept.seconds.values())
    assert report.rows(kept.cut(), RUN) and kept.cut(8).seconds == {}


# The command.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "--device", "cuda"], "--device is cuda; torch"),
        (["all", "--device", "cuda", "--quick"], "--device is cuda; torch"),
        (["step", "--device", "cuda", "--markdown"], "--device is cuda; torch"),
        (["ops", "--device", "cuda", "--threads", "1"], "--threads is for the CPU's suites"),
        (["ops", "--sanitize"], "--sanitize is for --device cuda"),
        (["ops", "--seconds", "0"], "--seconds is 0; it must be more than 0"),
    ],
)
def test_command_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said


@pytest.fixture
def quick_step(gpu, graphs, small, monkeypatch):
    """`step --device cuda --quick` on a network of no size, on the CPU."""
    make = step.StepWorkload
    monkeypatch.setattr(
        step, "StepWorkload", lambda case, device, plains: make(case, INSTEAD, plains)
    )
    for name in ("CopyLimit", "MatrixLimit"):
        limit = functools.partial(getattr(cuda, name), device=INSTEAD)
        monkeypatch.setattr(cuda, name, limit)
    monkeypatch.setattr(cuda, "warm_up", lambda matrix: None)
    monkeypatch.setattr(cuda, "_seconds", lambda begin, end: 1e-3)
    monkeypatch.setattr(runner, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(cuda, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(gpu_state, "_command", lambda *what: None)
    original = step._gpu_cases

    def cases(dtypes, quick, compiled):
        tiny = step.StepCase("R14x0.125", 4, 33, "bfloat16", distinct=2)
        return [step._gpu_case(tiny, ("bit", "bit_graph", "timm", "conv_only", "eager"))]

    assert original(["bfloat16"], True, False)[0].name == "R26x0.25/32x3x64x64"
    monkeypatch.setattr(step, "_gpu_cases", cases)
    return gpu


def test_command_measures_writes_and_shows(quick_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    assert program.main(["step", "--device", "cuda", "--rounds", "3"]) == 0
    out = tmp_path / "step-h100-80gb-hbm3.csv"
    assert out.with_suffix(".png").stat().st_size > 1000
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    assert {row["device"] for row in rows} == {machine.device("cuda")}
    assert "132 multiprocessors, 80 GiB, L2 50 MiB" in rows[0]["device"]
    assert "CUDA 13.0" in rows[0]["versions"]
    assert {row["threads"] for row in rows} == {"1"}
    metrics = {(row["provider"], row["metric"]) for row in rows}
    for provider in ("bit/channels_last", "bit_graph/channels_last", "conv_only/channels_last"):
        assert (provider, "images_per_s") in metrics
    assert not any(metric == "graph_replay" for _, metric in metrics)  # the name says it
    assert ("bit_graph/channels_last", "times_limit") in metrics
    assert ("torch_matmul", "matrix_gflops") in metrics
    capsys.readouterr()
    assert program.main(["step", "--device", "cuda", "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| R14x0.125/4x3x33x33 | bfloat16 | 1 | bit_graph/channels_last |" in shown
    assert "limit: matrix_gflops" in shown


def test_command_checks_without_a_time(quick_step, capsys, monkeypatch):
    monkeypatch.setattr(program, "measure", None)
    assert program.main(["step", "--device", "cuda", "--check"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("right") == 6 and "step: 0 wrong" in shown


def fake_results(monkeypatch, seconds_each=0.0, error=None):
    """Cases that are all measured at once, each in so many seconds of the host."""
    clock = SimpleNamespace(now=0.0)

    def measured(case, copy, *, matrix, rounds, seed):
        clock.now += seconds_each
        if error is not None and "/tiny/" not in case.name:
            raise error
        return Result(case, {"triton": [1e-3], "eager": [2e-3]}, [3000.0])

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(program, "measure", measured)


def test_no_case_is_begun_after_the_budget(quick_step, tmp_path, monkeypatch, capsys):
    fake_results(monkeypatch, seconds_each=4.0)
    out = tmp_path / "ops.csv"
    common = ["ops", "--device", "cuda", "--filter", "group_norm_relu", "--dtype", "bfloat16"]
    assert program.main([*common, "--out", str(out), "--seconds", "10"]) == 0
    with out.open(newline="") as file:
        measured = {row["case"] for row in csv.DictReader(file) if row["metric"] == "time_ms"}
    assert len(measured) == 3 and all("/32x" in name for name in measured)
    assert "the 10 s are over after 3 of" in capsys.readouterr().err


def test_a_case_that_fails_is_red_and_the_next_one_is_measured(
    quick_step, tmp_path, monkeypatch, capsys
):
    fake_results(monkeypatch, error=torch.OutOfMemoryError("CUDA out of memory"))
    out = tmp_path / "ops.csv"
    common = ["ops", "--device", "cuda", "--quick", "--dtype", "float16", "--out", str(out)]
    assert program.main([*common, "--filter", "group_norm_relu"]) == 1
    assert "NO FIGURE: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    with out.open(newline="") as file:
        measured = {row["case"] for row in csv.DictReader(file) if row["metric"] == "time_ms"}
    assert measured and all("/tiny/" in name for name in measured)
    # With nothing measured and nobody asked there is no file, and no picture of it.
    nothing = tmp_path / "nothing.csv"
    assert program.main([*common[:-1], str(nothing), "--filter", "batch1"]) == 1
    assert not nothing.is_file()


def test_a_lost_gpu_ends_the_suite(quick_step, tmp_path, monkeypatch, capsys):
    fake_results(monkeypatch)
    quick_step.failing = "CUDA error: an illegal memory access was encountered"
    common = ["ops", "--device", "cuda", "--filter", "group_norm_relu", "--out"]
    monkeypatch.setattr(cuda, "CopyLimit", lambda: None)
    assert program.main([*common, str(tmp_path / "ops.csv")]) == 1
    said = capsys.readouterr().err
    assert "the GPU answers no more (CUDA error: an illegal memory access" in said
    assert "after 1 of" in said


def test_suites_that_lack_a_package_are_left_out_of_all(monkeypatch, capsys):
    load = program.importlib.import_module

    def without_training(name):
        if name == "benchmarks.accuracy":
            raise ModuleNotFoundError("No module named 'tyro'")
        return load(name)

    monkeypatch.setattr(program.importlib, "import_module", without_training)
    assert program.main(["all", "--device", "cuda", "--list"]) == 0
    shown = capsys.readouterr()
    assert "left out: suite is accuracy, which can't run here: No module named 'tyro'" in shown.err
    assert "R50x1/256x3x224x224" in shown.out
    with pytest.raises(SystemExit):
        program.main(["accuracy", "--device", "cuda", "--list"])


# What the driver and the sanitizer say.


@pytest.fixture
def driver(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *driver_version*) echo 580.95.05 ;;\n"
        "  *utilization*) echo 25 ;;\n"
        "  *loop*) for clock in 1755 1980 1980; do echo $clock, 2619, 41, [N/A]; done\n"
        "    exec sleep 60 ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_clocks_are_watched_during_a_run(driver):
    assert gpu_state.driver() == "580.95.05"
    assert gpu_state.busy() == 0.25
    watch = gpu_state.Watch()
    deadline = time.monotonic() + 20
    while watch._file.tell() == 0 and time.monotonic() < deadline:
        watch._file.seek(0, 2)
        time.sleep(0.05)
    samples = watch.samples()
    assert samples == {
        "sm_clock": [1755, 1980, 1980],
        "memory_clock": [2619] * 3,
        "temperature": [41] * 3,
    }
    rows = report.state_rows("ops", samples, RUN)
    assert [(row.metric, row.p50, row.unit) for row in rows][0] == ("sm_clock", 1980, "MHz")
    assert "during the run: sm_clock 1980" in tables.markdown(rows)


def test_nothing_is_known_where_the_driver_says_nothing(monkeypatch):
    monkeypatch.setattr(gpu_state.shutil, "which", lambda program: None)
    assert gpu_state.driver() is None and gpu_state.busy() is None
    assert gpu_state.Watch().samples() == {}
    assert gpu_state.parse(["1980, 2619", "1980, 2619, 40, 300.5, 1", "x, 2619, 40, 300.5"]) == {
        "memory_clock": [2619],
        "temperature": [40],
        "power": [300.5],
    }


@pytest.mark.parametrize("found, status", [(0, 0), (sanitize.FOUND, 1), (1, 1)])
def test_the_sanitizers_verdict(found, status, tmp_path, gpu, monkeypatch, capfd):
    script = tmp_path / "compute-sanitizer"
    script.write_text(f'#!/bin/sh\necho "$*"; echo $PYTORCH_NO_CUDA_MEMORY_CACHING; exit {found}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked = ["ops", "--device", "cuda", "--sanitize"]
    assert program.main([*asked, "racecheck"]) == status
    shown = capfd.readouterr().out
    assert (
        shown.count("--tool=") == shown.count("--tool=racecheck") == 1
        and "--check" in shown
        and "\n1\n" in shown
    )
    assert {0: "nothing found", 9: "FOUND ERRORS", 1: "failed with status 1"}[found] in shown
    assert program.main(asked) == status
    assert capfd.readouterr().out.count("--tool=") == len(sanitize.TOOLS)


def test_a_sanitizer_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "program", lambda: None)
    assert sanitize.run() == 1
    assert "compute-sanitizer is not here" in capsys.readouterr().out
