"""benchmarks/gpu.py and goals.py: parts that end in time, a log, a summary of what is to be shown."""

import io
import os
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import goals, gpu, report
from benchmarks.runner import Count, Figure

DEVICE = "NVIDIA H100 80GB HBM3, 132 multiprocessors, 79 GiB, L2 50 MiB"


class Log:
    def __init__(self):
        self.lines: list[str] = []

    def say(self, line):
        self.lines.append(line)


def python(code):
    return [sys.executable, "-uc", textwrap.dedent(code)]


def test_a_part_is_logged_as_it_speaks():
    log = Log()
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert gpu.execute(python(code), 30, log, dict(os.environ)) == 3
    assert {"one", "two"} <= set(log.lines)


def test_a_part_that_takes_too_long_may_write_down_what_it_has(monkeypatch, tmp_path):
    code = f"""
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("measuring")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        open({str(tmp_path / "kept")!r}, "w").write("half")
        sys.exit(130)
    """
    log = Log()
    assert gpu.execute(python(code), 3, log, dict(os.environ)) == gpu.CUT_OFF
    assert (tmp_path / "kept").read_text() == "half"
    assert "3 s are over" in log.lines


def test_a_part_that_does_not_mind_is_ended(monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 1)
    code = """
    import signal, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("deaf")
    time.sleep(60)
    """
    began = time.monotonic()
    assert gpu.execute(python(code), 2, Log(), dict(os.environ)) == gpu.CUT_OFF
    assert time.monotonic() - began < 30


def test_commands_of_the_parts(tmp_path, monkeypatch):
    parts = {part.name: part for part in gpu.PARTS}
    command = gpu._command(parts["step"], tmp_path, "h100", 150)
    assert command[1:7] == ["-m", "benchmarks", "step", "--device", "cuda", "--out"]
    assert command[7:] == [
        *(str(tmp_path / "step-h100.csv"), "--seconds", "60"),
        *("--rounds", "7", "--filter", "R50x1"),
    ]
    # Cut short by what is left, so that the suite itself can end in time.
    assert gpu._command(parts["step"], tmp_path, "h100", 40)[9] == str(40 - gpu.PATIENCE)
    # What is measured again with the tuned table takes nothing from what was measured without.
    files = {
        name: gpu._command(parts[name], tmp_path, "h100", 100)[7] for name in ("step", "step_tuned")
    }
    assert files["step_tuned"] == str(tmp_path / "step_tuned-h100.csv") != files["step"]
    assert gpu._environment(parts["tests"], "90a")["DEVICE"] == "cuda"
    assert "DEVICE" not in {*gpu._environment(parts["step"], "90a")} - {*os.environ}
    monkeypatch.delenv("BIT_KERNELS_CUDA_ARCHS", raising=False)
    assert gpu._environment(parts["build"], "90a")["BIT_KERNELS_CUDA_ARCHS"] == "90a"
    assert gpu._command(parts["memcheck"], tmp_path, "h100", 100)[-1] == "memcheck"


def test_tests_are_those_that_can_run_here(tmp_path, monkeypatch):
    (part,) = [part for part in gpu.PARTS if part.name == "tests"]
    (tmp_path / "bit_kernels").mkdir()
    (tmp_path / "bit_kernels" / "_cuda.abi3.so").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    tests = gpu._command(part, tmp_path, "h100", 100)
    assert {*gpu.TESTS, "-n"} < {*tests} and "-k" not in tests
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "bit_kernels" / "_cuda.abi3.so").unlink()
    tests = gpu._command(part, tmp_path, "h100", 100)
    assert tests[-2:] == ["-k", "not opcheck"] and "-n" not in tests
    assert {*gpu.TESTS} & {*tests} == {"tests/ops", "tests/triton"}


def test_the_most_important_parts_are_begun_in_one_call():
    first = gpu.PARTS[:6]
    names = [part.name for part in first]
    assert names == ["build", "tests", "step", "ops", "memory", "step_large"]
    latest = sum(part.seconds + gpu.PATIENCE for part in first[:-1])
    assert latest + first[-1].seconds <= 9 * 60


def test_every_suite_that_a_part_names_knows_its_options():
    from benchmarks.__main__ import SUITES, _cases, _parser

    for part in gpu.PARTS:
        if part.suite:
            assert part.suite in SUITES and (part.csv or part.suite) in gpu.CSVS
            assert 0 < part.budget < part.seconds
            command = gpu._command(part, Path("out"), "h100", part.seconds)
            options = _parser().parse_args(command[3:])
            assert _cases(part.suite, options), part.name


@pytest.fixture
def parts(monkeypatch):
    """In place of the real ones: one that is right, one that is red, one for which there is no time."""
    monkeypatch.setattr(gpu, "_describe", lambda log: ("h100", "90a"))
    codes = {"build": "print('built')", "step": "raise SystemExit(1)", "ops": "print('measured')"}
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, (), 60) for name in codes))
    monkeypatch.setattr(gpu, "_command", lambda part, out, name, limit: python(codes[part.name]))
    return codes


def test_one_red_part_is_told_and_the_others_run(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--few-files"])
    mine = ["ops-h100.csv", "step-h100.csv", "step-h100.png"]
    others = ["norm_relu_conv.csv", "step-another.csv", "step-another.png"]
    for name in mine + others:
        (tmp_path / name).touch()
    assert gpu.main() == 1
    log = (tmp_path / "gpu.log").read_text()
    assert "built" in log and "measured" in log and "red: step (status 1)" in log
    assert "not measured" in (tmp_path / "gpu-h100.md").read_text()
    assert zipfile.ZipFile(tmp_path / "results.zip").namelist() == mine
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"gpu.log", "gpu-h100.md", "results.zip", *others}
    with pytest.raises(SystemExit):  # rather than write over what was measured
        gpu.main()


def test_green_is_zero_and_parts_can_be_chosen(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--skip", "step"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 0
    log = (tmp_path / "gpu.log").read_text()
    assert "nothing is red" in log and "status 1" not in log


def test_the_tuned_table_is_among_the_results(parts, tmp_path, monkeypatch):
    table = tmp_path / "checkout" / "norm_relu_conv.csv"
    table.parent.mkdir()
    parts["tune"] = f"open({str(table)!r}, 'w').write('measured')"
    monkeypatch.setattr(gpu, "TABLE", table)
    monkeypatch.setattr(gpu, "PARTS", (gpu.Part("tune", (), 60),))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "tune", "--out", str(tmp_path)])
    assert gpu.main() == 0
    assert (tmp_path / table.name).read_text() == "measured"


def test_what_there_is_no_time_for_is_named(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--minutes", "0.1"])
    assert gpu.main() == 0
    log = (tmp_path / "gpu.log").read_text()
    assert "build: not begun" in log and "not finished: build, step, ops" in log


def test_a_part_whose_package_is_missing_is_named_and_not_red(parts, tmp_path, monkeypatch):
    needy = gpu.Part("step", (), 60, needs=("no_such_package",))
    monkeypatch.setattr(gpu, "PARTS", (gpu.Part("build", (), 60), needy))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 0
    log = (tmp_path / "gpu.log").read_text()
    assert "step: left out; pip install no_such_package" in log and "built" in log
    assert "left out: step" in log and "nothing is red" in log


def test_the_gpu_is_asked_for_its_architecture(tmp_path, monkeypatch):
    log = Log()
    monkeypatch.setattr(gpu, "NAMES", "for line in ('h100', 'H100', 'torch', '9 0'): print(line)")
    assert gpu._describe(log) == ("h100", "90a") and log.lines[-1] == "h100\nH100\ntorch"
    monkeypatch.setattr(gpu, "NAMES", "for line in ('a100', 'A100', 'torch', '8 0'): print(line)")
    assert gpu._describe(log) == ("a100", "80")


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "NAMES", "raise AssertionError('no GPU here')")
    assert gpu.main() == 2
    assert "no GPU to measure on" in (tmp_path / "gpu.log").read_text()


def synthetic(path, suite, figures, date="2026-01-01"):
    """A CSV as the suites write it; figures: (case, dtype, provider, metric, value)."""
    out = report.CsvFile(path)
    for case, dtype, provider, metric, value in figures:
        figure = Figure(provider, metric, value, value, value, "1")
        run = report.Run(DEVICE, "torch 0", date)
        out.append([report.row(Count(suite, case, dtype, 1, list), figure, run)])


def test_goals_are_read_from_the_csvs(tmp_path):
    name, last = "R50x1/256x3x224x224", "channels_last"
    steps = [
        (name, "bfloat16", f"bit/{last}", "images_per_s", 3000.0),
        (name, "bfloat16", f"timm/{last}", "images_per_s", 1400.0),
        (name, "bfloat16", "timm/NCHW", "images_per_s", 1500.0),
        (name, "bfloat16", f"bit_graph/{last}", "images_per_s", 3030.0),
        (name, "bfloat16", f"timm_graph/{last}", "images_per_s", 1450.0),
        (name, "bfloat16", f"timm_batch_norm/{last}", "images_per_s", 3300.0),
        (name, "bfloat16", f"bit/{last}", "times_limit", 1.2),
        (name, "bfloat16", f"bit_graph/{last}", "times_limit", 1.05),
        (f"{name}/compiled", "bfloat16", f"bit_compiled/{last}", "images_per_s", 3100.0),
        (f"{name}/compiled", "bfloat16", f"timm_compiled/{last}", "images_per_s", 2000.0),
        (f"{name}/compiled", "bfloat16", f"bit/{last}", "images_per_s", 1.0),
    ]
    files = {name: tmp_path / f"{name}.csv" for name in gpu.CSVS}
    synthetic(files["step"], "step", [(*steps[0][:4], 99.0)], date="2025-12-31")
    synthetic(files["step"], "step", steps)
    shares = [
        (f"group_norm_relu/r50x1/{shape}/{layout}/forward", dtype, provider, "share_of_copy", value)
        for shape, layout, dtype, provider, value in (
            ("32x64x56x56", last, "bfloat16", "triton", 0.8),
            ("32x64x56x56", last, "bfloat16", "cuda", 0.9),
            ("128x64x56x56", last, "bfloat16", "triton", 0.95),
            ("8x64x56x56", last, "bfloat16", "triton", 0.1),
            ("32x64x56x56", "NCHW", "bfloat16", "triton", 0.2),
            ("32x64x56x56", last, "float32", "triton", 0.3),
            ("32x64x56x56", last, "bfloat16", "eager", 0.4),
        )
    ]
    synthetic(files["ops"], "ops", shares)
    text = goals.summary(files)
    assert "| R50x1, images/s over timm's BiT | at least 1.8 | 2 | met |" in text
    assert "| R50x1, images/s over its BatchNorm twin | at least 0.95 | 0.909 | missed |" in text
    # Of the fastest that timm's BiT has been, in whatever layout and without a graph, too.
    assert "timm's BiT, as CUDA graphs | at least 1.8 | 2.02 | met |" in text
    assert "timm's BiT, compiled | at least 1.8 | 1.55 | missed |" in text
    assert "| R50x1, images/s, the best of ours |  | 3.03e+03 |  |" in text
    assert "convolves in NCHW whatever it is given" in text and "tuned" not in text
    assert "R50x1, step over conv_only, the best of ours | at most 1.1 | 1.05 | met |" in text
    assert "R152x4, step over conv_only, the best of ours | at most 1.1 | not measured | |" in text
    assert "lowest share of copy | at least 0.85 | 0.9 | met |" in text
    assert text.count("not measured") >= 5


def test_goals_show_what_tuned_convolutions_bring(tmp_path):
    name, ours = "R50x1/256x3x224x224", "bit/channels_last"
    files = {name: tmp_path / f"{name}.csv" for name in ("step", "step_tuned")}
    for file, ratio in (("step", 1.2), ("step_tuned", 1.08)):
        synthetic(files[file], "step", [(name, "bfloat16", ours, "times_limit", ratio)])
    text = goals.summary(files)
    assert "R50x1, step over conv_only, the best of ours | at most 1.1 | 1.2 | missed |" in text
    assert "over conv_only, convolutions tuned, the best of ours | at most 1.1 | 1.08 | met" in text


def test_goals_name_what_takes_timms_place(tmp_path):
    name, last, path = "R50x1/256x3x224x224", "channels_last", tmp_path / "step.csv"
    rates = {"bit": 3000.0, "eager": 1000.0, "batch_norm": 3000.0}
    figures = [(name, "bfloat16", f"{n}/{last}", "images_per_s", v) for n, v in rates.items()]
    synthetic(path, "step", figures)
    text = goals.summary({"step": path})
    assert "images/s over plain PyTorch (timm is missing) | at least 1.8 | 3 | met |" in text
    assert "its BatchNorm twin in plain PyTorch (timm is missing) | at least 0.95 | 1 | met" in text


def test_log_writes_at_once():
    file = io.StringIO()
    gpu.Log(file).say("now")
    assert file.getvalue() == "now\n"
