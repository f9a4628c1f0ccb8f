"""What every test runs under."""

import signal

import numpy as np
import pytest
import torch
from checking import INTERPRETED, leave_small_tensors_to_pytorch

if INTERPRETED:
    import bit_kernels  # noqa: F401  sets what Triton reads when it is imported
    from triton.runtime import interpreter

    def _sum_as_a_gpu_does(self, input):
        """Half on half; NumPy adds row to row along all axes but the last, with larger errors."""
        data, axis = input.handle.data, self.axis
        data = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        total = data[0]
        if self.keep_dims:
            shape = [1] * input.handle.data.ndim
            total = np.expand_dims(total, axis) if axis is not None else total.reshape(shape)
        return self.to_tensor(total, input.dtype)

    interpreter.ReduceOps.sum = _sum_as_a_gpu_does


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every uninitialised tensor with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def float32_in_full():
    """A GPU's convolutions else round float32 factors to 10 bits, which hides what is ours."""
    torch.backends.cudnn.allow_tf32 = False


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
