"""The training loop: its arithmetic, its stops and resumes, and what it leaves on disk."""

import dataclasses
import importlib.util
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import assert_same_bits, at_step, tiny, weights
from torch.nn import functional as F

from bit import (
    checkpoint,
    cli,
    config,
    hyperrule,
    interrupt,
    models,
    packages,
    runlog,
    state,
    train,
)
from bit.config import Images, Network, Run, Schedule
from bit.data import Dataset
from bit.task import make_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.noise()


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train.run(tiny(folder), dataset)


# What one update computes


def test_update_is_sgd_with_momentum_and_decay_on_kernels(dataset, tmp_path):
    schedule = {"momentum": 0.9, "weight_decay": 0.1, "mixup": 0.0}
    settings = config.resolve(tiny(tmp_path, **schedule), num_examples=24, native_size=8)
    trainer = train.Trainer(settings, make_task(dataset, settings.images))
    torch.nn.init.normal_(trainer.model.head.weight)
    # The gradients are those of standardized weights until they are projected.
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.project_gradients())
    velocity = {name: 0.0 for name, _ in trainer.model.named_parameters()}
    for step, lr in enumerate((0.0, 0.1, 0.01)):
        batch = trainer.batches.batch(step)
        ((images, labels, _),) = batch.micro(8)
        with torch.no_grad():
            loss = F.cross_entropy(trainer.model(images), labels).item()
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        assert trainer.update(batch, lr) == pytest.approx(loss, rel=1e-5)
        for name, parameter in trainer.model.named_parameters():
            decay = 0.0 if "norm" in name or name == "head.bias" else 0.1
            velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * before[name]
            expected = before[name] - lr * velocity[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_first_update_changes_nothing(dataset, tmp_path):
    train.run(tiny(tmp_path / "run", steps=1, warmup=1), dataset)
    torch.manual_seed(0)
    fresh = models.create("R14x0.125", 3, stem="small").state_dict()
    assert_same_bits(weights(tmp_path / "run"), fresh)


def test_micro_batches_change_only_rounding(dataset, tmp_path):
    results = {}
    for size in (8, 3, 1):
        # At 8 px the last groups hold two values, which GroupNorm turns into +-1 on a rounding.
        train.run(tiny(tmp_path / str(size), steps=3, micro_batch=size, crop=16), dataset)
        results[size] = weights(tmp_path / str(size))
    for size in (3, 1):
        for key, tensor in results[8].items():
            torch.testing.assert_close(tensor, results[size][key], rtol=1e-4, atol=1e-5)


def test_sigmoid_head_starts_at_minus_ten(dataset, tmp_path):
    train.run(tiny(tmp_path / "run", steps=1, warmup=1, loss="sigmoid"), dataset)
    assert weights(tmp_path / "run")["head.bias"].tolist() == [-10.0] * 3
    row = runlog.read(tmp_path / "run")[0]
    assert row["loss"] == pytest.approx(10.0001362, rel=1e-6)  # one positive, and 3 softplus(-10)


def test_bfloat16_trains_float32_weights(dataset, tmp_path):
    result = train.run(tiny(tmp_path / "run", steps=3, dtype="bfloat16"), dataset)
    assert result.steps == 3
    assert {t.dtype for t in weights(tmp_path / "run").values()} == {torch.float32}


# What a run leaves behind


def test_run_learns_and_leaves_its_files(straight, dataset):
    folder = Path(straight.folder)
    assert straight.val.images == 6 and straight.test.images == 12
    assert {path.name for path in folder.iterdir()} == {
        "best.safetensors",
        "config.json",
        "curves.png",
        "last.safetensors",
        "log.jsonl",
        "result.json",
        "tensorboard",
    }
    rows = runlog.read(folder)
    updates = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in updates] == list(range(1, 13))
    assert updates[0]["lr"] == 0.0 and updates[2]["lr"] == 0.05
    assert updates[11]["lr"] == pytest.approx(0.0005)
    evaluations = [(r["step"], r["split"]) for r in rows if r["kind"] == "eval"]
    assert evaluations == [(4, "val"), (8, "val"), (12, "val"), (12, "test")]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").iterdir())
    assert train.Result.read(folder) == straight
    saved = json.loads((folder / "config.json").read_text())
    assert saved["images"]["resize"] == 10 and saved["schedule"]["decays"] == [6, 9]


def test_checkpoint_tells_what_it_is(straight):
    metadata = checkpoint.read_metadata(Path(straight.folder) / "best.safetensors")
    assert metadata["classes"] == ["blue", "green", "red"]
    assert metadata["config"] == {"name": "R14x0.125", "num_classes": 3, "stem": "small"}
    assert metadata["preprocessing"] == {"resize": 10, "crop": 8, "mean": 127.5, "std": 127.5}
    assert metadata["step"] == straight.best_step
    assert metadata["val"]["top1"] == straight.best_val_top1
    assert metadata["run"]["schedule"]["mixup"] == 0.4


def test_best_is_the_best_on_validation(straight):
    rows = [row for row in runlog.read(straight.folder) if row.get("split") == "val"]
    best = max(rows, key=lambda row: (row["top1"], -row["step"]))
    assert (straight.best_step, straight.best_val_top1) == (best["step"], best["top1"])


def test_without_validation_there_is_no_best(dataset, tmp_path):
    result = train.run(tiny(tmp_path / "run", steps=4, val_fraction=0.0), dataset)
    assert result.val is None and result.best_step is None
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_fine_tuning_starts_from_the_checkpoint_with_a_new_head(straight, dataset, tmp_path):
    source = Path(straight.folder) / "last.safetensors"
    pair = ("blue", "red")
    settings = tiny(
        tmp_path / "run", steps=1, warmup=1, checkpoint=str(source), model=None, stem=None,
        classes=pair, shots=3,
    )  # fmt: skip
    result = train.run(settings, dataset)
    assert result.classes == pair
    before, after = weights(straight.folder), weights(tmp_path / "run")
    assert after["head.weight"].count_nonzero() == 0 and len(after["head.bias"]) == 2
    del before["head.weight"], before["head.bias"], after["head.weight"], after["head.bias"]
    assert_same_bits(before, after)


def test_keeping_the_head_needs_the_same_classes(straight, dataset, tmp_path):
    source = str(Path(straight.folder) / "last.safetensors")
    settings = tiny(tmp_path / "run", checkpoint=source, head="keep", classes=("blue", "red"))
    with pytest.raises(ValueError, match="noise lacks green"):
        train.run(settings, dataset)
    kept = train.run(
        tiny(tmp_path / "kept", steps=1, warmup=1, checkpoint=source, head="keep"), dataset
    )
    assert_same_bits(weights(kept.folder), weights(straight.folder))


# Stopping and resuming


@pytest.mark.parametrize("stop_in", [4, 7, 11])  # before, at and after evaluations; the last one
def test_resume_is_bit_identical(stop_in, straight, dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, stop_in, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped, match=f"SIGTERM after update {stop_in + 1} of 12") as caught:
        train.run(tiny(tmp_path / "run"), dataset)
    assert caught.value.signum == signal.SIGTERM
    monkeypatch.undo()
    torch.manual_seed(99)  # nothing may hang on the generators of the process
    result = train.run(tiny(tmp_path / "run", resume=True), dataset)
    assert_same_bits(weights(tmp_path / "run"), weights(straight.folder))
    assert_same_bits(weights(tmp_path / "run", "best"), weights(straight.folder, "best"))
    kept = {f.name for f in dataclasses.fields(result)} - {"folder", "seconds"}
    assert all(getattr(result, name) == getattr(straight, name) for name in kept)
    times = {"seconds", "images_per_s", "data_share"}
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in times} for row in runlog.read(folder)]
        for folder in (tmp_path / "run", straight.folder)
    )
    assert ours == theirs


def test_stop_in_the_final_evaluation(straight, dataset, tmp_path, monkeypatch):
    """The validation images are scored, then a signal comes before the test images are."""
    real, calls = train.evaluate, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", signalled)
    with pytest.raises(train.Stopped, match="after update 12 of 12"):
        train.run(tiny(tmp_path / "run"), dataset)
    result = train.run(tiny(tmp_path / "run", resume=True), dataset)
    assert (result.test, result.val) == (straight.test, straight.val)
    steps = [(r["kind"], r["step"], r.get("split")) for r in runlog.read(tmp_path / "run")]
    assert steps == [(r["kind"], r["step"], r.get("split")) for r in runlog.read(straight.folder)]


def test_resume_after_a_kill_goes_on_from_the_last_save(straight, dataset, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    at_step(monkeypatch, 10, kill)
    with pytest.raises(Killed):
        train.run(tiny(tmp_path / "run"), dataset)
    monkeypatch.undo()
    assert len([r for r in runlog.read(tmp_path / "run") if r["kind"] == "train"]) == 10
    train.run(tiny(tmp_path / "run", resume=True), dataset)
    assert_same_bits(weights(tmp_path / "run"), weights(straight.folder))
    steps = [r["step"] for r in runlog.read(tmp_path / "run") if r["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_sigterm_to_a_process_then_the_printed_command(tmp_path):
    arguments = [
        "finetune", "--data", "digits", "--model", "R14x0.125", "--stem", "small", "--crop", "8",
        "--batch", "4", "--micro-batch", "3", "--steps", "8", "--mixup", "0.4", "--shots", "10",
        "--eval-every", "100", "--threads", "1",
    ]  # fmt: skip
    command = [*arguments, "--out", str(tmp_path / "run")]
    # The child stops itself, so that the signal always falls into the same update.
    child = (
        "import os, signal, sys\n"
        "from bit import cli, hyperrule\n"
        "rate = hyperrule.learning_rate\n"
        "def hooked(step, *args):\n"
        "    if step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return rate(step, *args)\n"
        "hyperrule.learning_rate = hooked\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    stopped = subprocess.run(
        [sys.executable, "-c", child, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "stopped by SIGTERM after update 5 of 8" in stopped.stderr
    *_, hint = stopped.stderr.strip().splitlines()
    assert hint == f"go on with: python -m bit.train {' '.join(command)} --resume"
    assert cli.main([*command, "--resume"]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_ctrl_c_exits_with_130(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    out = str(tmp_path / "run")
    arguments = ["finetune", "--model", "R14x0.125", "--stem", "small", "--crop", "8"]
    arguments += ["--batch", "4", "--steps", "9", "--threads", "1", "--shots", "2", "--out", out]
    assert cli.main(arguments) == 130
    assert f"--out {out} --resume" in capsys.readouterr().err
    assert state.FILE in os.listdir(out)


def test_second_ctrl_c_stops_at_once():
    with interrupt.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # and afterwards all is as it was
        signal.raise_signal(signal.SIGINT)


def test_finished_run_is_not_run_again(straight, dataset, monkeypatch):
    monkeypatch.setattr(train, "Trainer", None)
    again = train.run(tiny(straight.folder, resume=True), dataset)
    assert again == straight


def test_folder_of_another_run_is_refused(straight, dataset):
    before = weights(straight.folder)
    with pytest.raises(ValueError, match="holds a run already; go on with it by --resume, give"):
        train.run(tiny(straight.folder), dataset)
    assert_same_bits(weights(straight.folder), before)


def test_resume_refuses_other_settings_by_name(straight, dataset):
    changed = tiny(straight.folder, resume=True, base_lr=0.1, flip=False)
    with pytest.raises(ValueError, match="resume is True, but") as caught:
        train.run(changed, dataset)
    assert "images.flip: True -> False" in str(caught.value)
    assert "schedule.base_lr: 0.05 -> 0.1" in str(caught.value)
    harmless = tiny(straight.folder, resume=True, eval_every=3, save_every=5, workers=2, threads=2)
    assert train.run(harmless, dataset) == straight


def test_resume_of_a_run_that_did_not_know_a_setting_yet(straight, dataset):
    """It ran as the default does."""
    file = Path(straight.folder) / "config.json"
    text = file.read_text()
    earlier = json.loads(text)
    del earlier["run"]["deterministic"], earlier["run"]["compile"]
    try:
        file.write_text(json.dumps(earlier))
        train.run(tiny(straight.folder, resume=True), dataset)
        with pytest.raises(ValueError, match="run.compile: False -> True"):
            train.run(tiny(straight.folder, resume=True, compile=True), dataset)
    finally:
        file.write_text(text)


def test_resume_refuses_other_images(dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(train.Stopped):
        train.run(tiny(tmp_path / "run"), dataset)
    fewer = Dataset("noise", dataset.train.subset(range(27)), dataset.test)
    with pytest.raises(ValueError, match="now has 21 training images; the run .* with 24"):
        train.run(tiny(tmp_path / "run", resume=True), fewer)


# When things go wrong


def test_nan_loss_names_the_update_and_keeps_the_last_good_checkpoint(
    dataset, tmp_path, monkeypatch
):
    real = train.mixup_cross_entropy
    update = {"now": -1}
    rate = hyperrule.learning_rate

    def counted(step, *args):
        update["now"] = step
        return rate(step, *args)

    def poisoned(*args, **options):
        return real(*args, **options) * (float("nan") if update["now"] == 6 else 1.0)

    monkeypatch.setattr(hyperrule, "learning_rate", counted)
    monkeypatch.setattr(train, "mixup_cross_entropy", poisoned)
    with pytest.raises(train.TrainingFailed, match="loss is nan at update 7 .* is of update 4"):
        train.run(tiny(tmp_path / "run"), dataset)
    metadata = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    assert metadata["step"] == 4
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_divergence_exits_with_1_and_no_traceback(tmp_path, capsys):
    arguments = ["finetune", "--model", "R14x0.125", "--stem", "small", "--crop", "8"]
    arguments += ["--batch", "4", "--steps", "9", "--base-lr", "1e38", "--threads", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "failed:" in s]
    assert "at update" in line or "after update" in line


def test_full_disk_keeps_the_old_checkpoint(dataset, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = {}

    def fill_the_disk():
        for name in ("last.safetensors", state.FILE):
            kept[name] = (tmp_path / "run" / name).read_bytes()
        assert min(map(len, kept.values())) > 200_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))

    at_step(monkeypatch, 6, fill_the_disk)
    try:
        with pytest.raises(train.TrainingFailed) as caught:
            train.run(tiny(tmp_path / "run", save_every=2, eval_every=100), dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert "last.safetensors after update 8: File too large" in message
    assert message.endswith("last.safetensors is of update 6")
    for name, content in kept.items():
        assert (tmp_path / "run" / name).read_bytes() == content
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["train", "plan", "evaluate"])
def test_a_missing_package_is_one_line(module, monkeypatch, capsys):
    here = importlib.util.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "tyro" else here(name))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"bit.{module}", run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert (
        said.startswith(f"python -m bit.{module}: error: tyro can't be imported")
        and "pip install tyro" in said
    )


def test_command_line_errors_are_one_line(tmp_path, capsys):
    for arguments, expected in (
        (["--batch", "0"], "batch is 0; it must be at least 1 and finite"),
        (["--data", "nowhere"], "'nowhere'"),
        (["--shots", "1000"], "shots is 1000"),
        (["--classes", "1", "x"], "classes has x; digits has 0, 1, 2"),
        ([], "model is None and no checkpoint tells it"),
        (["--checkpoint", "no.safetensors"], "no.safetensors"),
        (["--model", "R51x1"], "name is 'R51x1'"),
    ):
        assert cli.main(["finetune", "--out", str(tmp_path / "run"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("python -m bit.train: error: ")
        assert expected in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "section, field, value, allowed",
    [
        ("images", "augment", "cut", "one of crop, inception"),
        ("images", "test_fraction", 1.0, "between 0 and 1"),
        ("images", "val_fraction", 1.0, "at least 0 and less than 1"),
        ("images", "classes", ("a",), "none or at least two names"),
        ("images", "classes", ("a", "a"), "all different"),
        ("images", "shots", 0, "at least 1"),
        ("images", "resize", 4, r"at least crop \(8\)"),
        ("network", "stem", "big", "imagenet, small or None"),
        ("network", "head", "lose", "one of drop, keep"),
        ("schedule", "rule", "BiT-X", "one of hyperrule, BiT-S"),
        ("schedule", "micro_batch", 0, "at least 1"),
        ("schedule", "base_lr", float("nan"), "at least 0 and finite"),
        ("schedule", "decays", (9, 6), "ascending"),
        ("schedule", "momentum", 1.0, "at least 0 and less than 1"),
        ("schedule", "epochs", 0.0, "more than 0"),
        ("run", "seed", -1, "at least 0"),
        ("run", "device", "gpu", "cpu, cuda, cuda:N"),
        ("run", "dtype", "float16", "one of float32, bfloat16"),
        ("run", "cuda_graph", True, "False on device cpu"),
    ],
)
def test_check_names_the_field(section, field, value, allowed, tmp_path):
    broken = tiny(tmp_path)
    part = replace(getattr(broken, section), **{field: value})
    with pytest.raises(ValueError, match=f"^{field} is .*; it must be {allowed}"):
        config.check(replace(broken, **{section: part}))


# What the rules fill in


@pytest.mark.parametrize(
    "examples, expected",
    [(100, (500, 100, (150, 300, 450), 0.0)), (60_000, (10_000, 500, (3000, 6000, 9000), 0.1))],
)
def test_resolve_follows_the_hyperrule(examples, expected):
    settings = config.resolve(
        replace(config.FINETUNE, network=Network(model="R50x1")),
        num_examples=examples,
        native_size=32,
    )
    s = settings.schedule
    assert (s.steps, s.warmup, s.decays, s.mixup) == expected
    assert (s.base_lr, s.batch, s.momentum, s.weight_decay) == (0.003, 512, 0.9, 0.0)
    assert (settings.images.resize, settings.images.crop) == (160, 128)
    assert settings.run.out == "runs/hyperrule-digits-R50x1"


def test_resolve_pretraining_and_overrides():
    settings = config.resolve(config.PRETRAIN, num_examples=1_281_167, native_size=400)
    s = settings.schedule
    assert (s.steps, s.warmup) == (round(90 * 1_281_167 / 256), 5000)
    assert (s.base_lr, s.weight_decay, s.mixup) == (0.03, 1e-4, 0.0)
    assert settings.images.crop == 224
    own = replace(config.PRETRAIN.schedule, epochs=2, warmup=0, decays=(7,), weight_decay=0.0)
    settings = config.resolve(
        replace(config.PRETRAIN, schedule=own), num_examples=2560, native_size=400
    )
    s = settings.schedule
    assert (s.steps, s.warmup, s.decays, s.weight_decay) == (20, 0, (7,), 0.0)


def test_resolve_takes_the_network_from_the_checkpoint():
    trained = {"name": "R26x0.25", "num_classes": 7, "stem": "small"}
    settings = config.resolve(config.FINETUNE, num_examples=9, native_size=8, trained=trained)
    assert (settings.network.model, settings.network.stem) == ("R26x0.25", "small")


def test_help_knows_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["finetune", "--help"])
    text = capsys.readouterr().out
    for section in (Images, Network, Schedule, Run):
        for field in dataclasses.fields(section):
            name = field.name.replace("_", "-")
            assert f"--{name}" in text or f"--no-{name}" in text


def test_no_argument_means_the_demo(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.demo, "show", seen.append)
    assert cli.main([]) == 0
    assert seen == [cli.demo.config()]
