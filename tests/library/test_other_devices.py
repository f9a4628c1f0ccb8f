"""Devices that we have no kernels for run the reference path, with values and without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bit import models
from bit_kernels import GroupNorm, StdConv2d, convert, norm_relu_conv
from bit_kernels.optim import SGD

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:bit_kernels.* runs as plain PyTorch")


def test_a_device_of_another_type_trains_as_the_cpu_does():
    """In a process of its own: a device type is registered once and for all."""
    script = ROOT / "tests/library/other_device.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and done.stdout.split() == ["right"], done.stderr


def test_network_trains_on_meta():
    model = models.create("R14x0.25", 10, device="meta")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, model=model)
    for _ in range(2):
        logits = model(torch.empty(2, 3, 40, 40, device="meta"))
        F.cross_entropy(logits, torch.empty(2, dtype=torch.int64, device="meta")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits.shape == (2, 10) and logits.is_meta
    assert all(p.is_meta for p in model.parameters())


def test_modules_run_on_meta():
    conv = StdConv2d(6, 8, 3, padding=1, device="meta")
    norm = GroupNorm(4, 8, activation="relu", device="meta")
    last = nn.Conv2d(8, 5, 1, device="meta")
    x = torch.empty(2, 6, 9, 7, device="meta", requires_grad=True)
    (y,) = norm_relu_conv(conv(x), norm, last)
    y.sum().backward()
    assert y.shape == (2, 5, 9, 7) and x.grad.shape == x.shape
    assert all(p.grad.is_meta for p in [*conv.parameters(), *norm.parameters()])


def test_convert_leaves_a_network_on_meta_able_to_run():
    model = nn.Sequential(
        nn.GroupNorm(2, 4, device="meta"), nn.ReLU(), nn.Conv2d(4, 3, 1, device="meta")
    )
    convert(model)
    assert model(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 3, 5, 5)
