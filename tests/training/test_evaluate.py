"""Scores, the evaluation of checkpoints, and the transfer study."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bit import checkpoint, cli, evaluate, metrics, models, pixels, recipes, task, train, transfer
from bit.config import Config, Images, Job, Network, Run, Schedule, check, resolve
from bit.data import Split

TINY = Network(model="R14x0.125", stem="small")


class FromPixels(nn.Module):
    """A network whose logits are one-hot at the first pixel's class, then at the second's."""

    def forward(self, images):
        pixels = ((images[:, 0, 0] * 127.5 + 127.5).round() / 10).long()
        first, second = (nn.functional.one_hot(pixels[:, i], 7).float() for i in (0, 1))
        return 2 * first + second - 0.01 * torch.arange(7.0)


def scores_of(labels, first, second, batch=2):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.array(first)[:, None] * 10, np.array(second)[:, None] * 10
    split = Split(images, np.array(labels), [f"c{i}" for i in range(7)])
    return metrics.evaluate(FromPixels(), split, size=2, batch=batch)


def test_scores_by_hand():
    scores = scores_of(labels=[0, 0, 0, 1, 6], first=[0, 0, 1, 1, 5], second=[2, 2, 2, 2, 4])
    assert scores.images == 5
    assert scores.top1 == pytest.approx(3 / 5)
    assert scores.per_class == (2 / 3, 1.0, None, None, None, None, 0.0)
    assert scores.mean_per_class == pytest.approx((2 / 3 + 1 + 0) / 3)
    # The last image's best five are 5, 4 and then, by the small slope, 0, 1, 2: not 6.
    assert scores.top5 == pytest.approx(4 / 5)


def test_loss_is_the_mean_over_images_whatever_the_batches():
    arguments = ([0, 1, 2, 3, 4], [0, 2, 2, 3, 0], [1, 1, 3, 4, 4])
    losses = [scores_of(*arguments, batch=batch).loss for batch in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_top5_of_few_classes_is_top_of_all():
    images = np.zeros((2, 2, 2, 3), np.uint8)
    model = models.create("R14x0.125", 2, stem="small")
    scores = metrics.evaluate(model, Split(images, np.array([0, 1]), ["a", "b"]), size=2, batch=2)
    assert scores.top5 == 1.0 and scores.loss == pytest.approx(np.log(2))


def test_evaluation_keeps_the_mode_and_can_be_stopped():
    split = Split(np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1]), ["a", "b"])
    model = models.create("R14x0.125", 2, stem="small").train()
    assert metrics.evaluate(model, split, size=2, batch=1, stop=lambda: True) is None
    assert model.training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on five of the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train.run(
        Config(
            images=Images(classes=("0", "1", "4"), crop=8, flip=False, shots=20),
            network=TINY,
            schedule=Schedule(batch=16, steps=6, base_lr=0.1, warmup=1),
            data="digits",
            run=Run(out=str(folder), threads=1),
        )
    )


def test_evaluate_needs_only_the_checkpoint(trained, capsys):
    path = f"{trained.folder}/last.safetensors"
    assert evaluate.main([path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data"] == "digits" and told["size"] == 8 and told["classes"] == ["0", "1", "4"]
    assert metrics.Metrics.from_dict(told["scores"]) == trained.test
    assert sum(told["counts"]) == trained.test.images

    assert evaluate.main([path, "--per-class", "--split", "val"]) == 0
    text = capsys.readouterr().out
    assert f"{trained.val.images} val images at 8 px" in text
    assert f"top-1           {trained.val.top1:8.2%}" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["0", "1", "4"]


def test_evaluate_lists_differing_classes(trained, capsys):
    path = f"{trained.folder}/last.safetensors"
    assert evaluate.main([path, "--classes", "0", "1", "7"]) == 2
    error = capsys.readouterr().err
    assert "digits lacks 4; the checkpoint lacks 7" in error and error.count("\n") == 1


def test_class_order_counts():
    with pytest.raises(ValueError, match="the same names in another order"):
        task.check_same_classes(["a", "b"], ["b", "a"], "pets")


def test_evaluate_npz_without_metadata(trained, tmp_path, capsys):
    model = checkpoint.create_from(f"{trained.folder}/last.safetensors")
    path = str(tmp_path / "weights.npz")
    checkpoint.save(model, path)
    classes = ["--classes", "0", "1", "4"]
    for given, missing in (
        ([], "data is None, and the checkpoint does not tell it; give --data"),
        (["--data", "digits"], "size is None"),
        (["--data", "digits", "--size", "8"], "model is None"),
    ):
        assert evaluate.main([path, *given, *classes]) == 2
        assert missing in capsys.readouterr().err
    given = ["--data", "digits", "--size", "8", "--model", "R14x0.125", "--stem", "small"]
    assert evaluate.main([path, *given, *classes, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["top1"] == trained.test.top1


def test_pixel_baselines_on_separable_images():
    dark_and_light = np.repeat(np.arange(8, dtype=np.uint8)[:, None, None] % 2 * 200, 9, 1)
    images = np.repeat(dark_and_light, 9, 2)
    split = Split(images, np.arange(8) % 2, ["dark", "light"])
    easy = task.Task(["dark", "light"], split, split, split, 9)
    assert pixels.nearest_neighbour(easy, 4) == (1.0, 1.0, "")
    top1, per_class, chosen = pixels.logistic_regression(easy, 4)
    assert (top1, per_class) == (1.0, 1.0) and chosen.startswith("C=")


@pytest.fixture
def tiny_study(tmp_path):
    return transfer.Study(
        source="digits",
        targets=("digits",),
        shots=(2,),
        seeds=2,
        scratch_lrs=(0.01, 0.1),
        pretrain=Job(
            images=Images(classes=("0", "1"), crop=8, shots=8),
            network=TINY,
            schedule=Schedule(rule="BiT-S", batch=8, steps=2),
        ),
        finetune=Job(
            images=Images(classes=("2", "3"), crop=8), schedule=Schedule(batch=4, steps=2)
        ),
        run=Run(out=str(tmp_path / "study"), threads=1),
    )


def test_study_measures_every_method_and_resumes(tiny_study, tmp_path, monkeypatch):
    report = transfer.study(tiny_study)
    folder = tmp_path / "study"
    measured = [(row.method, row.seed) for row in report.rows]
    assert measured == [(method, seed) for method in transfer.METHODS for seed in (0, 1)]
    scratch = [row for row in report.rows if row.method == transfer.SCRATCH]
    tried = {
        lr: train.Result.read(folder / "digits-2" / f"from-scratch-{lr:g}-0").val.mean_per_class
        for lr in (0.01, 0.1)
    }
    best = max(tried, key=tried.get)
    assert {row.setting for row in scratch} == {f"lr={best:g}"}
    with open(folder / "results.csv", encoding="utf-8") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [r.top1 for r in report.rows]
    assert "| digits | 2 " in (folder / "results.md").read_text()
    assert (folder / "study.png").read_bytes()[:4] == b"\x89PNG"
    mean, spread = report.cells("top1")["digits", 2][transfer.SCRATCH]
    assert mean == pytest.approx(np.mean([row.top1 for row in scratch]))
    assert spread == pytest.approx(np.std([row.top1 for row in scratch], ddof=1))

    monkeypatch.setattr(train, "Trainer", None)  # nothing is trained twice
    again = transfer.study(replace(tiny_study, run=replace(tiny_study.run, resume=True)))
    assert [r.top1 for r in again.rows] == [r.top1 for r in report.rows]
    with pytest.raises(ValueError, match="holds a run already"):
        transfer.study(tiny_study)


def test_transfer_and_scratch_differ_only_in_checkpoint_and_rate(tiny_study):
    runs = [
        transfer.finetune_config(tiny_study, Path("s"), "digits", method, 2, lr, seed=1)
        for method, lr in ((transfer.TRANSFER, 0.003), (transfer.SCRATCH, 0.1))
    ]
    assert runs[0].network.checkpoint == "s/pretrain/last.safetensors"
    assert runs[1].network.checkpoint is None
    same = [
        replace(
            r,
            network=replace(r.network, checkpoint=None),
            schedule=replace(r.schedule, base_lr=None),
            run=replace(r.run, out=None),
        )
        for r in runs
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ()}, r"targets is \(\); it must name at least one data set"),
        ({"targets": ("a/digits.tar", "digits")}, "targets are called digits, digits"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"shots": ()}, r"shots is \(\)"),
        ({"shots": (0,)}, "shots is 0; it must be at least 1"),
        ({"finetune": Job(network=TINY)}, "finetune.model"),
        ({"finetune": Job(images=Images(val_fraction=0.0))}, "finetune.val_fraction is 0"),
    ],
)
def test_study_refuses(changes, message, tiny_study, tmp_path):
    with pytest.raises(ValueError, match=message):
        transfer.study(replace(tiny_study, **changes))
    assert not (tmp_path / "study").exists()


def test_demo_prints_a_command_that_works(tiny_study, tmp_path, capsys):
    cli.demo.show(tiny_study)
    text = capsys.readouterr().out
    for method in transfer.METHODS:
        assert method in text
    command = text.strip().splitlines()[-1].split()
    assert command[:4] == ["python", "-m", "bit.train", "finetune"]
    from PIL import Image

    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 30), (level + i,) * 3).save(tmp_path / "own" / name / f"{i}.png")
    arguments = [str(tmp_path / "own") if a == "PATH" else a for a in command[3:]]
    arguments += ["--steps", "2", "--threads", "1", "--out", str(tmp_path / "mine")]
    assert cli.main(arguments) == 0
    assert "test, 2 images: top-1" in capsys.readouterr().out


@pytest.mark.parametrize("name, recipe", recipes.configs().items())
def test_recipes_can_run_and_say_what_they_are(name, recipe):
    _, settings = recipe
    if isinstance(settings, transfer.Study):
        transfer.check_study(replace(settings, targets=("digits",)))
    else:
        check(settings)
        resolve(settings, num_examples=57_000, native_size=28)
    module = __import__(f"bit.recipes.{name.replace('-', '_')}", fromlist=["config"])
    for word in (f"python -m bit.train {name}", "Hardware", "Time", "Result"):
        assert word in module.config.__doc__
