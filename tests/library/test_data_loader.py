"""Mixup as a collate_fn, and the loss of mixed labels."""

import pickle

import numpy as np
import pytest
import torch
from checking import DEVICE
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from bit_kernels.data import Indexed, Mixup, mixup_cross_entropy
from bit_kernels.functional import mixup

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (22, 10, 12, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 22)


class Pairs(Dataset):
    """At the top of a module, so that a spawned worker can import it."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return IMAGES[i], int(LABELS[i])


def copies(loader):
    """Whole epochs outlive the ring of buffers only as copies."""
    return [(x.clone(), [t.clone() for t in targets]) for x, targets in loader]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (x, targets), (y, others) in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(a, b) for a, b in zip(targets, others, strict=True))


def differ(ours, theirs):
    return not any(torch.equal(x, y) for (x, _), (y, _) in zip(ours, theirs, strict=True))


def loader(mix, dataset, workers=0, seed=3, **options):
    # A generator of its own: how often the loader asks its generator depends on the workers.
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, 4, sampler=sampler, num_workers=workers, collate_fn=mix, **options)


# What a batch is


@pytest.mark.parametrize("kind", ["arrays", "tensors", "whole", "whole_tensor"])
def test_kinds_of_batches(kind):
    images, labels = IMAGES[:6], LABELS[:6]
    batch = {
        "arrays": list(zip(images, labels, strict=True)),
        "tensors": list(zip(torch.from_numpy(images), torch.from_numpy(labels), strict=True)),
        "whole": (images, labels),
        "whole_tensor": (torch.from_numpy(images), torch.from_numpy(labels)),
    }[kind]
    x, (a, b, lam) = Mixup(crop=(8, 9), dtype=torch.bfloat16, seed=1)(batch)
    expected, targets = Mixup(crop=(8, 9), dtype=torch.bfloat16, seed=1)((images, labels))
    assert torch.equal(x, expected) and torch.equal(lam, targets[2])
    assert x.shape == (6, 3, 8, 9) and x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert a.dtype == b.dtype == torch.int64 and lam.dtype == torch.float32 and lam.shape == (6,)
    np.testing.assert_array_equal(a, labels)


def test_labels_are_those_of_the_mixed_images():
    """Image i is flat and as bright as its label, so the mix tells both labels and the weight."""
    labels = np.arange(8)
    flat = np.broadcast_to((20 * labels).astype(np.uint8)[:, None, None, None], (8, 6, 6, 3))
    for mode in ("batch", "pair", "sample"):
        for partner in ("permutation", "flip", "roll"):
            if (mode, partner) == ("pair", "roll"):
                continue
            mix = Mixup(1.0, mode=mode, partner=partner, mean=0.0, std=1 / 255)
            x, (a, b, lam) = mix((flat, labels))
            torch.testing.assert_close(x[:, 0, 3, 3], 20 * (lam * a + (1 - lam) * b))
            assert (a != b).any()
            if partner == "flip":
                assert torch.equal(b, 7 - a)
            if partner == "roll":
                assert torch.equal(b, a.roll(1))
            if mode == "batch":
                assert (lam == lam[0]).all()
            if mode == "pair":
                assert torch.equal(b[b], a) and torch.equal(lam[b], lam)
            if mode != "batch":
                assert lam.unique().numel() >= 4


def test_an_odd_image_out_is_left_alone():
    _, (a, b, _) = Mixup(1.0, mode="pair")((IMAGES[:7], np.arange(7)))
    assert torch.equal(b[b], a) and (a == b).sum() == 1


def test_lambda_is_beta_and_not_folded():
    mix = Mixup(0.1, mode="sample")
    lam = torch.cat([mix((IMAGES, LABELS))[1][2].clone() for _ in range(100)])
    assert 0.45 < lam.mean() < 0.55
    assert abs(lam.var() - 0.25 / 1.2) < 0.02  # 1 / (4 (2 alpha + 1))


def test_crops_and_flips_are_uniform():
    rows, columns = np.mgrid[0:10, 0:12].astype(np.uint8)
    coded = np.broadcast_to(np.dstack([rows, columns, rows]), (500, 10, 12, 3))
    mix = Mixup(0, crop=8, mean=0.0, std=1 / 255)
    x, (a, b, lam) = mix((coded, np.zeros(500, np.int64)))
    assert torch.equal(a, b) and (lam == 1).all()
    tops, lefts = x[:, 0, 0, 0].round().long(), x[:, 1].amin((1, 2)).round().long()
    flipped = (x[:, 1, 0, 0] > x[:, 1, 0, 7]).double().mean()
    assert torch.bincount(tops).min() > 500 / 3 * 0.75 and tops.max() == 2
    assert torch.bincount(lefts).min() > 500 / 5 * 0.7 and lefts.max() == 4
    assert 0.42 < flipped < 0.58


def test_eval_is_the_middle_of_each_image():
    mix = Mixup(crop=8).eval()
    x, (a, b, lam) = mix((IMAGES, LABELS))
    assert torch.equal(x, mixup(IMAGES, crop=(8, 8))) and torch.equal(a, b) and (lam == 1).all()
    assert not torch.equal(x, mix.train()((IMAGES, LABELS))[0])


# Seeds


@pytest.mark.parametrize(
    "dataset, context, persistent",
    [
        (Pairs(), "fork", False),
        (Pairs(), "fork", True),
        (Indexed(Pairs()), "fork", False),
        (Indexed(Pairs()), "fork", True),
        (Indexed(Pairs()), "spawn", True),  # once: each worker imports torch anew
    ],
    ids=["pairs", "pairs-persistent", "indexed", "indexed-persistent", "spawn"],
)
def test_the_number_of_workers_does_not_show(dataset, context, persistent):
    epochs = {}
    for workers in (0, 2):
        options = {"multiprocessing_context": context, "persistent_workers": persistent}
        mix = Mixup(crop=7, mode="sample", seed=5)
        batches = loader(mix, dataset, workers, **(options if workers else {}))
        for epoch in (0, 1):
            mix.set_epoch(epoch)
            epochs[workers, epoch] = copies(batches)
    for epoch in (0, 1):
        assert_same(epochs[0, epoch], epochs[2, epoch])
    assert differ(epochs[0, 0], epochs[0, 1])


@pytest.mark.parametrize("dataset", [Pairs(), Indexed(Pairs())], ids=["pairs", "indexed"])
def test_an_epoch_repeats_itself(dataset):
    mix, first = Mixup(crop=7, seed=5), {}
    for epoch in (4, 2, 4):
        mix.set_epoch(epoch)
        batches = copies(loader(mix, dataset))
        assert_same(batches, first.setdefault(epoch, batches))
    other = Mixup(crop=7, seed=6)
    other.set_epoch(4)
    assert differ(copies(loader(other, dataset)), first[4])


def test_an_indexed_sample_is_cut_alike_in_any_batch():
    mix = Mixup(0, crop=7)
    samples = [(IMAGES[i], int(LABELS[i]), i) for i in range(10)]
    whole = mix(samples)[0].clone()
    assert torch.equal(mix(samples[3:5])[0], whole[3:5])
    assert torch.equal(mix(samples[::-1])[0], whole.flip(0))
    indices = np.arange(10)
    assert torch.equal(mix((IMAGES[:10], LABELS[:10], indices))[0], whole)


def test_a_copy_goes_on_as_the_original():
    mix = Mixup(crop=7, seed=2)
    mix.set_epoch(3)
    copy = pickle.loads(pickle.dumps(mix))
    assert_same([mix((IMAGES, LABELS))], [copy((IMAGES, LABELS))])


# Memory


def test_buffers_are_taken_in_turn():
    mix = Mixup(crop=7, slots=3)
    batches = [mix((IMAGES, LABELS))[0] for _ in range(7)]
    places = [x.data_ptr() for x in batches]
    assert places[:3] == places[3:6] and places[6] == places[0] and len(set(places)) == 3
    kept = batches[6].clone()
    smaller, _ = mix((IMAGES[:5], LABELS[:5]))
    assert smaller.shape == (5, 3, 7, 7) and smaller.data_ptr() == places[1]
    mix((IMAGES, LABELS))
    assert torch.equal(batches[6], kept)  # until its turn comes
    mix((IMAGES, LABELS))
    assert not torch.equal(batches[6], kept)


def test_no_buffers():
    mix = Mixup(crop=7, slots=0)
    batches = [mix((IMAGES, LABELS))[0] for _ in range(5)]
    assert len({x.data_ptr() for x in batches}) == 5


def test_a_workers_batch_stays_valid_as_long_as_promised():
    """With the default prefetch_factor of 2, a batch must last until the next one is asked for."""
    mix = Mixup(crop=7)
    alone = copies(loader(mix, Indexed(Pairs())))
    for (x, _), (expected, _) in zip(loader(mix, Indexed(Pairs()), 1), alone, strict=True):
        assert x.is_shared() and torch.equal(x, expected)


# On a GPU

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs DEVICE=cuda")


@on_gpu
@pytest.mark.parametrize("place", ["resident", "pinned", "pageable"])
@pytest.mark.parametrize("mode", ["batch", "pair"])
def test_a_loader_without_workers_makes_the_same_batches_on_a_gpu(mode, place):
    images, labels = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    there = {"resident": images.to(DEVICE), "pinned": images.pin_memory(), "pageable": images}
    options = {"crop": 7, "mode": mode, "alpha": 1.0, "seed": 5}
    expected = copies(loader(Mixup(**options), Indexed(TensorDataset(images, labels))))
    mix = Mixup(**options, device=None if place == "resident" else DEVICE)
    found = list(loader(mix, Indexed(TensorDataset(there[place], labels))))  # no buffers in turn
    assert len(found) == len(expected)
    for (x, targets), (y, others) in zip(found, expected, strict=True):
        assert all(t.device.type == "cuda" for t in (x, *targets))
        torch.testing.assert_close(x.cpu(), y, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(targets, others, strict=True))


@on_gpu
def test_nothing_waits_for_the_gpu():
    images, labels = (torch.from_numpy(x).to(DEVICE) for x in (IMAGES, LABELS))
    mix = Mixup(1.0, crop=7, seed=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, (a, b, lam) = mix((images, labels, np.arange(22)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    y, (c, d, weight) = Mixup(1.0, crop=7, seed=1)((IMAGES, LABELS, np.arange(22)))
    torch.testing.assert_close(x.cpu(), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(a.cpu(), c) and torch.equal(b.cpu(), d) and torch.equal(lam.cpu(), weight)


@on_gpu
def test_indices_stay_on_the_host():
    with pytest.raises(ValueError, match="indices are on cuda:0; they must be on the CPU"):
        Mixup()((IMAGES, LABELS, torch.arange(22, device=DEVICE)))


def test_workers_leave_the_gpu_alone():
    batches = loader(Mixup(device="cuda"), Pairs(), 1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="make a batch on cuda in a worker process"):
        next(iter(batches))


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, and PyTorch finds no GPU here"):
        Mixup(device="cuda")((IMAGES, LABELS))


# Loss


def dense(logits, targets, loss, label_smoothing=0.0):
    a, b, lam = targets
    classes = logits.shape[1]
    lam = torch.as_tensor(lam, dtype=logits.dtype).reshape(-1, 1)
    target = lam * F.one_hot(a, classes) + (1 - lam) * F.one_hot(b, classes)
    target = (1 - label_smoothing) * target + label_smoothing / classes
    if loss == "softmax":
        return F.cross_entropy(logits, target, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)


def example(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 5, generator=random, dtype=torch.float64)
    a, b = torch.randint(5, (2, 6), generator=random)
    b[0] = a[0]
    lam = torch.rand(6, generator=random)
    lam[1], lam[2] = 0.0, 1.0
    return logits.to(dtype).requires_grad_(), (a, b, lam)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_loss_is_that_of_the_dense_target(loss, label_smoothing, reduction):
    logits, targets = example()
    options = {"loss": loss, "label_smoothing": label_smoothing}
    for lam in (targets[2], 0.3, 1.0, torch.tensor(0.25)):
        mixed = (*targets[:2], lam)
        expected = dense(logits, mixed, **options)
        expected = expected if reduction == "none" else getattr(expected, reduction)()
        ours = mixup_cross_entropy(logits, mixed, reduction=reduction, **options)
        torch.testing.assert_close(ours, expected)
        (mine,) = torch.autograd.grad(ours.sum(), logits)
        (theirs,) = torch.autograd.grad(expected.sum(), logits)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradients(loss):
    logits, targets = example()
    function = lambda z: mixup_cross_entropy(z, targets, loss=loss, label_smoothing=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_half_logits_are_computed_in_float32(loss, dtype):
    logits, targets = example(dtype)
    ours = mixup_cross_entropy(logits, targets, loss=loss)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, mixup_cross_entropy(logits.float(), targets, loss=loss))
    (gradient,) = torch.autograd.grad(ours, logits)
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_large_logits():
    targets = torch.tensor([0]), torch.tensor([1]), 0.5
    logits = torch.tensor([[3e4, 3e4 - 1, -3e4]])
    assert mixup_cross_entropy(logits, targets).item() == pytest.approx(0.8132617, rel=1e-5)
    assert mixup_cross_entropy(-logits, targets, loss="sigmoid").item() == pytest.approx(59999.5)


# Bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "elem"}, "mode is 'elem'; it may be one of"),
        ({"partner": "random"}, "partner is 'random'"),
        ({"mode": "pair", "partner": "roll"}, "partner is 'roll'; in mode 'pair'"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"slots": -1}, "slots -1"),
    ],
)
def test_bad_mixup(options, message):
    with pytest.raises(ValueError, match=message):
        Mixup(**options)


@pytest.mark.parametrize(
    "batch, message",
    [
        ([], "batch is empty"),
        ([(IMAGES[0],)], "samples have 1 parts"),
        ([(IMAGES[0], 1, 2, 3)], "samples have 4 parts"),
        ([(IMAGES[0], 0.5)], "labels are torch.float"),
        ((IMAGES, LABELS[:3]), r"labels are torch.int64 \(3,\); with 22 images"),
        ([(IMAGES[0, 0], 1)], r"images must be \(H, W, C\) each"),
        ([(IMAGES[0] / 255, 1)], "images are float64"),
        ([(IMAGES[0], 1), (IMAGES[0, :5], 1)], r"crop is \(9, 9\); an image is \(5, 12\)"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_batch(batch, message, training):
    with pytest.raises(ValueError, match=message):
        Mixup(crop=9).train(training)(batch)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.tensor([0, 5])}, "a runs from 0 to 5; with 5 classes it must lie in 0..4"),
        ({"b": torch.tensor([-1, 0])}, "b runs from -1 to 0"),
        ({"a": torch.tensor([0])}, r"a is torch.int64 \(1,\)"),
        ({"b": torch.tensor([0.0, 1.0])}, "b is torch.float32"),
        ({"lam": torch.ones(3)}, r"lam has shape \(3,\); it may be \(\) or \(2,\)"),
        ({"logits": torch.zeros(2)}, r"logits are torch.float32 \(2,\)"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "logits are torch.int64"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"loss": "hinge"}, "loss is 'hinge'; it may be one of"),
    ],
)
def test_bad_loss(change, message, loss):
    good = {
        "logits": torch.zeros(2, 5),
        "a": torch.tensor([0, 4]),
        "b": torch.tensor([1, 2]),
        "lam": 0.5,
        "loss": loss,
        "label_smoothing": 0.0,
        "reduction": "mean",
    } | change
    targets = good.pop("a"), good.pop("b"), good.pop("lam")
    with pytest.raises(ValueError, match=message):
        mixup_cross_entropy(good.pop("logits"), targets, **good)
