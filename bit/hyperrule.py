"""The BiT-HyperRule and the paper's pre-training schedules, as pure functions that import nothing.

The paper is "Big Transfer (BiT)", arXiv 1912.11370: section 3.3 for the HyperRule, 3.1 and 3.2 for
pre-training. Where its released code (bit_hyperrule.py) differs, `variant` chooses:

                          variant="paper"             variant="released"
    96x96 px or larger    448 -> 384;                 512 -> 480
                          512 -> 480 for R152x4
    500-step decays       150, 300, 450               200, 300, 400

The paper does not describe its fine-tuning warm-up; both variants take the released code's.
Steps are updates, counted from 0. Sizes are pixels. `num_examples` is the number of training
images actually used, so a few-shot subset counts as its own size.
"""

VARIANTS = ("paper", "released")
BASE_LR = 0.003
MOMENTUM = 0.9
BATCH = 512

SMALL_IMAGE_AREA = 96 * 96  # px; an image of exactly this area is already a large one
SMALL_TASK, MEDIUM_TASK = 20_000, 500_000  # examples; the first counts beyond small and medium

# recipe: (epochs, epochs after which the learning rate is divided by 10)
PRETRAINING = {
    "BiT-S": (90, (30, 60, 80)),
    "BiT-M": (90, (30, 60, 80)),
    "BiT-L": (40, (10, 23, 30, 37)),
}
PRETRAIN_CROP = 224  # px
PRETRAIN_WARMUP = 5000  # updates
PRETRAIN_WARMUP_SHARE = 5000 / 28_151  # of the shortest published run, BiT-S at batch 4096
PRETRAIN_WEIGHT_DECAY = 1e-4


def task_size(num_examples: int) -> str:
    """Return "small" (< 20,000 examples), "medium" (< 500,000) or "large"."""
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
    if num_examples < SMALL_TASK:
        return "small"
    return "medium" if num_examples < MEDIUM_TASK else "large"


def resolution(
    height: int, width: int, variant: str = "paper", model: str = "R50x1"
) -> tuple[int, int]:
    """Return (resize, crop): the square an image is resized to, and the square cut from it, px.

    `height` and `width` are the raw images' size. Evaluation resizes to `crop` and cuts nothing.
    """
    _check_variant(variant)
    if height < 1 or width < 1:
        raise ValueError(f"image size is {height}x{width} px; both sides must be at least 1")
    if height * width < SMALL_IMAGE_AREA:
        return 160, 128
    if variant == "released" or model == "R152x4":
        return 512, 480
    return 448, 384


def steps(num_examples: int) -> int:
    """Return the number of updates: 500 (small task), 10,000 (medium) or 20,000 (large)."""
    return {"small": 500, "medium": 10_000, "large": 20_000}[task_size(num_examples)]


def warmup(num_examples: int) -> int:
    """Return the updates of linear warm-up: 100 for a small task, else 500 (released code)."""
    return 100 if task_size(num_examples) == "small" else 500


def boundaries(num_examples: int, variant: str = "paper") -> tuple[int, ...]:
    """Return the updates after which the learning rate is divided by 10, ascending."""
    _check_variant(variant)
    if variant == "released" and task_size(num_examples) == "small":
        return (200, 300, 400)
    return _decays(steps(num_examples))


def mixup_alpha(num_examples: int) -> float:
    """Return alpha of mixup's Beta(alpha, alpha): 0 (no mixup) for a small task, else 0.1."""
    return 0.0 if task_size(num_examples) == "small" else 0.1


def scaled(total: int, num_examples: int) -> tuple[int, tuple[int, ...]]:
    """Return (warmup, boundaries) of the rule's schedule squeezed into `total` updates.

    Our departure, for machines on which the rule's own length is out of reach: decays stay at
    30, 60 and 90 %, warm-up keeps its share of the run, 20 % for a small task, 5 % for a medium
    one and 2.5 % for a large one.
    """
    share = warmup(num_examples) / steps(num_examples)
    return round(total * share), _decays(total)


def scaled_resolution(crop: int) -> tuple[int, int]:
    """Return (resize, crop) for a smaller `crop`, px, in the ratio of the rule's 160 to 128.

    Our departure, for machines on which the rule's own resolution is out of reach.
    """
    return round(crop * 160 / 128), crop


def learning_rate(
    step: int, base_lr: float, total: int, warmup: int, boundaries: tuple[int, ...]
) -> float:
    """Return the learning rate of update `step`, 0 <= step < total.

    Linear warm-up base_lr * step / warmup while step < warmup, so the first update has rate 0;
    then base_lr, divided by 10 once for every boundary B < step (strictly: update B itself still
    has the old rate).
    """
    if not 0 <= step < total:
        raise ValueError(f"step is {step}; a run of {total} updates has steps 0 to {total - 1}")
    if step < warmup:
        return base_lr * step / warmup
    for boundary in boundaries:
        if boundary < step:
            base_lr /= 10
    return base_lr


def pretrain_base_lr(batch: int) -> float:
    """Return the pre-training learning rate for a batch of `batch` images: 0.03 * batch / 256."""
    return 0.03 * batch / 256


def pretrain_schedule(
    recipe: str, num_examples: int, batch: int, total: int | None = None
) -> tuple[int, int, tuple[int, ...]]:
    """Return (total, warmup, boundaries), in updates, of a pre-training recipe.

    `recipe` is "BiT-S", "BiT-M" or "BiT-L". The length is the recipe's epochs over `num_examples`
    images unless `total` gives another; the decays keep their share of it. Warm-up is 5000 updates,
    but at most the share it has in BiT-S (16 of 90 epochs): the second is our departure, for runs
    that are shorter than any published one.
    """
    if recipe not in PRETRAINING:
        raise ValueError(f"recipe is {recipe!r}; it may be one of {', '.join(PRETRAINING)}")
    epochs, decays = PRETRAINING[recipe]
    length = epochs * num_examples / batch if total is None else total
    warmup = min(PRETRAIN_WARMUP, round(length * PRETRAIN_WARMUP_SHARE))
    return round(length), warmup, tuple(round(length * epoch / epochs) for epoch in decays)


def _decays(total: int) -> tuple[int, ...]:
    return tuple(round(total * percent / 100) for percent in (30, 60, 90))


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it may be one of {', '.join(VARIANTS)}")
