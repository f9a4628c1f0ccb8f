"""The stream of training batches and the batches of an evaluation."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
import torch

from bit.data import Augment, Split, TrainBatches, dataset, eval_batches
from bit.data.images import resize
from bit.data.threads import Clock, in_order

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, 12, 10, 3), dtype=np.uint8)
SPLIT = Split(IMAGES, np.arange(37) % 5, list("abcde"))
MIXED = Augment(resize=9, crop=7)


def stream(augment=MIXED, split=SPLIT, **options):
    return TrainBatches(split, augment, **{"batch_size": 8, "seed": 0, **options})


def pixels(batch):
    """The images of a batch before they are mixed, as bytes (B, crop, crop, 3)."""
    alone = dataclasses.replace(batch, partner=None, lam=1.0)
    ((x, _, _),) = alone.micro(len(batch.labels))
    return (x * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def assert_same(a, b):
    np.testing.assert_array_equal(pixels(a), pixels(b))
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.lam == b.lam and (a.partner is None) == (b.partner is None)
    if a.partner is not None:
        np.testing.assert_array_equal(a.partner, b.partner)


# Order


@pytest.mark.parametrize("batch_size", [1, 8, 37, 50, 100])
def test_every_epoch_visits_every_image_once(batch_size):
    batches = stream(batch_size=batch_size)
    steps = -(-4 * 37 // batch_size)
    order = np.concatenate([batches.indices(step) for step in range(steps)])
    assert len(order) == steps * batch_size
    epochs = order[: 4 * 37].reshape(4, 37)
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(37))
        np.testing.assert_array_equal(epoch, np.random.default_rng((0, number)).permutation(37))


def test_set_smaller_than_the_batch_wraps():
    batches = stream(split=SPLIT.subset([3, 4, 5]), batch_size=8)
    counts = np.bincount(batches.indices(0))
    assert counts.sum() == 8 and counts.min() == 2 and counts.max() == 3
    assert pixels(batches.batch(0)).shape == (8, 7, 7, 3)


def test_labels_go_with_their_images():
    augment = Augment(resize=10, crop=10, flip=False)
    square = Split(IMAGES[:, :10], SPLIT.labels, SPLIT.classes)
    batches = stream(augment, square)
    for step in range(10):
        batch = batches.batch(step)
        for image, label in zip(pixels(batch), batch.labels, strict=True):
            (found,) = np.flatnonzero((IMAGES[:, :10] == image).all(axis=(1, 2, 3)))
            assert SPLIT.labels[found] == label


# Augmentation


def test_crops_are_cut_from_the_resized_image():
    batches = stream(batch_size=64)
    batch, indices = batches.batch(3), batches.indices(3)
    places = set()
    for image, i in zip(pixels(batch), indices, strict=True):
        whole = resize(IMAGES[i], 9)
        candidates = {
            (top, left, flipped): whole[top : top + 7, left : left + 7][:, :: -1 if flipped else 1]
            for top, left, flipped in itertools.product(range(3), range(3), (False, True))
        }
        (place,) = [p for p, crop in candidates.items() if (crop == image).all()]
        places.add(place)
    assert {p[0] for p in places} == {p[1] for p in places} == {0, 1, 2}
    assert {p[2] for p in places} == {False, True}


def test_flip_is_half_and_can_be_off():
    gradient = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None], (8, 8, 3))
    split = Split([gradient] * 2, [0, 1], ["a", "b"])
    batches = stream(Augment(8, 8), split, batch_size=1000)
    flipped = pixels(batches.batch(0))[:, 0, 0, 0] == 7
    assert 0.45 < flipped.mean() < 0.55
    batches = stream(Augment(8, 8, flip=False), split, batch_size=1000)
    straight = pixels(batches.batch(0))
    np.testing.assert_array_equal(straight, np.broadcast_to(gradient, straight.shape))


def test_inception_crops_span_area_and_aspect():
    # Red is the row and green the column of a pixel, so a crop tells its own box.
    rows, columns = np.mgrid[0:240, 0:240].astype(np.uint8)
    coded = np.dstack([rows, columns, rows])
    split = Split([coded] * 2, [0, 1], ["a", "b"])
    augment = Augment(resize=0, crop=24, flip=False, inception=True)
    crops = pixels(stream(augment, split, batch_size=500).batch(0)).astype(float)
    # The centres of the outer pixels lie 23/24 of a side apart.
    heights = (crops[:, -1, 12, 0] - crops[:, 0, 12, 0]) * 24 / 23
    widths = (crops[:, 12, -1, 1] - crops[:, 12, 0, 1]) * 24 / 23
    areas, aspects = heights * widths / 240**2, widths / heights
    assert 0.04 < areas.min() < 0.08 and 0.9 < areas.max() < 1.02
    assert 0.70 < aspects.min() < 0.80 and 1.25 < aspects.max() < 1.40
    assert abs(np.log(aspects).mean()) < 0.03
    assert crops[:, 0, 0, 0].min() < 10 and crops[:, -1, -1, 1].max() > 229


def test_inception_takes_all_of_an_image_that_no_crop_fits():
    thin = np.zeros((2, 200, 3), np.uint8)
    thin[:, 100:] = 255
    split = Split([thin] * 2, [0, 1], ["a", "b"])
    augment = Augment(resize=0, crop=4, flip=False, inception=True)
    for image in pixels(stream(augment, split, batch_size=20).batch(0)):
        np.testing.assert_array_equal(image, resize(thin, 4))


def test_large_splits_give_the_same_batches(monkeypatch):
    resident = stream().batch(5)
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 0)
    lazy = stream(split=SPLIT.subset(np.arange(37)))
    assert not isinstance(lazy._squares, np.ndarray)
    assert_same(lazy.batch(5), resident)


# Seeds


@pytest.mark.parametrize("inception", [False, True])
def test_batch_is_a_function_of_seed_and_step(inception):
    augment = Augment(resize=9, crop=7, inception=inception)
    first, second = (stream(augment, mixup_alpha=0.2) for _ in range(2))
    later = first.batch(7)
    for step in (0, 9, 7):
        second.batch(step)
    assert_same(second.batch(7), later)
    for other in (stream(augment, mixup_alpha=0.2, seed=1).batch(7), first.batch(8)):
        assert not np.array_equal(pixels(other), pixels(later)) and other.lam != later.lam


def test_mixup_does_not_change_the_images():
    np.testing.assert_array_equal(
        pixels(stream().batch(2)), pixels(stream(mixup_alpha=0.1).batch(2))
    )


# Mixup


def test_lambda_is_beta_and_not_folded():
    batches = stream(batch_size=2, mixup_alpha=0.1)
    lams = np.array([batches.batch(step).lam for step in range(400)])
    assert 0.4 < lams.mean() < 0.6
    assert abs(lams.var() - 0.25 / 1.2) < 0.02  # 1 / (4 (2 alpha + 1))


def test_partners_are_a_permutation_of_the_whole_batch():
    batch = stream(batch_size=64, mixup_alpha=0.1).batch(0)
    assert sorted(batch.partner) == list(range(64))
    assert (batch.partner != np.arange(64)).any()
    assert stream().batch(0).partner is None and stream().batch(0).lam == 1.0


def test_micro_normalises_and_mixes_like_float64():
    batch = stream(batch_size=16, mixup_alpha=1.0).batch(0)
    exact = (pixels(batch).astype(np.float64) - 127.5) / 127.5
    exact = batch.lam * exact + (1 - batch.lam) * exact[batch.partner]
    ((x, labels_a, labels_b),) = batch.micro(16)
    assert x.dtype == torch.float32 and x.shape == (16, 3, 7, 7)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(x.numpy() - exact.transpose(0, 3, 1, 2)).max() < 3e-7
    assert labels_a.dtype == labels_b.dtype == torch.int64
    np.testing.assert_array_equal(labels_a, batch.labels)
    np.testing.assert_array_equal(labels_b, batch.labels[batch.partner])


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.5])
def test_micro_batches_do_not_depend_on_their_size(mixup_alpha):
    batch = stream(batch_size=16, mixup_alpha=mixup_alpha).batch(0)
    (whole,) = batch.micro(16)
    for size in (1, 3, 5, 16, 100):
        parts = list(batch.micro(size))
        assert [len(x) for x, _, _ in parts] == [
            min(size, 16 - start) for start in range(0, 16, size)
        ]
        for joined, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            assert torch.equal(joined, expected)


def test_without_mixup_both_labels_are_the_same():
    ((x, labels_a, labels_b),) = stream().batch(0).micro(8)
    assert torch.equal(labels_a, labels_b)
    assert -1 <= x.min() and x.max() <= 1


def test_bytes_become_minus_one_to_one():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    ((x, _),) = eval_batches(Split(images, [0], ["a"]), 16, 1)
    assert x[0, 0, 0, 0] == -1 and x[0, 2, 15, 15] == 1
    exact = (np.arange(256) - 127.5) / 127.5
    assert np.abs(x[0, 0].flatten().numpy() - exact).max() < 1.2e-7
    assert images[0, 0, 1, 0] == 1 and images.dtype == np.uint8


# Threads


@pytest.mark.parametrize("workers", [1, 3])
def test_iterate_gives_the_same_batches(workers):
    batches = stream(mixup_alpha=0.2, workers=workers)
    steps = range(3, 20)
    for step, batch in zip(steps, batches.iterate(3, 20), strict=True):
        assert_same(batch, batches.batch(step))
    assert list(batches.iterate(5, 5)) == []


def bit_threads():
    return [t for t in threading.enumerate() if t.name.startswith("bit-data")]


def test_iterate_stops_with_its_consumer():
    for _ in stream(workers=2).iterate(0, 10**9):
        break
    assert not bit_threads()
    with pytest.raises(RuntimeError, match="mine"):
        for _ in stream(workers=2).iterate(0, 10**9):
            raise RuntimeError("mine")
    assert not bit_threads()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_in_a_thread_reaches_the_consumer(workers):
    batches = stream(workers=workers)
    working = batches.batch

    def batch(step):
        if step == 4:
            raise OSError("disk gone")
        return working(step)

    batches.batch = batch
    got = []
    with pytest.raises(OSError, match="disk gone"):
        for item in batches.iterate(0, 100):
            got.append(item)
    assert len(got) == 4 and not bit_threads()


def test_look_ahead_is_bounded():
    begun = []
    items = in_order(lambda i: begun.append(i) or i, itertools.count(), workers=2)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(begun) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(begun) == 4  # the first, and workers + 1 ahead
    items.close()
    assert not bit_threads()


def test_clock_counts_what_its_consumer_waits():
    def slow():
        for _ in range(3):
            time.sleep(0.02)
            yield

    clock = Clock()
    for _ in clock.timed(slow()):
        time.sleep(0.05)  # the consumer's own work is not counted
    assert 0.06 <= clock.lap() < 0.15
    assert clock.lap() == 0


# Evaluation


@pytest.mark.parametrize("workers", [1, 2])
def test_eval_batches_are_all_images_in_order(workers):
    batches = list(eval_batches(SPLIT, 8, 10, workers))
    assert [len(x) for x, _ in batches] == [10, 10, 10, 7]
    x, labels = map(torch.cat, zip(*batches, strict=True))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(labels, SPLIT.labels)
    expected = (np.stack([resize(image, 8) for image in IMAGES]) - 127.5) / 127.5
    assert np.abs(x.numpy() - expected.transpose(0, 3, 1, 2)).max() < 1.2e-7


def test_eval_batches_stop_with_their_consumer():
    for _ in eval_batches(SPLIT, 8, 1):
        break
    assert not bit_threads()


# Bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1"),
        ({"workers": 0}, "workers is 0"),
        ({"split": SPLIT.subset([])}, "split has no images"),
    ],
)
def test_bad_stream(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


def test_bad_sizes():
    with pytest.raises(ValueError, match="crop is 0 px"):
        Augment(resize=8, crop=0)
    with pytest.raises(ValueError, match="resize is 8 px; it must be at least crop, 9"):
        Augment(resize=8, crop=9)
    with pytest.raises(ValueError, match="size is 0"):
        next(stream().batch(0).micro(0))
    with pytest.raises(ValueError, match="size is 0 and batch_size 4"):
        next(eval_batches(SPLIT, 0, 4))
