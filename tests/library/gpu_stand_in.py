"""What of torch.cuda the benchmarks use, on a machine without a GPU: streams, events, graphs, memory.

Nothing here computes. A "call" of a test takes so many milliseconds of a device whose time is a
number; what is called while a capture is on takes them at each replay instead.
"""

import contextlib
from types import SimpleNamespace

import torch

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    uuid="1234",
)


class Gpu:
    """log: what was asked of the device, in order."""

    def __init__(self):
        self.log: list[str] = []
        self.now = 0.0  # milliseconds
        self.capturing: Graph | None = None
        self.stream = "default"
        self.failing: str | None = None  # what every synchronization says
        self.pools = 0

    def launch(self, milliseconds: float) -> None:
        if self.capturing is not None:
            self.capturing.milliseconds += milliseconds
        else:
            self.now += milliseconds
            self.log.append("launch")

    def synchronize(self, device=None) -> None:
        if self.failing:
            raise RuntimeError(self.failing)
        if self.capturing is not None:
            self.capturing.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append("synchronize")

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def install(self, patch) -> None:
        gpu = self
        for name, value in {
            "Stream": lambda: "a stream",
            "stream": self.on,
            "current_stream": lambda: self.stream,
            "current_device": lambda: 0,
            "Event": lambda enable_timing: Event(gpu),
            "CUDAGraph": lambda: Graph(gpu),
            "graph": lambda graph, pool, stream: Capture(gpu, graph, pool, stream),
            "graph_pool_handle": self.pool,
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.log.append("empty_cache"),
            "_sleep": lambda cycles: None,
            "is_available": lambda: True,
            "get_device_properties": lambda index=0: PROPERTIES,
            "get_device_name": lambda index=0: PROPERTIES.name,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.backends.cudnn, "benchmark", False)
        patch.setattr(torch.backends.cudnn, "version", lambda: 91300)
        patch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda device, pool: self.log.append(f"end of {pool}"),
            raising=False,
        )
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)


class Event:
    def __init__(self, gpu: Gpu):
        self._gpu, self._at = gpu, None

    def record(self) -> None:
        assert self._gpu.capturing is None
        self._at = self._gpu.now

    def synchronize(self) -> None:
        self._gpu.synchronize()

    def elapsed_time(self, end: "Event") -> float:
        return end._at - self._at


class Graph:
    def __init__(self, gpu: Gpu):
        self._gpu, self.milliseconds, self.invalid, self.done = gpu, 0.0, False, False

    def replay(self) -> None:
        assert self.done and self._gpu.capturing is None
        self._gpu.log.append("replay")
        self._gpu.now += self.milliseconds


class Capture:
    def __init__(self, gpu: Gpu, graph: Graph, pool, stream):
        self._gpu, self._graph = gpu, graph
        gpu.log.append(f"capture on {stream} into {pool}")
        assert stream == gpu.stream

    def __enter__(self):
        self._gpu.synchronize()
        self._gpu.capturing = self._graph

    def __exit__(self, *error):
        self._gpu.capturing = None
        if self._graph.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._graph.done = True


class RunAgain:
    """In place of benchmarks.cuda.Graph for functions that really compute: a capture runs nothing,
    a replay does."""

    def __init__(self, function, pool=None):
        self._function, self.result = function, None

    def replay(self) -> None:
        self.result = self._function()
