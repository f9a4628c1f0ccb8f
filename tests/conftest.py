"""What every test runs under."""

import importlib

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every uninitialised tensor with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def kernels_for_small_tensors(monkeypatch):
    """Tests are small, and it is the kernels that they test."""
    # The package offers a function of this module's name.
    backends = importlib.import_module("bit_kernels.backends")
    for op in backends.small_elements:
        monkeypatch.setitem(backends.small_elements, op, 0)
