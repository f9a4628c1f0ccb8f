"""Folders and archives of images: layouts, corrupt files, and what can be wrong with them."""

import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bit.data
from bit.data import folder

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def png(value, size=(3, 2)):
    """A PNG of one grey value: its content tells which file it was."""
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, files):
    for name, content in files.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def values(split):
    """[(value, class name)] of a split whose images are flat."""
    return [
        (int(split.image(i)[0, 0, 0]), split.classes[label]) for i, label in enumerate(split.labels)
    ]


SPLIT_FILES = {
    "train/dog/a.png": png(10),
    "train/dog/b.PNG": png(11),
    "train/cat/deeper/a.png": png(20),
    "test/cat/a.png": png(21),
    "test/dog/a.png": png(12),
}
TRAIN, TEST = [(20, "cat"), (10, "dog"), (11, "dog")], [(21, "cat"), (12, "dog")]
ONE_FOLDER = {f"{c}/{i}.png": png(10 * k + i) for k, c in enumerate("abc") for i in range(10)}


# Folders


@pytest.mark.parametrize("test_name", ["test", "val", "validation", "Test"])
def test_folder_with_its_own_split(tmp_path, test_name):
    files = {name.replace("test/", f"{test_name}/"): data for name, data in SPLIT_FILES.items()}
    data = bit.data.load(write(tmp_path / "pets", files))
    assert data.name == "pets" and data.classes == ["cat", "dog"] and data.native_size == 2
    assert values(data.train) == TRAIN and values(data.test) == TEST


def test_one_folder_is_split_by_seed_and_class(tmp_path):
    write(tmp_path, ONE_FOLDER)
    data = bit.data.load(tmp_path, test_fraction=0.3, seed=1)
    assert data.train.counts().tolist() == [7, 7, 7] and data.test.counts().tolist() == [3, 3, 3]
    assert sorted(values(data.train) + values(data.test)) == sorted(
        (10 * k + i, c) for k, c in enumerate("abc") for i in range(10)
    )
    assert values(bit.data.load(tmp_path, test_fraction=0.3, seed=1).test) == values(data.test)
    assert values(bit.data.load(tmp_path, test_fraction=0.3, seed=2).test) != values(data.test)


def test_train_folder_alone_is_split(tmp_path):
    write(tmp_path, {f"train/{name}": data for name, data in ONE_FOLDER.items()})
    assert len(bit.data.load(tmp_path).test) == 6


def test_flat_test_folder_is_passed_over(tmp_path):
    files = {**SPLIT_FILES, "val/cat/a.png": png(30), "val/dog/a.png": png(31)}
    files = {
        name.replace("test/cat/", "test/").replace("test/dog/", "test/"): data
        for name, data in files.items()
    }
    with pytest.warns(UserWarning, match="test has no class folders"):
        data = bit.data.load(write(tmp_path, files))
    assert values(data.test) == [(30, "cat"), (31, "dog")]


def test_hidden_and_foreign_files(tmp_path):
    hidden = {
        ".git/a.png": b"x",
        "__MACOSX/train/dog/._a.png": b"x",
        "train/.ipynb_checkpoints/a.png": b"x",
        "train/dog/._a.png": b"x",
        "train/dog/Thumbs.db": b"x",
        "README.md": b"x",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(bit.data.load(write(tmp_path, {**SPLIT_FILES, **hidden})).train) == TRAIN
    write(tmp_path, {"train/dog/labels.csv": b"x", "train/loose.png": png(1)})
    with pytest.warns(UserWarning, match="2 files .*: train/dog/labels.csv; train/loose.png"):
        assert values(bit.data.load(tmp_path).train) == TRAIN


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "real", SPLIT_FILES)
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "test").symlink_to(tmp_path / "real" / "test")
    for name in ("cat", "dog"):
        (tmp_path / "set" / "train" / name).symlink_to(tmp_path / "real" / "train" / name)
    (tmp_path / "real" / "train" / "dog" / "loop").symlink_to(tmp_path / "real" / "train")
    data = bit.data.load(tmp_path / "set")
    assert data.train.counts().tolist()[0] == 1 and values(data.test) == TEST


# Archives


def write_tar(path, files, mode, lead=""):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(lead + name)
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, files, lead=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            if content is None:
                archive.writestr(f"{lead}{name}/", b"")
            else:
                archive.writestr(lead + name, content)
    return path


@pytest.mark.parametrize("lead", ["", "./", "pets/", "outer/pets/"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"])
def test_archives(tmp_path, suffix, lead):
    path = tmp_path / f"my.pets{suffix}"
    if suffix == ".zip":
        write_zip(path, SPLIT_FILES, lead)
    else:
        mode = "w:" + {".tar": "", ".tgz": "gz"}.get(suffix, suffix.rpartition(".")[2])
        write_tar(path, SPLIT_FILES, mode, lead)
    data = bit.data.load(path)
    assert data.name == "my.pets"
    assert values(data.train) == TRAIN and values(data.test) == TEST


def test_archives_write_nothing_and_links_in_them_lead_nowhere(tmp_path):
    path = write_tar(tmp_path / "a.tar", {**SPLIT_FILES, "../evil/x.png": png(1)}, "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/dog/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    assert values(bit.data.load(path).train) == TRAIN
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_truncated_archives(tmp_path, suffix):
    noise = np.random.default_rng(0).bytes(20_000)
    files = {**SPLIT_FILES, "test/dog/noise.png": noise}
    path = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        write_zip(path, files)
    else:
        write_tar(path, files, "w:" + suffix.removeprefix(".tar").removeprefix("."))
    path.write_bytes(path.read_bytes()[:-15_000])
    with pytest.raises(ValueError, match="archive that is whole"):
        bit.data.load(path)


def test_not_an_archive(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="notes.txt must be a folder, or a tar or zip"):
        bit.data.load(path)


# Corrupt images

CORRUPT = {**SPLIT_FILES, "train/dog/c.png": png(1)[:40], "test/cat/b.jpg": b"nothing"}


def test_corrupt_images_are_left_out_and_counted(tmp_path):
    with pytest.warns(UserWarning, match="left out: 2 of 7 .*train/dog/c.png: .*test/cat/b.jpg: "):
        data = bit.data.load(write(tmp_path, CORRUPT))
    assert values(data.train) == TRAIN and values(data.test) == TEST
    assert [line.split(":")[0] for line in data.corrupt] == ["train/dog/c.png", "test/cat/b.jpg"]


def test_only_the_first_corrupt_images_are_named(tmp_path):
    write(tmp_path, {**SPLIT_FILES, **{f"train/dog/x{i}.png": b"" for i in range(8)}})
    with pytest.warns(UserWarning, match="8 of 13 .*x4.png: [^;]*; and 3 more"):
        bit.data.load(tmp_path)


def test_corrupt_images_are_an_error_if_strict(tmp_path):
    with pytest.raises(ValueError, match="2 of 7 images .* are corrupt: train/dog/c.png: "):
        bit.data.load(write(tmp_path, CORRUPT), strict=True)


def test_class_with_corrupt_images_only(tmp_path):
    write(tmp_path, {**SPLIT_FILES, "train/cat/deeper/a.png": b""})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'cat' has no readable image"):
        bit.data.load(tmp_path)


def test_large_sets_are_decoded_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "DECODED_BYTES", 80)
    write(tmp_path, CORRUPT)
    data = bit.data.load(tmp_path)
    assert data.corrupt == () and data.train.counts().tolist() == [1, 3]
    assert values(data.train.subset([0, 1, 2])) == TRAIN
    with pytest.warns(UserWarning, match="replaced by another image of its class: train/dog/c.png"):
        assert data.train.image(3)[0, 0, 0] == 10
    with pytest.raises(ValueError, match="train/dog/c.png"):
        data.train.subset([0, 3]).image(1)  # no other dog to take its place
    with pytest.raises(ValueError, match="train/dog/c.png"):
        bit.data.load(tmp_path, strict=True).train.image(3)


def test_small_sets_are_decoded_once(tmp_path, monkeypatch):
    calls, decode = [], folder.decode
    monkeypatch.setattr(folder, "decode", lambda source: calls.append(source) or decode(source))
    data = bit.data.load(write(tmp_path, SPLIT_FILES))
    data.train.squares(4), data.train.squares(8), data.test.squares(4)
    assert len(calls) == len(SPLIT_FILES)


# What a folder can have wrong


@pytest.mark.parametrize(
    "files, message",
    [
        ({"notes.txt": b"x"}, "0 class folders"),
        ({"a.png": png(1), "b.png": png(2)}, r"0 class folders \[\] and 2 images outside"),
        ({"cat/a.png": png(1)}, r"1 class folders \['cat'\]"),
        ({"train/cat/a.png": png(1), "test/cat/a.png": png(1)}, r"1 class folders \['cat'\]"),
        ({**SPLIT_FILES, "train/emu": None, "test/emu": None}, "images in train/emu, test/emu"),
        ({**ONE_FOLDER, "d/readme.txt": b"x"}, "has no images in d; every class needs some"),
        ({**SPLIT_FILES, "test/emu/a.png": png(1)}, r"in train: \[\], only in test: \['emu'\]"),
        ({**SPLIT_FILES, "train/emu/a.png": png(1)}, r"in train: \['emu'\], only in test: \[\]"),
        ({"test/cat/a.png": png(1), "other/cat/a.png": png(1)}, "has test, but no train"),
        ({"a/1.png": png(1), "b/1.png": png(1), "b/2.png": png(1)}, "'a' has 1 image"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        bit.data.load(write(tmp_path, files))
    archive = tmp_path.parent / f"{tmp_path.name}.tar"
    with pytest.raises(ValueError, match=message):
        bit.data.load(write_tar(archive, files, "w"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_real_archives():
    cells = bit.data.load(REAL / "blood-cells.tar.xz", strict=True)
    assert cells.classes == ["platelets", "rbc", "wbc"] and cells.native_size == 64
    assert len(cells.train) == 3659 and len(cells.test) == 1227
    omniglot = bit.data.load(REAL / "omniglot-alphabets.tar.xz", strict=True)  # 1 bit
    assert len(omniglot.train) == 3388 and len(omniglot.test) == 1452
    assert len(omniglot.classes) == 8 and omniglot.native_size == 105
    assert np.unique(omniglot.train.image(0)).tolist() == [0, 255]
