"""bit.train --engine xla: the run of tests/training, on 8 devices, and from one engine to the other."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import assert_same_bits, at_step, tiny, weights

from bit import checkpoint, cli, config, evaluate, models, runlog, train
from bit.config import Network
from bit.interrupt import StopSignals
from bit.task import make_task
from bit.xla.step import Training
from bit.xla.train import Agreed, Loss, XlaTrainer, devices_of

ROOT = Path(__file__).parents[2]


SAVES = {1: [4, 4], 3: [4, 8, 12]}  # updates whose state is written, by the one that is stopped in


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.noise()


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """An uninterrupted run on 8 devices: a batch of 8 images is one for each."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train.run(tiny(folder, engine="xla"), dataset)


def test_leaves_the_files_of_a_run(straight, dataset):
    folder = Path(straight.folder)
    assert jax.device_count() == 8
    assert {path.name for path in folder.iterdir()} == {
        "best.safetensors",
        "config.json",
        "curves.png",
        "last.safetensors",
        "log.jsonl",
        "result.json",
        "tensorboard",
    }
    rows = [row for row in runlog.read(folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert straight.val.images == 6 and straight.test.images == 12
    metadata = checkpoint.read_metadata(folder / "last.safetensors")
    assert metadata["classes"] == ["blue", "green", "red"] and metadata["step"] == 12


def test_scores_are_those_of_the_checkpoint_in_pytorch(straight, dataset):
    model = checkpoint.create_from(Path(straight.folder) / "last.safetensors")
    plain = train.evaluate(model, dataset.test, size=8, batch=5)
    assert plain.loss == pytest.approx(straight.test.loss, rel=1e-5)
    assert plain.top1 == straight.test.top1


@pytest.mark.parametrize("step", [4, 6], ids=["as_it_evaluates", "between"])
def test_stopped_and_resumed_run_has_the_bits_of_a_straight_one(
    step, straight, dataset, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    at_step(monkeypatch, step - 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped, match=f"after update {step} of 12; .* is of update {step}"):
        train.run(tiny(folder, engine="xla"), dataset)
    monkeypatch.undo()
    assert (folder / "state").is_dir()
    result = train.run(tiny(folder, engine="xla", resume=True), dataset)
    for name in ("last", "best"):
        assert_same_bits(weights(folder, name), weights(straight.folder, name))
    assert result.test == straight.test
    steps = [row["step"] for row in runlog.read(folder) if row["kind"] == "train"]
    assert steps == list(range(1, 13))
    assert not (folder / "state").exists()


@pytest.mark.parametrize("at", [1, 3], ids=["as_it_saves", "in_the_last_scores"])
def test_stopped_as_it_writes_it_goes_on_all_the_same(at, straight, dataset, tmp_path, monkeypatch):
    """The state of an update is then written twice."""
    folder, save, saves = tmp_path / "run", XlaTrainer.save_state, []

    def stopping(self):
        save(self)
        saves.append(self.progress.step)
        if len(saves) == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(XlaTrainer, "save_state", stopping)
    with pytest.raises(train.Stopped, match=f"after update {SAVES[at][-1]} of 12"):
        train.run(tiny(folder, engine="xla"), dataset)
    assert saves == SAVES[at]
    monkeypatch.undo()
    result = train.run(tiny(folder, engine="xla", resume=True), dataset)
    assert_same_bits(weights(folder), weights(straight.folder))
    assert result.test == straight.test and not (folder / "state").exists()


def test_next_update_starts_before_the_last_loss_is_read(dataset, tmp_path, monkeypatch):
    """But for the updates that an evaluation follows, of weights whose loss must be finite."""
    events, update, score, read = [], XlaTrainer.update, XlaTrainer.score, Loss.__float__

    def updating(self, *given):
        events.append(("update", self.progress.step + 1))
        return update(self, *given)

    def reading(self):
        events.append(("read", self._step))
        return read(self)

    def scoring(self, *given):
        events.append(("score",))
        return score(self, *given)

    monkeypatch.setattr(XlaTrainer, "update", updating)
    monkeypatch.setattr(XlaTrainer, "score", scoring)
    monkeypatch.setattr(Loss, "__float__", reading)
    train.run(tiny(tmp_path / "run", engine="xla", steps=6), dataset)
    u, r, s = (lambda step: ("update", step)), (lambda step: ("read", step)), ("score",)
    assert events == [
        *(u(1), u(2), r(1), u(3), r(2), u(4), r(3), r(4), s),
        *(u(5), u(6), r(5), r(6), s, s),  # validation, then test images
    ]


def test_several_processes_meet_at_every_eighth_question(monkeypatch):
    meetings = []

    def gather(flag):
        meetings.append(bool(flag))
        return np.array([flag, len(meetings) == 3])  # the other one is told at the third

    monkeypatch.setattr("bit.xla.train.multihost_utils.process_allgather", gather)
    agreed = Agreed(StopSignals())
    answers = [bool(agreed) for _ in range(40)]
    assert answers == [False] * 23 + [True] * 17 and meetings == [False] * 3
    assert agreed.signum == signal.SIGTERM


def test_resumes_on_another_number_of_devices(straight, dataset, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(tiny(folder, engine="xla"), dataset)
    monkeypatch.undo()
    monkeypatch.setattr(XlaTrainer, "devices", 2)
    result = train.run(tiny(folder, engine="xla", resume=True), dataset)
    assert result.steps == 12
    before = [row["loss"] for row in runlog.read(straight.folder) if row["kind"] == "train"]
    after = [row["loss"] for row in runlog.read(folder) if row["kind"] == "train"]
    assert after[:6] == before[:6]
    assert after[6] == pytest.approx(before[6], rel=1e-4)


def test_other_engine_does_not_go_on_with_a_run(dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(tiny(tmp_path / "run", engine="xla"), dataset)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="run.engine: 'xla' -> 'torch'"):
        train.run(tiny(tmp_path / "run", resume=True), dataset)


@pytest.mark.parametrize("first, second", [("torch", "xla"), ("xla", "torch")])
def test_checkpoint_of_one_engine_starts_the_other(first, second, dataset, tmp_path):
    """The loss before the first update is that of the weights in the file."""
    source = train.run(tiny(tmp_path / "a", engine=first, steps=4), dataset)
    file = str(Path(source.folder) / "last.safetensors")
    network = Network("R14x0.125", "small", file, head="keep")
    run = replace(
        tiny(tmp_path / "b", engine=second, steps=3, mixup=0.0, flip=False), network=network
    )
    train.run(run, dataset)
    loss = next(row["loss"] for row in runlog.read(tmp_path / "b"))
    model = checkpoint.create_from(file)
    task = make_task(dataset, run.images)
    settings = config.resolve(run, num_examples=len(task.train), native_size=task.native_size)
    (batch,) = train.Trainer(settings, task).batches.iterate(0, 1)
    images, labels, _ = batch.collate(slice(0, 8))
    expected = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_loss_that_is_not_finite_ends_the_run(dataset, tmp_path):
    changes = dict(engine="xla", base_lr=1e30, warmup=0, decays=())
    with pytest.raises(train.TrainingFailed, match="loss is nan at update|not finite after update"):
        train.run(tiny(tmp_path / "run", **changes), dataset)


def test_a_full_disk_is_named_and_spares_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(XlaTrainer, "save_state", full)
    with pytest.raises(
        train.TrainingFailed, match="could not write .*/state after .* No space left"
    ):
        train.run(tiny(tmp_path / "run", engine="xla"), dataset)
    assert weights(tmp_path / "run")


def test_advice_on_memory_is_that_of_a_device(dataset, tmp_path):
    def advice(**changes):
        settings = tiny(tmp_path, engine="xla", **changes)
        task = make_task(dataset, settings.images)
        settings = config.resolve(settings, num_examples=len(task.train), native_size=8)
        return XlaTrainer(settings, task).smaller_micro_batch()

    assert advice(batch=64, micro_batch=60).startswith("--micro-batch of less than 8,")
    assert advice(batch=8).startswith("--remat, a smaller model or crop")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--device", "tpu"], "device is 'tpu', of which JAX sees none"),
        (["--device", "cuda:1"], "device is 'cuda:1'; it must be cpu, cuda or tpu"),
        (["--compile"], "compile is True; it must be False with engine xla"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_settings_are_one_line_and_2(arguments, expected, capsys):
    assert cli.main(["finetune", "--model", "R14x0.125", "--engine", "xla", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_torch_refuses_what_is_xla_s(capsys):
    assert cli.main(["finetune", "--model", "R14x0.125", "--remat"]) == 2
    assert "remat is True; it must be False with engine torch" in capsys.readouterr().err


def test_without_jax_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(train, "missing", lambda *names: ["jax"])
    with pytest.raises(
        ValueError, match="engine is 'xla', and jax can't be imported; .*bit-kernels"
    ):
        train.engine_of(config.Run(engine="xla"))


def test_command_line_trains_and_evaluates(tmp_path, capsys):
    arguments = ["--data", "digits", "--model", "R14x0.125", "--stem", "small", "--crop", "16"]
    arguments += ["--steps", "4", "--batch", "16", "--out", str(tmp_path / "run")]
    assert cli.main(["pretrain", "--engine", "xla", "--augment", "crop", *arguments]) == 0
    file = str(tmp_path / "run" / "last.safetensors")
    capsys.readouterr()
    assert evaluate.main([file, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert scores["top1"] == result["test"]["top1"]


PROCESS = """
import os, sys
index, folder, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
import tiny_runs
from bit import train
assert jax.process_count() == 2 and jax.local_device_count() == 4
run = tiny_runs.tiny(folder, engine="xla", distributed=True, resume=len(sys.argv) < 5)
if len(sys.argv) > 4 and index == 1:  # one is told, both stop
    import signal
    from bit import hyperrule
    rate = hyperrule.learning_rate
    def hooked(step, *rest):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *rest)
    hyperrule.learning_rate = hooked
try:
    print("top1", train.run(run, tiny_runs.noise()).test.top1)
except train.Stopped as stopped:
    print("stopped", stopped)
"""


def two_processes(folder, *more):
    """What each of two processes with 4 devices each prints."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    paths = [str(ROOT), str(ROOT / "tests/training"), os.environ.get("PYTHONPATH", "")]
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(folder), str(port), *more],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, said):
        assert process.returncode == 0, err
    return [out for out, _ in said]


def test_two_processes_train_as_one_and_stop_together(straight, dataset, tmp_path):
    folder = tmp_path / "run"
    first, second = two_processes(folder, "stop")
    # Told in the 6th, and the next meeting is after the 7th.
    assert "stopped by SIGTERM after update 7 of 12" in first
    assert "stopped by SIGTERM after update 7 of 12" in second
    told = {said.splitlines()[-1] for said in two_processes(folder)}
    assert len(told) == 1 and told.pop().startswith("top1 ")
    losses, other, alone = (
        [row["loss"] for row in runlog.read(run) if row["kind"] == "train"]
        for run in (folder, folder / "process-1", straight.folder)
    )
    assert losses == other and len(losses) == 12
    # gloo adds up in another order, and this network makes much of a rounding.
    assert losses[:4] == pytest.approx(alone[:4], rel=1e-4)
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12 and not (folder / "state").exists()


def test_batch_is_dealt_out_whole(dataset, tmp_path):
    """8 images over 3 devices: each image once, the rest is padding."""
    settings = replace(tiny(tmp_path, engine="xla"))
    task = make_task(dataset, settings.images)
    settings = config.resolve(settings, num_examples=len(task.train), native_size=8)
    trainer = XlaTrainer(settings, task)
    training = trainer.training
    trainer.training = Training(training.network, training.mesh, 10, 64)
    (batch,) = trainer.batches.iterate(2, 3)
    placed = trainer.placed(batch)
    assert placed.images.shape == (16, 8, 8, 3) and placed.weights.sum() == 8
    images, labels, partners = batch.collate(slice(0, 8))
    assert np.array_equal(placed.images[:8], images.permute(0, 2, 3, 1).numpy())
    assert placed.labels[:8].tolist() == labels.tolist()
    assert placed.partners[:8].tolist() == partners.tolist()
    assert len(devices_of("cpu")) == 8 and isinstance(trainer.model, models.ResNetV2)
