"""The HyperRule and the pre-training schedules against the numbers of paper and released code."""

import ast
from pathlib import Path

import pytest

from bit import hyperrule as rule


def test_imports_nothing():
    tree = ast.parse(Path(rule.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
    "height, width, variant, model, expected",
    [
        (32, 32, "paper", "R50x1", (160, 128)),
        (95, 96, "paper", "R50x1", (160, 128)),
        (95, 96, "released", "R152x4", (160, 128)),
        (96, 96, "paper", "R50x1", (448, 384)),  # strictly less than 96 x 96 is small
        (48, 192, "paper", "R50x1", (448, 384)),  # the area counts, not the side
        (224, 224, "paper", "R101x3", (448, 384)),
        (224, 224, "paper", "R152x4", (512, 480)),
        (224, 224, "released", "R50x1", (512, 480)),
    ],
)
def test_resolution(height, width, variant, model, expected):
    assert rule.resolution(height, width, variant, model) == expected


@pytest.mark.parametrize(
    "examples, steps, warmup, mixup, paper, released",
    [
        (1, 500, 100, 0.0, (150, 300, 450), (200, 300, 400)),
        (19_999, 500, 100, 0.0, (150, 300, 450), (200, 300, 400)),
        (20_000, 10_000, 500, 0.1, (3000, 6000, 9000), (3000, 6000, 9000)),
        (499_999, 10_000, 500, 0.1, (3000, 6000, 9000), (3000, 6000, 9000)),
        (500_000, 20_000, 500, 0.1, (6000, 12_000, 18_000), (6000, 12_000, 18_000)),
    ],
)
def test_schedule_by_task_size(examples, steps, warmup, mixup, paper, released):
    assert rule.steps(examples) == steps
    assert rule.warmup(examples) == warmup
    assert rule.mixup_alpha(examples) == mixup
    assert rule.boundaries(examples) == paper
    assert rule.boundaries(examples, "released") == released


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0),  # the first update changes nothing
        (1, 0.003 / 100),
        (99, 0.003 * 99 / 100),
        (100, 0.003),
        (150, 0.003),  # strict: the boundary itself still has the old rate
        (151, 0.0003),
        (300, 0.0003),
        (301, 0.00003),
        (450, 0.00003),
        (451, 0.000003),
        (499, 0.000003),
    ],
)
def test_learning_rate_of_a_small_task(step, expected):
    assert rule.learning_rate(step, 0.003, 500, 100, (150, 300, 450)) == pytest.approx(
        expected, rel=1e-12, abs=0
    )


def test_learning_rate_without_warmup_or_decay():
    assert rule.learning_rate(0, 0.5, 1, 0, ()) == 0.5


@pytest.mark.parametrize("step", [-1, 500])
def test_learning_rate_ends_with_the_schedule(step):
    with pytest.raises(ValueError, match=f"step is {step}; .* steps 0 to 499"):
        rule.learning_rate(step, 0.003, 500, 100, (150,))


@pytest.mark.parametrize(
    "total, examples, expected",
    [
        (500, 100, (100, (150, 300, 450))),  # the rule's own length gives the rule
        (10_000, 60_000, (500, (3000, 6000, 9000))),
        (20_000, 10**6, (500, (6000, 12_000, 18_000))),
        (100, 100, (20, (30, 60, 90))),
        (2500, 60_000, (125, (750, 1500, 2250))),
        (1, 100, (0, (0, 1, 1))),
    ],
)
def test_scaled_keeps_the_shape(total, examples, expected):
    assert rule.scaled(total, examples) == expected


def test_scaled_resolution_keeps_the_ratio():
    assert rule.scaled_resolution(128) == (160, 128)
    assert rule.scaled_resolution(32) == (40, 32)


@pytest.mark.parametrize(
    "recipe, examples, expected",
    [
        ("BiT-S", 1_281_167, (28_151, 5000, (9384, 18_767, 25_023))),
        ("BiT-M", 14_200_000, (312_012, 5000, (104_004, 208_008, 277_344))),
        ("BiT-L", 300_000_000, (2_929_688, 5000, (732_422, 1_684_570, 2_197_266, 2_709_961))),
    ],
)
def test_pretraining_at_the_published_size(recipe, examples, expected):
    assert rule.pretrain_schedule(recipe, examples, 4096) == expected


def test_pretraining_scaled():
    total, warmup, decays = rule.pretrain_schedule("BiT-S", 50_000, 128, total=900)
    assert (total, warmup, decays) == (900, 160, (300, 600, 800))


def test_pretraining_learning_rate_at_the_published_batch():
    assert rule.pretrain_base_lr(4096) == pytest.approx(0.48, rel=1e-12)
    assert rule.pretrain_base_lr(256) == 0.03


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rule.resolution(32, 32, "code"), "variant is 'code'; it may be one of paper, rel"),
        (lambda: rule.boundaries(1, "v2"), "variant is 'v2'"),
        (lambda: rule.resolution(0, 32), "image size is 0x32 px; both sides must be at least 1"),
        (lambda: rule.steps(0), "num_examples is 0; it must be at least 1"),
        (lambda: rule.pretrain_schedule("BiT-X", 1, 1), "recipe is 'BiT-X'; it may be one of BiT-"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
