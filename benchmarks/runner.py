"""How time is taken: gate, rotate, interleave, quantiles, and the limit of the same run.

1. Gate: a rival whose outputs are further from the float64 reference than the project's bound
   gets no figure (`disagreement`).
2. Rotate: every call takes the next of many copies of the inputs, and its output is kept until
   that copy's next turn, so neither is found in a cache.
3. Interleave: rivals and a plain copy of memory (for whole networks a matrix product, too) take
   turns, in a new random order each round, so a disturbance falls on all of them.
4. One sample is a mean over calls that together last two milliseconds; a figure is the median of
   the rounds, with the 20th and 80th percentile as its spread.

This is the same on every device; what differs is the clock: here the CPU's, in cuda.py a GPU's.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import machine

COPY = "torch_copy"
COPY_BYTES = 64 << 20  # of the source, and of the destination
MATRIX = "torch_matmul"
MATRIX_SIDE = 1024  # three of 4 MiB: past the caches of a core, 10 to 30 ms
WARM_SECONDS = 1.0  # at most, for each rival of a case


class Absent(Exception):
    """Raised by a workload for a rival that this machine hasn't: left out, and nothing is wrong."""


class Workload(Protocol):
    """The inputs of one case in memory, and what its rivals do with them.

    Any method may raise for one provider: that rival is shown with its error and gets no figure.
    It may have drop(provider), which frees what one holds, for cases whose rivals run alone.
    """

    def reference(self) -> dict[str, Tensor]:
        """The right outputs in float64, by name; empty where there is nothing to compare."""

    def outputs(self, provider: str) -> dict[str, Tensor]:
        """What `provider` computes from the same inputs, under the same names.

        Where rivals differ in what they compute (`Case.plain`), each gives a part of the names.
        """

    def calls(self, provider: str) -> Sequence[Callable[[], object]]:
        """What is timed: one call for each copy of the inputs, equally many for each provider."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    suite, name: who it is; `name` is unique in the suite, its parts joined by "/".
    dtype, threads: of the inputs; of torch.
    providers: the rivals as shown; the first that is no limit is `subject`, which the summary is
        about.
    baselines: the rivals that count as "before". The fastest is what speedups refer to.
    prepare: allocates the workload when the case's turn comes.
    plain: rival -> the plainest one that computes the same, whose error in `dtype` sets the bound
        of the gate; the first baseline for rivals that aren't named.
    room: for the gate beside that error, as a share of an output's largest magnitude: where a sign
        at a ReLU or a tie in a pool is a matter of rounding, errors are too.
    limits: the rivals that leave out all that isn't necessary, in several ways; `times_limit` is
        over the fastest.
    images: that one call works on, for images a second.
    passes, necessary_bytes: the floor, in reads or writes of one tensor and in bytes; None where
        a floor says nothing (inputs too small to be rotated past the caches).
    device: "cpu" or "cuda", whose clock times it.
    capture: on a GPU, time replays of a CUDA graph of the calls, where they can be captured.
    alone: rivals fill the memory: each is made, timed with the limits, and gone before the next.
    """

    suite: str
    name: str
    dtype: str
    threads: int
    providers: tuple[str, ...]
    baselines: tuple[str, ...]
    prepare: Callable[[], Workload]
    plain: Mapping[str, str] = field(default_factory=dict)
    room: float = 0.0
    limits: tuple[str, ...] = ()
    images: int | None = None
    passes: int | None = None
    necessary_bytes: int | None = None
    device: str = "cpu"
    capture: bool = False
    alone: bool = False

    @property
    def subject(self) -> str:
        return next((name for name in self.providers if name not in self.limits), self.providers[0])


@dataclass(frozen=True)
class Figure:
    """One number: `p50` with its 20th and 80th percentile; all three alike where it can't vary."""

    provider: str
    metric: str
    p20: float
    p50: float
    p80: float
    unit: str

    @classmethod
    def of(cls, provider: str, metric: str, samples: Sequence[float], unit: str) -> "Figure":
        p20, p50, p80 = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
        return cls(provider, metric, p20, p50, p80, unit)


@dataclass(frozen=True)
class Count:
    """A case that is counted or scored rather than timed: `take` gives its figures as they come.

    What `take` gives may also be a Refusal, for a rival that has none.
    """

    suite: str
    name: str
    dtype: str
    threads: int
    take: Callable[[], Iterable["Figure | Refusal"]]
    device: str = "cpu"


@dataclass(frozen=True)
class Refusal:
    """Why `provider` has no figure; `red` if something is wrong rather than not there."""

    provider: str
    reason: str
    red: bool = True


@dataclass
class Result:
    """Samples of one case, one a round: seconds a call by provider, GB/s of the copy, GFLOP/s.

    red: the reason why a provider has no figure. absent: likewise, where this machine hasn't it.
    eager: why a provider wasn't timed as a CUDA graph, None where it was; of `Case.capture` only.
    """

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    copy_gbps: list[float] = field(default_factory=list)
    matrix_gflops: list[float] = field(default_factory=list)
    red: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    eager: dict[str, str | None] = field(default_factory=dict)

    def cut(self, least: int = 3) -> "Result":
        """Without the rivals that have fewer samples, for a case that was interrupted."""
        kept = {name: values for name, values in self.seconds.items() if len(values) >= least}
        return replace(self, seconds=kept)

    def median(self, provider: str) -> float:
        return quantile(self.seconds[provider], 0.5)

    def baseline(self) -> str | None:
        """The fastest baseline that has a figure."""
        return self._fastest(self.case.baselines)

    def limit(self) -> str | None:
        """The fastest of the limits that have a figure."""
        return self._fastest(self.case.limits)

    def speedup(self, provider: str) -> tuple[float, float, float] | None:
        """Times as fast as the baseline: ratio of medians, p20 and p80 of the rounds' ratios."""
        return self._ratio(self.baseline(), provider)

    def times_limit(self, provider: str) -> tuple[float, float, float] | None:
        """Time over the limit's: ratio of medians, p20 and p80 of the rounds' ratios."""
        return self._ratio(provider, self.limit())

    def _fastest(self, providers: Sequence[str]) -> str | None:
        timed = [name for name in providers if name in self.seconds]
        return min(timed, key=self.median, default=None)

    def _ratio(self, above: str | None, below: str | None) -> tuple[float, float, float] | None:
        if above is None or below is None:
            return None
        rounds = [a / b for a, b in zip(self.seconds[above], self.seconds[below])]
        ratio = self.median(above) / self.median(below)
        return quantile(rounds, 0.2), ratio, quantile(rounds, 0.8)

    def share_of_copy(self, seconds: float) -> float | None:
        """Necessary bytes a second over the copy's median, for a call that took `seconds`."""
        if self.case.necessary_bytes is None or not self.copy_gbps:
            return None
        return self.case.necessary_bytes / seconds / 1e9 / quantile(self.copy_gbps, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of a non-empty sequence, linear between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def orders(names: Sequence[str], rounds: int, seed: object) -> Iterator[list[str]]:
    """For each round a random order of `names`; the same `seed` gives the same orders."""
    generator = random.Random(str(seed))
    for _ in range(rounds):
        yield generator.sample(list(names), len(names))


def disagreement(
    actual: dict[str, Tensor],
    reference: dict[str, Tensor],
    unfused: dict[str, Tensor],
    room: float = 0.0,
) -> str | None:
    """Why `actual` is wrong, in one sentence, or None.

    The bound, for each output: its largest error against the float64 `reference` is at most
    twice that of `unfused`, plus two roundings of its dtype at the reference's largest magnitude,
    plus `room` times that magnitude. An `unfused` output that isn't finite gives no room.
    """
    missing = reference.keys() - actual.keys()
    if missing:
        return f"gives no {', '.join(sorted(missing))}"
    for name, right in reference.items():
        got = actual[name]
        if got.shape != right.shape:
            return f"{name} has shape {tuple(got.shape)}; it must be {tuple(right.shape)}"
        if right.numel() == 0:
            continue
        error = (got.double() - right).abs().max().item()
        own = (unfused[name].double() - right).abs().max().item()
        largest = right.abs().max().item()
        rounding = torch.finfo(got.dtype).eps * largest
        bound = 2 * (own if math.isfinite(own) else 0.0) + 2 * rounding + room * largest
        if not error <= bound:
            return f"{name} is off by {error:.3g}; at most {bound:.3g} is right"
    return None


class Gate:
    """Compares what rivals of a case compute with the float64 reference."""

    def __init__(self, case: Case, workload: Workload):
        self._case, self._workload = case, workload
        self._reference = workload.reference()
        self._unfused: dict[str, dict[str, Tensor]] = {}

    def refusal(self, provider: str) -> Refusal | None:
        """Why the provider may not be timed; None if it may."""
        if not self._reference:
            return None
        plain = self._case.plain.get(provider, self._case.baselines[0])
        try:
            if plain not in self._unfused:
                self._unfused[plain] = self._workload.outputs(plain)
            unfused = self._unfused[plain]
            outputs = unfused if provider == plain else self._workload.outputs(provider)
            names = unfused if self._case.plain else self._reference
            right = {name: self._reference[name] for name in names}
            reason = disagreement(outputs, right, unfused, self._case.room)
        except Exception as error:
            return refusal_of(provider, error)
        return Refusal(provider, reason) if reason else None


def gate(case: Case, workload: Workload) -> dict[str, str]:
    """The providers that may not be timed, each with the reason."""
    check = Gate(case, workload)
    refusals = map(check.refusal, case.providers)
    return {refusal.provider: refusal.reason for refusal in refusals if refusal is not None}


def refusal_of(provider: str, error: Exception) -> Refusal:
    if isinstance(error, Absent):
        return Refusal(provider, first_line(error), red=False)
    return Refusal(provider, f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


class Clock(Protocol):
    """How one kind of device is timed."""

    def session(self, threads: int) -> AbstractContextManager:
        """Around all work on a case."""

    def racer(
        self, calls: Sequence[Callable[[], object]], min_sample: float, capture: bool
    ) -> "Racer":
        """What times a provider's calls, warmed up."""

    def free(self) -> None:
        """Gives back memory that a failed rival, or one that is through, left behind."""


class CpuClock:
    def session(self, threads: int) -> AbstractContextManager:
        return _threads(threads)

    def racer(self, calls, min_sample, capture) -> "Racer":
        return Racer(calls, min_sample)

    def free(self) -> None:
        pass


def clock_of(device: str) -> Clock:
    if device == "cpu":
        return CpuClock()
    from benchmarks import cuda

    return cuda.clock()


class Racer:
    """One provider's calls, warmed up, with as many to a sample as its length needs."""

    why_eager = None  # a CPU has nothing else

    def __init__(self, calls: Sequence[Callable[[], object]], min_sample: float):
        self._calls = calls
        self._kept = [None] * len(calls)
        self._inner = min(len(calls), 64)
        # At least one lap over the copies, then until a sample brings no new pages of memory.
        deadline = time.perf_counter_ns() + WARM_SECONDS * 1e9
        warm, faults = 0, machine.page_faults()
        while True:
            seconds = self.sample(warm)
            warm += self._inner
            fresh = machine.page_faults() - faults
            faults += fresh
            if warm >= len(calls) and fresh <= self._inner or time.perf_counter_ns() > deadline:
                break
        self._inner = max(1, math.ceil(min_sample / seconds))

    @property
    def inner(self) -> int:
        """Calls in one sample."""
        return self._inner

    def sample(self, start: int) -> float:
        """Mean seconds of a call, on the copies of the inputs from number `start` on."""
        calls, kept, copies = self._calls, self._kept, len(self._calls)
        index = start % copies
        begin = time.perf_counter_ns()
        for _ in range(self._inner):
            kept[index] = calls[index]()
            index += 1
            if index == copies:
                index = 0
        return (time.perf_counter_ns() - begin) / self._inner / 1e9


class CopyLimit:
    """Memory bandwidth as torch's own copy reaches it, on float32 far past every cache."""

    def __init__(self, size: int = COPY_BYTES):
        self._source = torch.ones(size // 4)
        self._target = torch.zeros(size // 4)

    def sample(self) -> float:
        """GB/s, bytes read plus bytes written, at the present number of threads."""
        begin = time.perf_counter_ns()
        self._target.copy_(self._source)
        elapsed = time.perf_counter_ns() - begin
        return 2 * self._source.nbytes / elapsed


class MatrixLimit:
    """Rate of a float32 matrix product as torch reaches it."""

    def __init__(self, side: int = MATRIX_SIDE):
        self._left, self._right = torch.rand(side, side), torch.rand(side, side)
        self._product = torch.empty(side, side)

    def sample(self) -> float:
        """GFLOP/s, a multiplication and an addition as two, at the present number of threads."""
        begin = time.perf_counter_ns()
        torch.mm(self._left, self._right, out=self._product)
        return 2 * len(self._left) ** 3 / (time.perf_counter_ns() - begin)


def measure(
    case: Case,
    copy: CopyLimit,
    *,
    matrix: MatrixLimit | None = None,
    rounds: int = 15,
    seed: int = 0,
    min_sample: float = 2e-3,
    clock: Clock | None = None,
) -> Result:
    """Gates and times one case; `min_sample` is the shortest sample in seconds.

    clock: of the case's device, if None. A KeyboardInterrupt has the rounds until then as `result`.
    """
    result = Result(case)
    clock = clock or clock_of(case.device)
    probes = {COPY: (copy, result.copy_gbps)}
    if matrix is not None:
        probes[MATRIX] = (matrix, result.matrix_gflops)
    torch._dynamo.reset()  # torch.compile gives up on a function after 8 forms of it
    try:
        with clock.session(case.threads), _no_collection():
            workload = case.prepare()
            check = Gate(case, workload)
            alone = [[name] for name in case.providers]
            for providers in alone if case.alone else [case.providers]:
                allowed = _pass_gate(result, check, providers, clock)
                if not case.alone:
                    check = None  # its tensors are memory that rivals can use
                racers = _racers(result, workload, allowed, clock, min_sample)
                _take_turns(result, racers, probes, rounds, seed, clock)
                if case.alone:
                    racers.clear()
                    getattr(workload, "drop", lambda provider: None)(*providers)
                    clock.free()
    except KeyboardInterrupt as stop:
        stop.result = result
        raise
    return result


def _pass_gate(result: Result, check: Gate, providers: Sequence[str], clock: Clock) -> list[str]:
    allowed = []
    for provider in providers:
        refusal = check.refusal(provider)
        if refusal is None:
            allowed.append(provider)
        else:
            _refuse(result, refusal, clock)
    return allowed


def _refuse(result: Result, refusal: Refusal, clock: Clock) -> None:
    (result.red if refusal.red else result.absent)[refusal.provider] = refusal.reason
    if refusal.red:
        clock.free()


def _racers(
    result: Result, workload: Workload, providers: Sequence[str], clock: Clock, min_sample: float
) -> dict[str, Racer]:
    racers = {}
    for provider in providers:
        refusal = None
        try:
            calls = workload.calls(provider)
            racers[provider] = clock.racer(calls, min_sample, result.case.capture)
        except Exception as error:
            refusal = refusal_of(provider, error)
        calls = None
        if refusal is not None:  # only here has the error let go of what it held
            _refuse(result, refusal, clock)
        elif result.case.capture:
            result.eager[provider] = racers[provider].why_eager
    return racers


def _take_turns(
    result: Result, racers: dict[str, Racer], probes: dict, rounds: int, seed: int, clock: Clock
) -> None:
    if not racers:
        return
    case = result.case
    for probe, _ in probes.values():
        probe.sample()
    seconds = {provider: [] for provider in racers}
    result.seconds |= seconds  # from now on: what is interrupted keeps its rounds
    position = 0
    for order in orders([*racers, *probes], rounds, f"{seed}/{case.name}/{case.threads}"):
        for name in order:
            if name in probes:
                probe, samples = probes[name]
                samples.append(probe.sample())
            elif name in racers:
                refusal = None
                try:
                    seconds[name].append(racers[name].sample(position))
                    position += racers[name].inner
                except Exception as error:
                    refusal = refusal_of(name, error)
                if refusal is not None:
                    del racers[name], result.seconds[name]
                    _refuse(result, refusal, clock)


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection():
    """Python's garbage collector off inside, and run once after."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()
