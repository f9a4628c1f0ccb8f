"""Training's way to a GPU, as far as it goes without one; tests/training/test_cuda.py has the rest."""

import itertools
import math
import signal
import threading
import time
from dataclasses import replace

import cuda_stand_in
import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import assert_same_bits, at_step, tiny, weights

from bit import (
    cli,
    config,
    device,
    evaluate,
    graphs,
    metrics,
    models,
    prefetch,
    runlog,
    state,
    train,
)
from bit.data import Augment, TrainBatches
from bit.task import make_task
from bit_kernels import _kept
from bit_kernels import data as kernels_data
from bit_kernels.data import mixup_cross_entropy
from bit_kernels.optim import SGD


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.noise()


# Which device it may be


@pytest.fixture
def two_old_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)


def test_a_gpu_that_is_not_there_is_refused_by_name(two_old_gpus, monkeypatch):
    device.check_device("cuda")
    device.check_device("cuda:1")
    with pytest.raises(
        ValueError, match="'cuda:2'; it must be cpu or .*: cuda:0 .*, cuda:1 .GPU 1"
    ):
        device.check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda'; it must be cpu, as torch sees no CUDA device"):
        device.check_device("cuda")


def test_bfloat16_is_refused_where_a_gpu_has_none(two_old_gpus, monkeypatch):
    with pytest.raises(ValueError, match="on GPU cuda:1, of compute capability 7.5, it must be fl"):
        device.check_device("cuda:1", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    device.check_device("cuda:1", "bfloat16")
    device.check_device("cpu", "bfloat16")


def test_runs_and_evaluations_ask_first(two_old_gpus, dataset, tmp_path):
    with pytest.raises(ValueError, match="device is 'cuda:9'"):
        train.run(tiny(tmp_path / "run", device="cuda:9"), dataset)
    with pytest.raises(ValueError, match="dtype is 'bfloat16'"):
        train.run(tiny(tmp_path / "run", device="cuda:0", dtype="bfloat16"), dataset)
    with pytest.raises(ValueError, match="dtype is 'bfloat16'"):
        evaluate.evaluate(evaluate.Evaluate("none", device="cuda", dtype="bfloat16"))
    assert not (tmp_path / "run").exists()


def test_command_line_knows_the_flags():
    line = ["finetune", "--device", "cuda:1", "--compile", "--cuda-graph", "--deterministic"]
    run = cli.parse(line).run
    assert (run.device, run.compile, run.cuda_graph, run.deterministic) == ("cuda:1", *[True] * 3)
    config.check(replace(config.FINETUNE, run=run))


# Batches ahead of their use


def host_jobs(count, log=None):
    """Batch i is full of i, and its labels are i; sizes differ."""

    def job(i, empty):
        if log is not None:
            log.append(i)
        images = empty((i % 3 + 1, 3, 4, 5), torch.float32)
        return images.fill_(i), torch.full((i % 3 + 1,), i)

    return (lambda empty, i=i: job(i, empty) for i in range(count))


def test_prefetched_batches_are_whole_on_a_device_that_is_late():
    transfers = cuda_stand_in.LateTransfers()
    batches = list(prefetch.Prefetcher(transfers).iterate(host_jobs(20)))
    assert len(batches) == 20
    for i, (images, labels) in enumerate(batches):
        assert images.shape == (i % 3 + 1, 3, 4, 5) and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.eq(i).all() and labels.eq(i).all(), i
    # Images and labels of two batches, and each anew when a larger batch came than before.
    assert len(transfers.allocated) <= 2 * prefetch.SLOTS * 3


def test_pinned_memory_is_used_again_only_after_its_copy(monkeypatch):
    """The test above can tell: without the wait, numbers of later batches arrive."""
    monkeypatch.setattr(prefetch._Slot, "reuse", lambda slot: setattr(slot, "_taken", 0))
    batches = prefetch.Prefetcher(cuda_stand_in.LateTransfers()).iterate(host_jobs(20))
    assert any(labels.ne(i).any() for i, (_, labels) in enumerate(batches))


def test_prefetcher_stays_few_batches_ahead():
    made = []
    stream = prefetch.Prefetcher(cuda_stand_in.LateTransfers()).iterate(host_jobs(50, made))
    for taken in range(1, 10):
        next(stream)
        time.sleep(0.02)
        assert len(made) <= taken + prefetch.AHEAD
    until = time.monotonic() + 10
    while len(made) < 9 + prefetch.AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    assert len(made) == 9 + prefetch.AHEAD
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("bit-data")]


def test_error_of_a_job_comes_in_its_turn():
    def broken(empty):
        raise OSError("no such image")

    jobs = itertools.chain(host_jobs(2), [broken])
    stream = prefetch.Prefetcher(cuda_stand_in.LateTransfers()).iterate(jobs)
    assert [labels[0].item() for _, labels in itertools.islice(stream, 2)] == [0, 1]
    with pytest.raises(OSError, match="no such image"):
        next(stream)


@pytest.mark.parametrize("size", [8, 3, 1])
def test_loaded_batches_are_those_of_the_cpu(size, dataset, monkeypatch):
    transfers = cuda_stand_in.LateTransfers()
    monkeypatch.setattr(prefetch, "Transfers", lambda device: transfers)
    stream = TrainBatches(dataset.train, Augment(10, 8), batch_size=8, seed=0, mixup_alpha=0.4)
    seen = 0
    for there in prefetch.loaded(stream.iterate(3, 8), size, "cuda"):
        batch = stream.batch(3 + seen)
        assert there.lam == batch.lam
        for found, expected in zip(there.micro(size), batch.micro(size), strict=True):
            assert all(map(torch.equal, found, expected))
        seen += 1
    assert seen == 5
    # On the CPU nothing is between the stream and the update.
    (plain,) = prefetch.loaded(stream.iterate(3, 4), size, "cpu")
    assert type(plain).__name__ == "Batch"


def test_evaluation_is_the_same_through_a_prefetcher(dataset, monkeypatch):
    model = models.create("R14x0.125", 3, stem="small")
    torch.nn.init.normal_(model.head.weight)
    options = dict(size=8, batch=5)
    plain = metrics.evaluate(model, dataset.test, **options)
    through = prefetch.Prefetcher(cuda_stand_in.LateTransfers())
    monkeypatch.setattr(metrics, "on_device", lambda jobs, _: through.iterate(jobs))
    assert metrics.evaluate(model, dataset.test, **options) == plain


class FakeCuda:
    """torch.cuda's streams and events, which note what is asked of them in one list."""

    def __init__(self, patch):
        self.calls = []
        self.current = self.stream("network")
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        patch.setattr(torch.cuda, "stream", self.inside)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.Tensor, "to", lambda *args, **options: self.copied(*args, **options))
        patch.setattr(torch.Tensor, "record_stream", lambda *args: self.recorded(*args))

    def stream(self, name):
        fake = type("Stream", (), {})()
        fake.name = name
        fake.record_event = lambda: self.calls.append(f"event on {name}") or f"event of {name}"
        fake.wait_event = lambda event: self.calls.append(f"{name} waits for {event}")
        return fake

    def inside(self, stream):
        outer = self

        class Inside:
            def __enter__(self):
                self.before, outer.current = outer.current, stream

            def __exit__(self, *_):
                outer.current = self.before

        return Inside()

    def copied(self, tensor, place, non_blocking=False):
        assert non_blocking and place == torch.device("cuda", 0)
        self.calls.append(f"copy on {self.current.name}")
        return tensor.clone()

    def recorded(self, tensor, stream):
        self.calls.append(f"memory used on {stream.name}")


def test_transfers_order_the_streams(monkeypatch):
    with monkeypatch.context() as patch:
        fake = FakeCuda(patch)
        transfers = prefetch.Transfers("cuda")
        sent = transfers.send([torch.zeros(2), torch.zeros(3)])
        assert fake.calls == ["copy on side", "copy on side", "event on side"]
        fake.calls.clear()
        first, second = transfers.receive(sent)
    assert fake.calls == ["network waits for event of side"] + ["memory used on network"] * 2
    assert first.shape == (2,) and second.shape == (3,)


# CUDA graphs


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    cuda_stand_in.install(monkeypatch)
    # It looks at the labels where they are the CPU's, which a graph can't.
    monkeypatch.setattr(kernels_data, "_check_loss", lambda *args: None)


class Passes:
    """A network, its optimizer, and both ways to run it."""

    def __init__(self, shape=(3, 3, 16, 16), **options):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = models.create("R14x0.125", 3, stem="small", zero_head=False)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9, model=self.model)
        self.eager, self.told = graphs.Eager(self.loss_of), []
        self.graphed = graphs.Graphed(
            self.loss_of, self.optimizer, shape, device="cpu", say=self.told.append, **options
        )

    def loss_of(self, images, targets):
        return mixup_cross_entropy(self.model(images), targets, reduction="sum") / 8

    def gradients(self, passes, micro_batches):
        """The losses of an update's micro-batches, and the gradients after them."""
        self.optimizer.zero_grad()
        losses = []
        for images, targets in micro_batches:
            loss = passes.forward(images, targets)
            losses.append(loss.item())
            passes.backward(loss)
        return losses, [p.grad.clone() for p in self.model.parameters()]


def micro_batches(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand((), generator=generator).item()
    for size in sizes:
        images = torch.randn(size, 3, 16, 16, generator=generator)
        labels = torch.randint(3, (2, size), generator=generator)
        yield images.contiguous(memory_format=torch.channels_last), (*labels, lam)


@pytest.mark.parametrize("sizes", [(3,), (3, 3), (3, 3, 3, 2)])
def test_graphs_compute_what_eager_does(sizes, graphs_on_the_cpu):
    both = Passes(adds=len(sizes) > 1)
    assert all(p.grad is None for p in both.model.parameters())
    for step in range(3):
        losses, grads = both.gradients(both.graphed, micro_batches(step, sizes))
        expected, true = both.gradients(both.eager, micro_batches(step, sizes))
        assert losses == pytest.approx(expected, rel=1e-6)
        for found, grad in zip(grads, true, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-6)
        both.gradients(both.graphed, micro_batches(step, sizes))
        both.optimizer.step()  # with the graph's own gradients, and on to other weights
    odd = [] if sizes[-1] == 3 else ["micro-batches of 2 run without a CUDA graph; it was "]
    assert [line[:51] for line in both.told] == [line[:51] for line in odd]  # once


def test_weights_changed_by_others_reach_a_replay(graphs_on_the_cpu):
    both = Passes(adds=False)
    both.gradients(both.graphed, micro_batches(0, [3]))
    with torch.no_grad():
        for parameter in both.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    losses, _ = both.gradients(both.graphed, micro_batches(1, [3]))
    expected, _ = both.gradients(both.eager, micro_batches(1, [3]))
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_weight_is_not_standardized_inside_a_graph(monkeypatch):
    class OnGpu(torch.nn.Parameter):
        is_cuda = True

    parameter = OnGpu(torch.randn(4, 3, 1, 1))
    kept = _kept.KeptWeight(parameter, 1e-10, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = kept.up_to_date().clone()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(kept.up_to_date(), before)  # nothing changed: nothing to do
    with torch.no_grad():
        parameter.mul_(2)
    with pytest.raises(RuntimeError, match=r"\(4, 3, 1, 1\) has changed .* restandardize"):
        kept.up_to_date()


def test_a_run_with_graphs_is_the_run_without(graphs_on_the_cpu, dataset, tmp_path, monkeypatch):
    """All of a run, with the last micro-batch of each update beside the graph."""
    losses = {}
    for name in ("eager", "graph"):
        settings = tiny(tmp_path / name, crop=16, steps=6)
        if name == "graph":  # which the command line refuses on the CPU
            monkeypatch.setattr(train, "check", lambda config: None)
            settings = replace(settings, run=replace(settings.run, cuda_graph=True))
        train.run(settings, dataset)
        rows = runlog.read(tmp_path / name)
        losses[name] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-4)
    assert len(set(losses["graph"])) > 3


# torch.compile


def test_compiled_run_is_the_eager_one_and_resumes(dataset, tmp_path, monkeypatch):
    changes = dict(steps=4, crop=16, micro_batch=8, eval_every=100, save_every=100, compile=True)
    train.run(tiny(tmp_path / "eager", **changes | {"compile": False}), dataset)
    train.run(tiny(tmp_path / "straight", **changes), dataset)
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(tiny(tmp_path / "run", **changes), dataset)
    monkeypatch.undo()
    train.run(tiny(tmp_path / "run", **changes, resume=True), dataset)
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    eager, compiled = (
        [row["loss"] for row in runlog.read(tmp_path / name) if row["kind"] == "train"]
        for name in ("eager", "straight")
    )
    assert compiled == pytest.approx(eager, rel=1e-3) and compiled[-1] != compiled[0]
    with pytest.raises(ValueError, match="run.compile: True -> False"):
        train.run(tiny(tmp_path / "run", **changes | {"compile": False}, resume=True), dataset)


def test_the_network_is_really_compiled(dataset, tmp_path, monkeypatch):
    asked = []

    def compile(model, **options):
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    train.run(tiny(tmp_path / "run", steps=2, compile=True), dataset)
    train.run(tiny(tmp_path / "other", steps=2), dataset)
    assert asked == [{"dynamic": False, "fullgraph": True}]


# The loss that is read late


def test_update_reads_the_loss_before_its_step_and_after_its_last_backward(dataset, monkeypatch):
    events = []

    class Noting(device.Reading):
        def __init__(self, value):
            events.append("ask")
            super().__init__(value)

        def read(self):
            events.append("read")
            return super().read()

    monkeypatch.setattr(train, "Reading", Noting)
    settings = config.resolve(tiny("unused"), num_examples=24, native_size=8)
    trainer = train.Trainer(settings, make_task(dataset, settings.images))
    backward = trainer.passes.backward
    trainer.passes.backward = lambda loss: events.append("backward") or backward(loss)
    trainer.optimizer.register_step_pre_hook(lambda *_: events.append("step"))
    trainer.update(trainer.batches.batch(0), 0.1)
    assert events == ["ask", "backward"] * 3 + ["read", "step"]

    events.clear()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr(
        train, "mixup_cross_entropy", lambda *args, **_: args[0].sum() * 0 + math.inf
    )
    with pytest.raises(train.TrainingFailed, match="the loss is inf at update 1"):
        trainer.update(trainer.batches.batch(1), 0.1)
    assert "step" not in events
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_reading_is_of_its_moment_on_a_gpu(monkeypatch):
    """The copy is asked for at once, and the wait is for the event after it alone."""
    calls = []

    class OnGpu(torch.Tensor):
        is_cpu = False

        def detach(self):
            return self

        def to(self, place, non_blocking=False):
            calls.append((place, non_blocking))
            return torch.tensor(1.5)

    class Event:
        def synchronize(self):
            calls.append("wait")

    stream = type("Stream", (), {"record_event": lambda self: calls.append("event") or Event()})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    reading = device.Reading(torch.zeros(()).as_subclass(OnGpu))
    assert calls == [("cpu", True), "event"]
    assert reading.read() == 1.5
    assert calls[2:] == ["wait"]


# Not enough memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED\nMore"),
        RuntimeError("GET was unable to find an engine to execute this computation\nMore"),
    ],
)
def test_out_of_memory_names_the_flag(error, dataset, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train, "mixup_cross_entropy", full)
        with pytest.raises(train.TrainingFailed) as caught:
            train.run(tiny(tmp_path / "a"), dataset)
        message = str(caught.value)
        assert (
            "try --micro-batch of less than 3" in message and str(error).splitlines()[0] in message
        )
        assert "no checkpoint was written yet" in message and "More" not in message
        with pytest.raises(train.TrainingFailed, match="a smaller model or crop, as --micro-batch"):
            train.run(tiny(tmp_path / "b", micro_batch=1), dataset)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", full)
        with pytest.raises(train.TrainingFailed, match="try --eval-batch of less than 64"):
            train.run(tiny(tmp_path / "c"), dataset)
    monkeypatch.setattr(train, "build", full)
    with pytest.raises(train.TrainingFailed, match="try a smaller model"):
        train.run(tiny(tmp_path / "d"), dataset)


def test_other_errors_stay_as_they_are(dataset, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(train, "mixup_cross_entropy", broken)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        train.run(tiny(tmp_path / "a"), dataset)


# The same on every device


def test_first_weights_and_batches_do_not_ask_for_the_device(dataset):
    """They come from NumPy's and the CPU's generators, which a device has no part in."""
    settings = config.resolve(tiny("unused"), num_examples=24, native_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        drawn = train.build(settings, 3).state_dict()
        torch.manual_seed(settings.run.seed)
        assert_same_bits(drawn, models.create("R14x0.125", 3, stem="small").state_dict())
    task = make_task(dataset, settings.images)
    first, second = (
        TrainBatches(task.train, Augment(10, 8), batch_size=8, seed=1, mixup_alpha=0.3)
        for _ in range(2)
    )
    torch.manual_seed(1234)
    np.random.seed(5)
    for step in (0, 3):
        for one, other in zip(first.batch(step).micro(3), second.batch(step).micro(3)):
            assert all(map(torch.equal, one, other))


def test_state_has_the_generators_of_the_gpu(monkeypatch, tmp_path):
    model = models.create("R14x0.125", 3, stem="small")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    given = torch.arange(16, dtype=torch.uint8)
    restored = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: given)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    state.save(tmp_path, model, optimizer, state.Progress(images=3, step=2))
    assert state.load(tmp_path, model, optimizer).step == 2
    assert len(restored) == 1 and torch.equal(restored[0], given)
