"""How time is taken on a GPU: by its own events, on one stream, over replays of a CUDA graph.

Calls on all copies of the inputs are captured into one graph, so that a sample has no launches of
the host in it; calls that can't be captured are launched one by one, and their row says so. All
work on a case, the forward of a backward that is captured too, is on the stream that is captured:
autograd runs a backward on the stream of its forward.

Random numbers come from generators of their own. A capture that fails leaves the default one in a
state in which it refuses to work.
"""

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.runner import WARM_SECONDS, first_line

WARM_CALLS = 3  # before a capture: compiles, tunes, fills the allocator's pools
SPIN_CYCLES = 400_000  # about 0.2 ms in which the host gets ahead of the device
STEADY = 0.02  # two samples in a row this near to each other are warm
COPY_BYTES = 1 << 30  # of the source, and of the destination: 20 times an H100's L2
COPIES = 3  # in a sample
MATRIX_SIDE = 8192
UNKNOWN_L2 = 50 << 20  # an H100's, where cases are listed without a GPU
UNKNOWN_MEMORY = 80 << 30


def why_not() -> str | None:
    """Why nothing can be measured on a GPU here, in one sentence; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return None


def lost() -> str | None:
    """Why the device can't be used any more, after an error that no later call survives."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return first_line(error)
    return None


def l2_bytes() -> int:
    return UNKNOWN_L2 if why_not() else torch.cuda.get_device_properties(0).L2_cache_size


def memory_bytes() -> int:
    return UNKNOWN_MEMORY if why_not() else torch.cuda.get_device_properties(0).total_memory


def rotated_bytes() -> int:
    """Of all copies of a case's inputs: 4 times the L2, and their outputs come on top."""
    return 4 * l2_bytes()


@functools.cache
def clock() -> "CudaClock":
    return CudaClock()


class CudaClock:
    """See benchmarks.runner.Clock. Convolutions are tuned, for all rivals alike."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        torch.backends.cudnn.benchmark = True

    @contextlib.contextmanager
    def session(self, threads: int) -> Iterator[None]:
        self.free()  # of the case before
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
            torch.cuda.synchronize()

    def racer(
        self, calls: Sequence[Callable[[], object]], min_sample: float, capture: bool
    ) -> "CudaRacer":
        return CudaRacer(calls, min_sample, capture)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Pool:
    """Memory that graphs share which run one after the other, while one of them is there."""

    def __init__(self):
        self._handle: tuple[int, int] | None = None

    @property
    def handle(self) -> tuple[int, int]:
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        return self._handle

    def leave(self) -> None:
        """Has the next graph begin another one.

        For after the last graph is gone: what it left in tensors that live on keeps the allocator
        from beginning anew in the old pool. And for after a capture that failed, whose part of the
        pinned memory's allocator can't be ended from Python, so that a next one would fail, too.
        """
        self._handle = None


class Graph:
    """What `function` does on the current stream, as a CUDA graph.

    function: has run before, so that nothing is compiled or tuned here; it neither waits for the
        device nor reads from it.
    pool: memory that it shares with other graphs. What one leaves in its results is then still its
        own, the rest is overwritten by the others.

    result: what `function` gave; every replay writes it anew.
    """

    def __init__(self, function: Callable[[], object], pool: Pool | None = None):
        pool = pool or Pool()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, pool=pool.handle, stream=stream):
                self.result = function()
        except BaseException:
            _abandon(pool.handle)
            pool.leave()
            raise

    def replay(self) -> None:
        self._graph.replay()


def _abandon(pool: tuple[int, int]) -> None:
    """After a capture that the device ended: the allocator goes on as if there had been none."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):
        return  # it had ended properly
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_releasePool(device, pool)


class CudaRacer:
    """One provider's calls, captured if possible, with as many to a sample as its length needs.

    why_eager: the reason why there is no graph; None where there is one.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], min_sample: float, capture: bool):
        self._calls = calls
        self._kept = [None] * len(calls)
        self._graph: Graph | None = None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._laps = 1  # of the graph, or calls where there is none
        self.why_eager: str | None = "nobody asked for one"
        for index in range(min(WARM_CALLS, len(calls))):
            self._kept[index] = calls[index]()
        torch.cuda.synchronize()
        if capture:
            self._capture()
        self._warm(min_sample)

    def _capture(self) -> None:
        self.why_eager = None
        try:
            self._graph = Graph(lambda: [call() for call in self._calls])
            # Replays write to the same memory; no tensor is needed to keep it.
            self._graph.result = None
        except Exception as error:
            self.why_eager = f"{type(error).__name__}: {first_line(error)}"
        torch.cuda.synchronize()
        if self._graph is not None:
            self._kept = []

    def _warm(self, min_sample: float) -> None:
        deadline = time.perf_counter() + WARM_SECONDS
        before, seconds = math.inf, self.sample(0)
        self._laps = max(1, math.ceil(min_sample / (seconds * self.inner)))
        while abs(seconds - before) > STEADY * seconds and time.perf_counter() < deadline:
            before, seconds = seconds, self.sample(0)
        self._laps = max(1, math.ceil(min_sample * self._laps / (seconds * self.inner)))

    @property
    def inner(self) -> int:
        """Calls in one sample."""
        return self._laps * (len(self._calls) if self._graph else 1)

    def sample(self, start: int) -> float:
        """Mean seconds of a call, by the device; a graph goes through whole laps of the copies."""
        begin, end = self._events
        if self._graph is not None:
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            for _ in range(self._laps):
                self._graph.replay()
        else:
            calls, kept, copies = self._calls, self._kept, len(self._calls)
            begin.record()
            for index in range(start, start + self._laps):
                kept[index % copies] = calls[index % copies]()
        end.record()
        return _seconds(begin, end) / self.inner


def _seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class CopyLimit:
    """Memory bandwidth as torch's own copy reaches it, on float32 far past the L2."""

    def __init__(self, device: str = "cuda"):
        nbytes = min(COPY_BYTES, memory_bytes() // 16)
        self._source = _random((nbytes // 4,), torch.float32, device)
        self._target = torch.empty_like(self._source)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self) -> float:
        """GB/s, bytes read plus bytes written."""
        begin, end = self._events
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        for _ in range(COPIES):
            self._target.copy_(self._source)
        end.record()
        return COPIES * 2 * self._source.nbytes / _seconds(begin, end) / 1e9


class MatrixLimit:
    """Rate of a matrix product as torch reaches it in `dtype`: of float32 on TF32's tensor cores,
    as cuDNN's convolutions are by torch's default.
    """

    def __init__(self, dtype: str, device: str = "cuda"):
        side = MATRIX_SIDE
        self._tf32 = dtype == "float32"
        self._left, self._right = (
            _random((side, side), getattr(torch, dtype), device, seed) for seed in range(2)
        )
        self._product = torch.empty_like(self._left)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample(self) -> float:
        """GFLOP/s, a multiplication and an addition as two."""
        begin, end = self._events
        matmul = torch.backends.cuda.matmul
        with _set(matmul, "allow_tf32", matmul.allow_tf32 or self._tf32):
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            torch.mm(self._left, self._right, out=self._product)
            end.record()
        return 2 * len(self._left) ** 3 / _seconds(begin, end) / 1e9


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def warm_up(matrix: MatrixLimit, seconds: float = 1.0) -> None:
    """Works until the clocks are those of a long run."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        matrix.sample()


@contextlib.contextmanager
def _set(place: object, name: str, value: object) -> Iterator[None]:
    """The attribute of `place` is `value` until the block ends."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def untuned() -> contextlib.AbstractContextManager[None]:
    """Convolutions as cuDNN guesses them: for float64, each of which is done once or twice."""
    return _set(torch.backends.cudnn, "benchmark", False)


def without_tf32() -> contextlib.AbstractContextManager[None]:
    """Convolutions of float32 in full precision, cuDNN's and ours, which is told by the same flag."""
    return _set(torch.backends.cudnn, "allow_tf32", False)
