"""Training on a real GPU: every mode learns the same, resumes, and the largest network fits."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import assert_same_bits, at_step, tiny, weights

from bit import config, demo, evaluate, graphs, plan, prefetch, runlog, train, transfer
from bit.config import Config, Images, Network, Run, Schedule
from bit.data import Augment, Dataset, Split, TrainBatches
from bit.task import Task, make_task
from bit_kernels.data import mixup_cross_entropy
from bit_kernels.optim import SGD

DEVICE = "cuda"
MODES = {
    "eager": {},
    "compile": {"compile": True},
    "cuda_graph": {"cuda_graph": True},
    "compile and cuda_graph": {"compile": True, "cuda_graph": True},
    "NCHW": {"channels_last": False},
}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """Without the deterministic algorithms of the other tests, and cuDNN's settings as before."""
    torch.use_deterministic_algorithms(False)
    for name in ("deterministic", "benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.noise()


def demo_losses(folder, **settings):
    """The losses of the first 20 updates of the demo's pre-training."""
    job = transfer.pretrain_config(demo.config(), folder)
    settings = {"device": DEVICE, "eval_every": 100, "outputs": "minimal"} | settings
    schedule = replace(job.schedule, steps=20, micro_batch=24)  # two of 24, and one of 16
    run = replace(job.run, out=str(folder), resume=False, **settings)
    train.run(replace(job, schedule=schedule, run=run))
    return [row["loss"] for row in runlog.read(folder) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    return demo_losses(tmp_path_factory.mktemp("cpu") / "run", device="cpu")


@pytest.mark.parametrize("mode", MODES)
def test_demo_learns_as_on_the_cpu(mode, on_the_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses = demo_losses(tmp_path / "run", **MODES[mode])
    assert losses[0] == pytest.approx(on_the_cpu[0], rel=1e-5)  # same images, same weights
    assert losses == pytest.approx(on_the_cpu, abs=0.02)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mode", MODES)
def test_demo_learns_in_bfloat16(mode, on_the_cpu, tmp_path):
    losses = demo_losses(tmp_path / "run", dtype="bfloat16", **MODES[mode])
    assert losses == pytest.approx(on_the_cpu, abs=0.1)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["eager", "compile", "cuda_graph"])
def test_resume_is_bit_identical(mode, dtype, dataset, tmp_path, monkeypatch):
    changes = MODES[mode] | dict(device=DEVICE, dtype=dtype, deterministic=True, steps=8, crop=16)
    straight = train.run(tiny(tmp_path / "straight", **changes), dataset)
    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(tiny(tmp_path / "run", **changes), dataset)
    monkeypatch.undo()
    torch.cuda.manual_seed(99)
    result = train.run(tiny(tmp_path / "run", **changes, resume=True), dataset)
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    assert result.test == straight.test


def test_checkpoint_scores_alike_on_both_devices(dataset, tmp_path):
    result = train.run(tiny(tmp_path / "run", device=DEVICE, crop=16), dataset)
    model = train.build(
        replace(
            config.resolve(tiny(tmp_path, crop=16), num_examples=24, native_size=8),
            network=Network(
                "R14x0.125", "small", str(tmp_path / "run" / "last.safetensors"), "keep"
            ),
        ),
        3,
    )
    plain = train.evaluate(model, dataset.test, size=16, batch=5)
    there = train.evaluate(model.to(DEVICE), dataset.test, size=16, batch=5, device=DEVICE)
    assert there.loss == pytest.approx(plain.loss, abs=0.02)
    assert result.test.loss == pytest.approx(there.loss, abs=0.02)


def test_a_device_that_is_not_there():
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device is 'cuda:{count}'; it must be cpu or one that"):
        evaluate.evaluate(evaluate.Evaluate("none", device=f"cuda:{count}"))


def test_prefetched_batches_are_the_cpu_s_while_the_device_is_busy(dataset):
    stream = TrainBatches(dataset.train, Augment(250, 224), batch_size=64, seed=0, mixup_alpha=0.4)
    noise = torch.randn(4096, 4096, device=DEVICE)
    kept = []
    for step, batch in enumerate(prefetch.loaded(stream.iterate(0, 8), 24, DEVICE)):
        for parts in batch.micro(24):
            for _ in range(20):
                noise = noise @ noise / 64  # copies overtake this, if they can
            kept.append((step, [part.clone() for part in parts]))
            del parts
    expected = [(s, parts) for s in range(8) for parts in stream.batch(s).micro(24)]
    for (step, found), (same, wanted) in zip(kept, expected, strict=True):
        assert step == same
        assert all(torch.equal(f.cpu(), w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
def test_an_update_waits_for_its_loss_alone(mode, dataset):
    """The wait for an event is none that torch counts as a synchronization."""
    settings = tiny(
        "unused", device=DEVICE, dtype="bfloat16", crop=16, micro_batch=4, **MODES[mode]
    )
    settings = config.resolve(settings, num_examples=24, native_size=8)
    trainer = train.Trainer(settings, make_task(dataset, settings.images))
    if mode == "cuda_graph":
        log = type("Log", (), {"say": staticmethod(print)})
        trainer.passes = trainer.capture(log)
    batches = list(prefetch.loaded(trainer.batches.iterate(0, 1), 4, DEVICE))
    trainer.update(trainer_batch(trainer, 0), 0.1)  # makes momenta, picks algorithms
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update(batches[0], 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trainer_batch(trainer, step):
    (batch,) = prefetch.loaded(trainer.batches.iterate(step, step + 1), 4, DEVICE)
    return batch


def test_a_changed_weight_is_refused_while_capturing(dataset):
    model = train.models.create("R14x0.125", 3, stem="small", device=DEVICE, zero_head=False)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)

    def loss_of(images, targets):
        return mixup_cross_entropy(model(images), targets)

    passes = graphs.Graphed(
        loss_of, optimizer, (4, 3, 16, 16), adds=False, device=DEVICE, say=print
    )
    images = torch.randn(4, 3, 16, 16, device=DEVICE)
    targets = (*torch.randint(3, (2, 4), device=DEVICE), 0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="has changed since .* restandardize"):
        with torch.cuda.graph(graph):
            model(images)
    torch.cuda.synchronize()
    replayed = passes.forward(images, targets).clone()  # which has noticed by itself
    torch.testing.assert_close(replayed, loss_of(images, targets).detach(), rtol=1e-3, atol=1e-4)


def test_out_of_memory_names_the_flag(tmp_path):
    images = np.zeros((64, 64, 64, 3), np.uint8)
    split = Split(images, np.arange(64) % 2, ["a", "b"])
    settings = Config(
        images=Images(crop=224, resize=224, val_fraction=0.0),
        network=Network(model="R50x1"),
        schedule=Schedule(batch=64, micro_batch=64, steps=2),
        data="black",
        run=Run(out=str(tmp_path / "run"), device=DEVICE),
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)  # weights and their kin take 0.4
    try:
        with pytest.raises(train.TrainingFailed, match="try --micro-batch of less than 64"):
            train.run(settings, Dataset("black", split, split))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measured(model, images, side, dtype, classes, **settings):
    """Peak of allocated bytes in two updates of `bit.train`, and the losses."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    names = [str(i) for i in range(classes)]
    split = Split(pixels, np.arange(images) % classes, names)
    settings = Config(
        images=Images(crop=side, resize=side, val_fraction=0.0),
        network=Network(model=model),
        schedule=Schedule(rule="BiT-S", batch=images, micro_batch=images, steps=100),
        data="noise",
        run=Run(out="unused", device=DEVICE, dtype=dtype, **settings),
    )
    settings = config.resolve(settings, num_examples=images, native_size=side)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = train.Trainer(settings, Task(names, split, None, split, side))
    batches = prefetch.loaded(trainer.batches.iterate(0, 2), images, DEVICE)
    losses = [trainer.update(batch, 1e-4) for batch in batches]
    return torch.cuda.max_memory_allocated() - before, losses


def test_plan_bounds_what_r50x1_takes():
    peak, losses = measured("R50x1", 64, 224, "bfloat16", 1000)
    counted = plan.account("R50x1", 64, 224, dtype="bfloat16")
    assert 0.3 * counted.total < peak <= counted.total
    assert np.isfinite(losses).all()


@pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_properties(0).total_memory < 75 * plan.GB,
    reason="the GPU has less than 75 GB",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_r152x4_with_8_images_runs_on_one_gpu(dtype):
    peak, losses = measured("R152x4", 8, 224, dtype, 21843)
    counted = plan.account("R152x4", 8, 224, dtype=dtype, classes=21843)
    assert peak <= counted.total < 80 * plan.GB
    assert losses[0] == pytest.approx(np.log(21843), rel=1e-3)  # the head is zero
    assert np.isfinite(losses[1])
