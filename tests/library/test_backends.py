"""Which implementation serves a call, and what the installation says of itself."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import bit_kernels

ROOT = Path(__file__).parents[2]
backends = importlib.import_module("bit_kernels.backends")


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_small_tensors_stay_with_pytorch(monkeypatch):
    monkeypatch.setitem(backends.small_elements, "group_norm_relu", 1000)
    small, large = torch.zeros(1, 10, 10, 10), torch.zeros(1, 10, 11, 10)
    assert backends.choose("group_norm_relu", small) == "reference"
    assert backends.choose("group_norm_relu", large) == "cpp"
    assert backends.choose("group_norm_relu", small, "cpp") == "cpp"
    weight = torch.zeros(4, 3, 3, 3)
    monkeypatch.setitem(backends.small_elements, "standardize_weight", 1000)
    assert backends.choose("standardize_weight", weight) == "reference"
    with torch.no_grad():
        assert backends.choose("standardize_weight", weight) == "cpp"
    channels_last = small.to(memory_format=torch.channels_last)
    assert backends.choose("group_norm_relu", channels_last) == "cpp"


def test_cuda_serves_who_asks_for_it():
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="not written in CUDA C.., only group_norm_relu and sgd"):
        backends.choose("standardize_weight", x, "cuda")
    with pytest.raises(ValueError, match="can't serve bit_kernels.sgd.*device type 'cpu'"):
        backends.choose("sgd", x, "cuda")
    with pytest.raises(ValueError, match="'triton' can't serve.*device type 'cpu'"):
        backends.choose("sgd", x, "triton")


def test_old_gpus_are_told():
    assert backends._why_not_capability((8, 0)) is backends._why_not_capability((12, 0)) is None
    assert "8.0 and newer; this GPU has 7.5" in backends._why_not_capability((7, 5))


def test_report():
    report = bit_kernels.backends()
    assert set(report) == {
        "group_norm_relu",
        "mixup",
        "norm_relu_conv",
        "sgd",
        "standardize_weight",
    }
    for cases in report.values():
        assert cases["cpu float32"].startswith("cpp (")
        assert "float64" in cases["cpu float64"]


def test_state_of_the_installation():
    text = subprocess.run(
        [sys.executable, "-m", "bit_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in text and bit_kernels.__version__ in text
    assert "cpp (" in text and "built with" in text


# An editable installation of this checkout would lend its library to the copy.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
"""
USE = """
import torch, warnings
import bit_kernels
layer = bit_kernels.GroupNorm(2, 4, activation="relu")
layer(bit_kernels.StdConv2d(3, 4, 3)(torch.randn(1, 3, 6, 6))).sum().backward()
layer(bit_kernels.StdConv2d(3, 4, 3)(torch.randn(1, 3, 6, 6)))
for _ in range(2):
    bit_kernels.functional.mixup(torch.zeros(2, 5, 5, 3, dtype=torch.uint8), 0.5, [1, 0])
op = torch.ops.bit_kernels.group_norm_relu(torch.randn(2, 4, 3), 2, None, None, 1e-5, True)
print("works", op[0].shape)
"""


@pytest.mark.parametrize(
    "has_sources, remedy", [(True, "make setup"), (False, "install one and run: pip install")]
)
def test_without_the_native_library(tmp_path, has_sources, remedy):
    """A checkout that was never built, and an installation made without a compiler."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "bit_kernels", tmp_path / "bit_kernels", ignore=ignore)
    if has_sources:
        (tmp_path / "csrc").mkdir()
    told = python(ALONE + USE, tmp_path, PYTHONPATH=str(tmp_path))
    assert "works torch.Size([2, 4, 3])" in told
    assert told.count("group_norm_relu runs as plain PyTorch") == 1
    assert told.count("mixup runs as plain PyTorch") == 1
    assert told.count(remedy) == 3  # once an op
    show = "import runpy; runpy.run_module('bit_kernels', run_name='__main__')"
    state = subprocess.run(
        [sys.executable, "-c", ALONE + show], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert "native        missing" in state and remedy in state


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_slower_instruction_sets_agree(isa, tmp_path):
    """The builds that other processors run, against this processor's own, in one small network."""
    code = """
import torch
from bit_kernels.functional import group_norm_relu, mixup, standardize_weight
import bit_kernels._native, numpy
torch.manual_seed(0)
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((2, 12, 9, 11), (3, 40, 7, 7), (2, 64, 1, 1)):
        for format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype).to(memory_format=format).requires_grad_()
            w = torch.randn(shape[1]).to(dtype).requires_grad_()
            y = group_norm_relu(x, 4, w, torch.ones_like(w), backend="cpp")
            k = standardize_weight(x, backend="cpp")
            out += [y, k, *torch.autograd.grad((y * y).sum() + (k * y).sum(), (x, w))]
bytes = numpy.random.default_rng(0).integers(0, 256, (3, 9, 21, 3), dtype=numpy.uint8)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for channels in (1, 2, 3):
        options = dict(partner=[2, 1, 0], crop=(7, 19), flips=[True, False, False], dtype=dtype)
        out.append(mixup(bytes[..., :channels], 0.3, **options, backend="cpp"))
# Largest and smallest half, subnormal halves, ties: the conversions without an instruction.
edge = torch.tensor([[65504.0, 6e-8, 1e-7, -3e-5, 2049.0, 2051.0, 0.0, -0.0]]).half()
out.append(standardize_weight(edge, backend="cpp"))
numpy.savez(PATH, *[t.detach().float().numpy() for t in out])
print(bit_kernels._native.isa())
"""
    found = []
    for name in (isa, ""):
        path = tmp_path / f"{name}.npz"
        environment = {"BIT_KERNELS_ISA": name} if name else {}
        text = python(code.replace("PATH", repr(str(path))), ROOT, **environment)
        found.append(numpy.load(path))
        if name:
            assert text.strip().endswith(name)
    for key in found[0].files:
        slower, native = found[0][key], found[1][key]
        assert numpy.abs(slower - native).max() <= 0.01 * numpy.abs(native).max() + 1e-6, key
