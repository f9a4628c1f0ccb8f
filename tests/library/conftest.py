"""A stand-in for a GPU, and benchmarks of a size for it."""

import itertools

import gpu_stand_in
import pytest
import torch

from benchmarks import cuda


@pytest.fixture
def gpu(monkeypatch):
    found = gpu_stand_in.Gpu()
    found.install(monkeypatch)
    cuda.clock.cache_clear()
    yield found
    cuda.clock.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """Limits and inputs of a size that a CPU copies and multiplies in no time."""
    monkeypatch.setattr(cuda, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(cuda, "MATRIX_SIDE", 16)
    monkeypatch.setattr(cuda, "l2_bytes", lambda: 1 << 12)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(cuda, "Graph", gpu_stand_in.RunAgain)
    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
