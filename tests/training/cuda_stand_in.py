"""Stand-ins for what training asks of CUDA, for a machine without a GPU.

`LateTransfers` is a device that puts every copy off until somebody waits for it, so that whoever
writes too early to what is copied from, or reads too early what is copied to, gets wrong numbers.
`Recorder` is a CUDA graph of CPU tensors: it records the operations of a capture and replays them
on the very same tensors, and nothing else; Python is not run again.
"""

import contextlib
import threading
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bit.prefetch import Sent


class LateEvent:
    """Happens only when it is waited for."""

    def __init__(self, actions):
        self._actions, self._lock = actions, threading.Lock()

    def synchronize(self):
        with self._lock:
            while self._actions:
                self._actions.pop(0)()


class LateTransfers:
    """bit.prefetch.Transfers whose copies come as late as they may."""

    def __init__(self):
        self.allocated = []

    def pinned(self, elements, dtype):
        buffer = torch.full((elements,), -1, dtype=dtype)
        self.allocated.append(buffer)
        return buffer

    def send(self, tensors):
        copies = [torch.full_like(tensor, -2) for tensor in tensors]
        pairs = zip(copies, tensors, strict=True)
        actions = [lambda to=to, source=source: to.copy_(source) for to, source in pairs]
        return Sent(copies, LateEvent(actions))

    def receive(self, sent):
        time.sleep(0.005)  # whoever wants to write to pinned memory meanwhile has the time to
        sent.arrived.synchronize()
        return tuple(sent.tensors)


class Recorder:
    """torch.cuda.CUDAGraph, on the CPU."""

    def __init__(self):
        self._calls = []

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # the kernels alone, as a graph has them
            for function, args, kwargs, outputs in self._calls:
                found = function(*args, **kwargs)
                for kept, new in zip(tree_leaves(outputs), tree_leaves(found), strict=True):
                    if isinstance(kept, torch.Tensor) and kept is not new:
                        kept.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("a graph can't tell the host a number")
        outputs = function(*args, **kwargs)
        # The call's own tensors, not what becomes of the lists that it was given.
        self._recorder._calls.append((function, *tree_map(lambda x: x, (args, kwargs)), outputs))
        return outputs


@contextlib.contextmanager
def recording(recorder, pool=None, stream=None):
    """torch.cuda.graph."""
    with _Recording(recorder):
        yield


class Stream:
    """torch.cuda.Stream: on the CPU everything is in order."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def install(patch):
    """Put the stand-ins for graphs into torch.cuda. patch: a pytest.MonkeyPatch."""
    patch.setattr(torch.cuda, "CUDAGraph", Recorder)
    patch.setattr(torch.cuda, "graph", recording)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
