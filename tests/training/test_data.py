"""Data sets by name, and the subsets cut out of them."""

import gzip
import struct

import numpy as np
import pytest

import bit.data
from bit.data import Dataset, Options, Split, dataset, fashion_mnist, few_shot, split_off


def values(split):
    """[(value, class name)] of a split whose images are flat."""
    return [
        (int(split.image(i)[0, 0, 0]), split.classes[label]) for i, label in enumerate(split.labels)
    ]


def make_split(counts, seed=0):
    """A shuffled split of 1 x 1 images with `counts[c]` of class c, image i having value i."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1)
    return Split(images, labels, [f"class{c}" for c in range(len(counts))])


# Named sets


def test_unknown_name_and_missing_path(tmp_path):
    with pytest.raises(ValueError, match="'nowhere'; it must be one of digits, fashion-mnist, "):
        bit.data.load("nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        bit.data.load("folder", root=tmp_path / "gone")
    with pytest.raises(ValueError, match="root is None"):
        bit.data.load("folder")
    with pytest.raises(ValueError, match="with root it must be one of"):
        bit.data.load(tmp_path, root=tmp_path)


def test_digits():
    data = bit.data.load("digits")
    assert data.classes == list("0123456789") and data.native_size == 8
    assert len(data.train) == 1438 and len(data.test) == 359
    assert data.test.counts().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    pixels = data.train.squares(8)
    assert pixels.shape == (1438, 8, 8, 3) and pixels.min() == 0 and pixels.max() == 255
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}
    again = bit.data.load("digits", seed=5, test_fraction=0.5)  # its split is fixed
    np.testing.assert_array_equal(again.train.squares(8), pixels)


def write_idx(root, compress, count=20):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix in "train", "t10k":
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 4, 5), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        data += array.tobytes()
        (root / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)
    return arrays


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_from_a_folder(tmp_path, compress):
    arrays = write_idx(tmp_path, compress)
    data = bit.data.load("fashion-mnist", root=tmp_path)
    assert data.classes[9] == "Ankle boot" and data.native_size == 4
    np.testing.assert_array_equal(
        data.train.image(7), np.stack([arrays["train-images-idx3-ubyte"][7]] * 3, axis=2)
    )
    np.testing.assert_array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])


def test_fashion_mnist_missing(tmp_path):
    message = "apt-get install dataset-fashion-mnist.*or give the folder"
    with pytest.raises(ValueError, match=message):
        bit.data.load("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"415 bytes; .*\(20, 4, 5\) .* 416"),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "417 bytes"),
        ("train-images-idx3-ubyte", lambda b: b[:10], "begins with"),
        ("t10k-images-idx3-ubyte", lambda b: b"\0\0\x0d\x03" + b[4:], "begins with .*00 00 0d 03"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:7] + b"\x13" + b[8:-1], "labels has shape"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x63", "labels run from 0 to 99"),
    ],
)
def test_fashion_mnist_broken(tmp_path, file, change, message):
    write_idx(tmp_path, compress=False)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        bit.data.load("fashion-mnist", root=tmp_path)


def test_fashion_mnist_truncated_gzip(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        bit.data.load("fashion-mnist", root=tmp_path)


@pytest.mark.skipif(
    not fashion_mnist.DEFAULT_ROOT.is_dir(), reason="Debian's dataset-fashion-mnist is absent"
)
def test_fashion_mnist_of_debian():
    data = bit.data.load("fashion-mnist")
    assert data.train.counts().tolist() == [6000] * 10
    assert data.test.counts().tolist() == [1000] * 10 and data.native_size == 28


def test_a_data_set_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "_LOADERS", dict(dataset._LOADERS))
    np.savez(tmp_path / "stripes.npz", images=np.arange(96).reshape(6, 4, 4), labels=[0, 1] * 3)

    @bit.data.register("stripes")
    def load_stripes(options: Options) -> Dataset:
        with np.load(options.root / "stripes.npz") as arrays:
            images = arrays["images"].astype(np.uint8)
            everything = Split(images, arrays["labels"], ["across", "along"])
        train, test = split_off(everything, options.test_fraction, options.seed)
        return Dataset("stripes", train, test)

    data = bit.data.load("stripes", root=tmp_path, test_fraction=0.4)
    assert "stripes" in bit.data.names() and data.classes == ["across", "along"]
    assert len(data.train) == 4 and data.test.image(0).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="'stripes', which another data set has"):
        bit.data.register("stripes")(load_stripes)


# Splits and subsets


def test_split_checks_its_arguments():
    images = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="labels has shape"):
        Split(images, np.zeros(3), ["a"])
    with pytest.raises(ValueError, match="labels run from 0 to 1; with 1 classes"):
        Split(images, np.array([0, 1]), ["a"])
    with pytest.raises(ValueError, match=r"image 0 is float64 \(4, 4\); it must be uint8"):
        Split(images.astype(float), np.array([0, 1]), ["a", "b"]).image(0)
    with pytest.raises(ValueError, match=r"indices run from -1 to 0"):
        make_split([2, 2]).subset([0, -1])


def test_dataset_checks_its_splits():
    with pytest.raises(ValueError, match="must be the same"):
        Dataset("x", make_split([2, 2]), make_split([2, 2, 2]))
    with pytest.raises(ValueError, match="'class1' has no readable image in the test split"):
        Dataset("x", make_split([2, 2]), make_split([2, 0]))


def test_select_classes_renumbers_and_keeps_names():
    data = Dataset("x", make_split([2, 3, 4, 5]), make_split([1, 2, 3, 4], seed=1))
    part = data.select_classes([3, 1])
    assert part.classes == ["class3", "class1"]
    assert part.train.counts().tolist() == [5, 3] and part.test.counts().tolist() == [4, 2]
    whole = dict(values(data.train))
    assert all(whole[value] == name for value, name in values(part.train))
    for wrong in ([], [1, 1], [4, 0], [-1, 0]):
        with pytest.raises(ValueError, match="indices is"):
            data.train.select_classes(wrong)
    with pytest.raises(ValueError, match="at least 2"):
        data.select_classes([2])


def test_few_shot():
    split = make_split([30, 40, 50])
    five, ten = few_shot(split, 5, seed=3), few_shot(split, 10, seed=3)
    assert five.counts().tolist() == [5, 5, 5] and ten.counts().tolist() == [10, 10, 10]
    assert set(values(five)) < set(values(ten)) < set(values(split))
    assert values(few_shot(split, 5, seed=3)) == values(five)
    assert values(few_shot(split, 5, seed=4)) != values(five)
    assert few_shot(split, 30, seed=0).counts().tolist() == [30, 30, 30]
    with pytest.raises(ValueError, match="shots is 31, but class 'class0' has 30 images"):
        few_shot(split, 31, seed=0)
    with pytest.raises(ValueError, match="shots is 0"):
        few_shot(split, 0, seed=0)


def test_split_off():
    split = make_split([2, 10, 100])
    rest, part = split_off(split, 0.25, seed=0)
    assert part.counts().tolist() == [1, 2, 25] and rest.counts().tolist() == [1, 8, 75]
    assert sorted(values(rest) + values(part)) == sorted(values(split))
    assert values(split_off(split, 0.25, seed=0)[1]) == values(part)
    assert values(split_off(split, 0.25, seed=1)[1]) != values(part)
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="fraction is"):
            split_off(split, fraction, seed=0)
    with pytest.raises(ValueError, match="'class1' has 1 image"):
        split_off(make_split([3, 1]), 0.5, seed=0)


def test_squares_are_kept_or_made_when_asked(monkeypatch):
    split = make_split([3, 3])
    kept = split.squares(4)
    assert isinstance(kept, np.ndarray) and split.squares(4) is kept
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 6 * 4 * 4 * 3)
    lazy = split.squares(4)
    assert not isinstance(lazy, np.ndarray) and len(lazy) == 6
    np.testing.assert_array_equal(np.stack([lazy[i] for i in range(6)]), kept)
