"""python -m bit_kernels.triton.tune: what it measures, that it checks first, what it writes."""

import time
from types import SimpleNamespace

import pytest
import torch
from checking import BACKEND, DEVICE

pytest.importorskip("triton")

from bit import models
from bit_kernels.triton import norm_relu_conv as gpu
from bit_kernels.triton import tune
from bit_kernels.triton._launch import device_name
from bit_kernels.triton.norm_relu_conv import Case, Tile

with_kernels = pytest.mark.skipif(
    BACKEND != "triton", reason="for Triton's kernels: BIT_KERNELS_INTERPRET=1 or a GPU"
)
TILES = (Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2))
CASES = [
    Case("float32", 2, 12, 8, 1, 1, 0, 5, 4, True),
    Case("float16", 2, 12, 8, 3, 2, 1, 5, 4, False),
]


@pytest.mark.parametrize("name, size, batch", [("R50x1", 224, 256), ("R50x3", 321, 6)])
def test_cases_are_what_the_network_runs(name, size, batch, monkeypatch):
    ran = []

    def noted(input, norm, *convs, residual=None, next_norm=None):
        for conv in convs:
            if conv is not None:
                first = conv is convs[0]
                ran.append(Case.of(input, conv, residual is not None and first))
        return call(input, norm, *convs, residual=residual, next_norm=next_norm)

    call = models.norm_relu_conv
    monkeypatch.setattr(models, "norm_relu_conv", noted)
    model = models.create(name, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.empty(batch, 3, size, size, device="meta", dtype=torch.bfloat16))
    cases = tune.network_cases(name, size, batch, "bfloat16")
    assert None not in ran and set(cases) == set(ran) and len(cases) == len(set(cases))


def wall_clock(functions):
    seconds = []
    for function in functions:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


@with_kernels
def test_what_is_measured_decides(tmp_path, monkeypatch):
    device, path = torch.device(DEVICE), tmp_path / "measured.csv"
    name = device_name(torch.empty(0, device=device).device)
    measured = {}
    for case in CASES:
        measured[name, case], faults = tune.measure(case, 2, device, wall_clock, TILES)
        assert not faults and set(measured[name, case]) == {*gpu.PARTS, *map(str, TILES)}
        line = tune.report(case, measured[name, case])
        assert "12 to     8" in line and (" + residual" in line) == case.residual
    gpu.write(path, measured)
    again = gpu.read(path)
    assert again.keys() == measured.keys()
    for key, ways in measured.items():
        assert again[key] == {
            way: pytest.approx(seconds, rel=1e-2) for way, seconds in ways.items()
        }
    monkeypatch.setattr(gpu, "TABLE", path)
    gpu._measured.cache_clear()
    gpu.fastest.cache_clear()
    try:
        for case in CASES:
            ways = again[name, case]
            fused = min(ways[str(tile)] for tile in TILES)
            faster = fused < ways["group_norm_relu_apply"] + ways["convolution"]
            assert (gpu.fastest(name, (case,), True) is not None) == faster
    finally:
        monkeypatch.undo()
        gpu._measured.cache_clear()
        gpu.fastest.cache_clear()


@with_kernels
@pytest.mark.parametrize("wrong", ["output", "mean", "rstd", "NaN"])
def test_a_wrong_tile_gets_no_figure(wrong, monkeypatch):
    def spoiled(*args, **keywords):
        output, *found = convolve(*args, **keywords)
        if args[9] == TILES[0]:
            if wrong in ("output", "NaN"):
                output[0, 0, 0, 0] += 0.01 if wrong == "output" else float("nan")
            else:
                found[wrong == "rstd"][1, 0] *= 1.01
        return output, *found

    convolve = gpu.convolve
    monkeypatch.setattr(gpu, "convolve", spoiled)
    ways, faults = tune.measure(CASES[0], 2, torch.device(DEVICE), wall_clock, TILES)
    assert str(TILES[0]) not in ways and str(TILES[1]) in ways
    assert len(faults) == 1 and faults[0].startswith(f"{TILES[0]}: ")


@with_kernels
def test_a_tile_that_does_not_fit_is_left_out(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refused(*args, **keywords):
        if args[9] == TILES[1]:
            raise OutOfResources(300000, 232448, "shared memory")
        return convolve(*args, **keywords)

    convolve = gpu.convolve
    monkeypatch.setattr(gpu, "convolve", refused)
    ways, faults = tune.measure(CASES[1], 2, torch.device(DEVICE), wall_clock, TILES)
    assert set(ways) == {*gpu.PARTS, str(TILES[0])} and not faults


def test_the_separate_way_is_timed_as_training_has_it(monkeypatch, tmp_path):
    tried = {}

    def clock(device):
        tried["timed"] = torch.backends.cudnn.benchmark

    def truth():
        tried["float64"] = torch.backends.cudnn.benchmark
        tried["tf32"] = torch.backends.cudnn.allow_tf32
        raise InterruptedError

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "gpu_clock", clock)
    monkeypatch.setattr(
        tune._Inputs, "of", lambda *arguments: SimpleNamespace(ways=id, truth=truth)
    )
    with pytest.raises(InterruptedError):
        tune.main(["--output", str(tmp_path / "measured.csv")])
    assert tried == {"timed": True, "float64": False, "tf32": False}


@pytest.mark.skipif(DEVICE != "cuda", reason="about a GPU's clock")
def test_a_gpu_is_measured(tmp_path):
    path = tmp_path / "measured.csv"
    arguments = ["--batch", "8", "--size", "64", "--output", str(path)]
    assert tune.main(arguments) == 0
    rows = gpu.read(path)
    assert {case for _, case in rows} == set(tune.network_cases("R50x1", 64, 8, "bfloat16"))
    assert all(0 < seconds < 1 for ways in rows.values() for seconds in ways.values())


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "measured.csv"
    assert tune.main(["--output", str(path)]) == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and said.count("\n") == 1 and not path.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "R50"], "model is 'R50'; it may be R50x1"),
        (["--model", "R51x1"], "model is 'R51x1'; it may be"),
        (["--batch", "0"], "must be at least 1"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        tune.main(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err
