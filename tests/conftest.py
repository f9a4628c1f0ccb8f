"""What every test runs under."""

import signal

import pytest
import torch
from checking import leave_small_tensors_to_pytorch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every uninitialised tensor with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """A shell's background job ignores SIGINT, and what a process ignores a run leaves ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """torch.compile gives up on a function after 8 forms of it, whichever tests they are from."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def kernels_for_small_tensors(request):
    """Tests of ops and layers are small, and it is the kernels that they test.

    Training runs as it does for users. A patch of its own: a test may undo its `monkeypatch`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "training" not in request.node.path.parts:
            leave_small_tensors_to_pytorch(patch, 0)
        yield
