"""Weights in and out: the released layout, timm's names, our own files, and files gone wrong."""

import errno
import importlib.util
import json
import os
import resource
import stat
import struct

import numpy as np
import pytest
import timm_twin
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bit import checkpoint, models

# bytes of the released files BiT-M-<name>-ILSVRC2012.npz, from timm's documentation
RELEASED_SIZES = {
    "R50x1": 102_242_668,
    "R50x3": 869_321_580,
    "R101x1": 178_256_468,
    "R101x3": 1_551_830_100,
    "R152x2": 945_476_668,
    "R152x4": 3_746_270_104,
}


def small(num_classes=5, name="R14x0.125", seed=0, **options):
    """A network of 129 thousand weights, every one of them drawn."""
    torch.manual_seed(seed)
    model = models.create(name, num_classes, stem="small", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[k], other[k]) for k in state)


def released_arrays(mid=8, classes=5, units=1, numbered=False):
    """What a released file of width mid / 64 holds, its keys and shapes written out."""
    shapes = {"resnet/root_block/standardized_conv2d/kernel": (3, 3, 3, mid)}
    before = mid
    for block in range(1, 5):
        for unit in range(1, units + 1):
            here, out = f"resnet/block{block}/unit{unit:02d}", 4 * mid
            if unit == 1:
                shapes[f"{here}/a/proj/standardized_conv2d/kernel"] = (1, 1, before, out)
            for branch, norm, kernel in (
                ("a", before, (1, 1, before, mid)), ("b", mid, (3, 3, mid, mid)),
                ("c", mid, (1, 1, mid, out)),
            ):  # fmt: skip
                shapes[f"{here}/{branch}/group_norm/gamma"] = (norm,)
                shapes[f"{here}/{branch}/group_norm/beta"] = (norm,)
                shapes[f"{here}/{branch}/standardized_conv2d/kernel"] = kernel
            before = out
        mid *= 2
    shapes["resnet/group_norm/gamma"] = shapes["resnet/group_norm/beta"] = (before,)
    shapes["resnet/head/conv2d/kernel"] = (1, 1, before, classes)
    shapes["resnet/head/conv2d/bias"] = (classes,)
    random = np.random.default_rng(0)
    arrays = {}
    for number, (key, shape) in enumerate(sorted(shapes.items())):
        if numbered:
            key = key.replace("standardized_conv2d/", f"standardized_conv2d_{number}/")
        arrays[key] = random.standard_normal(shape, dtype=np.float32)
    return arrays


def released_size(arrays):
    """Bytes of an uncompressed .npz with its keys in order.

    An array has a record before it and one at the end, both with its name, and a header of 128.
    An array that starts beyond 2 GiB takes 12 more, and the end then 76.
    """
    size = extra = 0
    for key in sorted(arrays):
        extra += 12 * (size > 2**31 - 1)
        extra += 46 + len(f"{key}.npy")
        size += 30 + len(f"{key}.npy") + 128 + 4 * arrays[key].numel()
    return size + extra + 22 + 76 * (size > 2**31 - 1)


@pytest.mark.parametrize("name", RELEASED_SIZES)
def test_keys_add_up_to_the_released_files(name):
    views = checkpoint.views(models.create(name, 1000, device="meta"), "npz")
    assert released_size(views) == RELEASED_SIZES[name]


def test_written_npz_has_that_size(tmp_path):
    model = models.create("R50x1", 1000)
    checkpoint.save(model, tmp_path / "a.npz")
    assert os.path.getsize(tmp_path / "a.npz") == RELEASED_SIZES["R50x1"]


@pytest.mark.parametrize("units, name", [(1, "R14x0.125"), (2, "R26x0.125")])
@pytest.mark.parametrize("numbered", [False, True])
def test_released_npz_is_written_back_bit_for_bit(tmp_path, units, name, numbered):
    arrays = released_arrays(units=units, numbered=numbered)
    special = np.array([0x7FC12345, 0xFFA00001, 0x80000000, 1, 0x7F800000], np.uint32)
    list(arrays.values())[0].reshape(-1)[:5] = special.view(np.float32)  # NaNs, -0, denormal, inf
    np.savez(tmp_path / "released.npz", **arrays)
    model = small(name=name)
    assert checkpoint.load(model, tmp_path / "released.npz") == {}
    checkpoint.save(model, tmp_path / "ours.npz")

    plain = released_arrays(units=units)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert ours.files == sorted(plain)
        for key, array in zip(sorted(plain), arrays.values(), strict=True):
            assert ours[key].dtype == "<f4" and ours[key].flags.c_contiguous
            assert ours[key].shape == array.shape and ours[key].tobytes() == array.tobytes()


def test_npz_axes():
    model = small()
    views = checkpoint.views(model, "npz")
    kernel = views["resnet/block2/unit01/b/standardized_conv2d/kernel"]
    conv = model.block2.unit01.conv2.weight
    assert kernel[2, 0, 7, 11] == conv[11, 7, 2, 0]
    projection = views["resnet/block2/unit01/a/proj/standardized_conv2d/kernel"]
    assert projection[0, 0, 7, 11] == model.block2.unit01.proj.weight[11, 7, 0, 0]
    assert views["resnet/head/conv2d/kernel"][0, 0, 100, 3] == model.head.weight[3, 100]
    scale = views["resnet/block2/unit01/b/group_norm/gamma"]
    assert scale[3] == model.block2.unit01.norm2.weight[3]


@pytest.mark.parametrize("how", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_reads_other_npz_files(tmp_path, how, dtype):
    arrays = {key: array.astype(dtype) for key, array in released_arrays().items()}
    how(tmp_path / "a.npz", **arrays)
    model = small()
    checkpoint.load(model, tmp_path / "a.npz")
    for key, view in checkpoint.views(model, "npz").items():
        assert np.array_equal(view.numpy(), arrays[key].astype(np.float32))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_equal_weights_give_equal_bytes(tmp_path, suffix):
    metadata = {f"key{i}": i for i in range(20)} if suffix == "safetensors" else None
    model = small()
    for name in ("a", "b"):
        checkpoint.save(model, tmp_path / f"{name}.{suffix}", metadata)
        model.to(memory_format=torch.channels_last)
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("file", ["a.npz", "a.safetensors", "A.SAFETENSORS"])
def test_round_trip(tmp_path, file, layout):
    model = small().to(memory_format=layout)
    checkpoint.save(model, tmp_path / file)
    other = small(seed=1).to(memory_format=layout)
    checkpoint.load(other, tmp_path / file)
    assert same(other.state_dict(), model.state_dict())


def test_safetensors_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"classes": ["Ä", "b"], "step": 12, "recipe": {"lr": 0.003, "mixup": None}}
    model = small()
    checkpoint.save(model, path, metadata)
    expected = {"config": model.config, **metadata}
    assert checkpoint.read_metadata(path) == expected
    assert checkpoint.load(model, path) == expected
    checkpoint.save(model, path, expected)
    with safe_open(path, framework="pt") as file:
        assert {key: json.loads(text) for key, text in file.metadata().items()} == expected
        assert file.keys() and set(file.keys()) == set(model.state_dict())
    assert same(dict(sorted(load_file(path).items())), dict(sorted(model.state_dict().items())))
    with pytest.raises(ValueError, match="metadata.'config'. is .*kept for the model's own"):
        checkpoint.save(model, path, {"config": {"name": "R50x1"}})
    with pytest.raises(ValueError, match="metadata.'bad'. is not JSON"):
        checkpoint.save(model, path, {"bad": {1, 2}})


def test_write_safetensors_takes_any_tensor(tmp_path):
    path = tmp_path / "state.safetensors"
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "slice": base[3:20:5],
        "expanded": torch.ones(1, dtype=torch.float16).expand(3, 2),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
        "bf16": base.bfloat16(),
        "int": torch.tensor([-3], dtype=torch.int32),
        "grad": torch.ones(2, requires_grad=True),
    }
    checkpoint.write_safetensors(path, tensors, {"step": 3})
    read, metadata = checkpoint.read_safetensors(path)
    assert metadata == {"step": 3} and set(read) == set(tensors)
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor)
    with pytest.raises(ValueError, match="tensors.'z'. is torch.complex64; it may be one of"):
        checkpoint.write_safetensors(path, {"z": torch.zeros(1, dtype=torch.complex64)})


def test_foreign_metadata_is_text(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "pt", "n": "3"})
    assert checkpoint.read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "n": 3}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert checkpoint.read_metadata(tmp_path / "a.safetensors") == {}


def test_dtypes(tmp_path):
    half = small(dtype=torch.bfloat16)
    checkpoint.save(half, tmp_path / "half.safetensors")
    checkpoint.save(half, tmp_path / "half.npz")
    assert load_file(tmp_path / "half.safetensors")["head.weight"].dtype == torch.bfloat16
    for file in ("half.safetensors", "half.npz"):
        wide, again = small(seed=1), small(seed=1, dtype=torch.bfloat16)
        checkpoint.load(wide, tmp_path / file)
        checkpoint.load(again, tmp_path / file)
        assert wide.head.weight.dtype == torch.float32
        assert same(snapshot(wide.bfloat16()), half.state_dict())
        assert same(again.state_dict(), half.state_dict())
    with pytest.raises(ValueError, match=r"d.npz: .*would round float64.*model.float\(\)"):
        checkpoint.save(small(dtype=torch.float64), tmp_path / "d.npz")
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("classes", [1000, 0])
def test_timm_names(tmp_path, classes):
    model = models.create("R50x1", classes)
    twin = timm_twin.create("resnetv2_50x1_bit", classes)
    path = tmp_path / "timm.safetensors"
    save_file(twin.state_dict(), path)
    checkpoint.load(model, path)
    assert torch.equal(model.block3.unit06.conv2.weight, twin.stages[2].blocks[5].conv2.weight)
    assert torch.equal(model.root.conv.weight, twin.stem.conv.weight)
    checkpoint.save(model, path, naming="timm")
    read = load_file(path)
    expected = twin.state_dict()
    assert set(read) == set(expected)
    assert all(torch.equal(read[key], expected[key]) for key in expected)
    assert checkpoint.create_from(path).num_classes == classes


def test_timm_names_without_timm(tmp_path):
    model, path = small(name="R26x0.125"), tmp_path / "timm.safetensors"
    checkpoint.save(model, path, naming="timm")
    read = load_file(path)
    assert torch.equal(
        read["stages.1.blocks.0.downsample.conv.weight"], model.block2.unit01.proj.weight
    )
    assert torch.equal(read["stages.3.blocks.1.norm3.bias"], model.block4.unit02.norm3.bias)
    assert torch.equal(read["head.fc.weight"][:, :, 0, 0], model.head.weight)
    assert {"stem.conv.weight", "norm.weight", "norm.bias", "head.fc.bias"} < set(read)
    other = models.create("R26x0.125", 5, stem="small")
    checkpoint.load(other, path)
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("file", ["a.npz", "a.safetensors"])
def test_drop_and_keep_head(tmp_path, file):
    source = small(num_classes=5)
    checkpoint.save(source, tmp_path / file)
    target = small(num_classes=3, seed=1)
    head = snapshot(target.head)
    with pytest.raises(ValueError, match="(?s)misshapen: .*head.*head='drop' would"):
        checkpoint.load(target, tmp_path / file)
    checkpoint.load(target, tmp_path / file, head="drop")
    assert same(target.head.state_dict(), head)
    body, expected = target.state_dict(), source.state_dict()
    assert all(torch.equal(body[key], expected[key]) for key in body if "head" not in key)

    headless = small(num_classes=0)
    with pytest.raises(ValueError, match="(?s)extra: .*head.*extra: .*head.*head='drop' would"):
        checkpoint.load(headless, tmp_path / file)
    checkpoint.load(headless, tmp_path / file, head="drop")
    checkpoint.save(headless, tmp_path / file)
    with pytest.raises(ValueError, match="(?s)missing: .*head.*missing: .*head.*head='drop' would"):
        checkpoint.load(target, tmp_path / file)
    checkpoint.load(target, tmp_path / file, head="drop")
    with pytest.raises(ValueError, match="head is 'lose'; it may be 'keep' or 'drop'"):
        checkpoint.load(target, tmp_path / file, head="lose")


def test_one_error_lists_everything_and_changes_nothing(tmp_path):
    arrays = released_arrays()
    del arrays["resnet/group_norm/beta"]
    del arrays["resnet/block1/unit01/c/standardized_conv2d/kernel"]
    arrays["resnet/block1/unit02/a/group_norm/gamma"] = np.ones(4, np.float32)
    arrays["resnet/block3/unit01/b/group_norm/beta"] = np.ones(4, np.float32)
    arrays["resnet/group_norm/gamma"] = np.ones(256, np.int64)
    np.savez(tmp_path / "a.npz", **arrays)
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        checkpoint.load(model, tmp_path / "a.npz")
    lines = str(raised.value).split("\n  ")
    assert lines[0] == f"{tmp_path / 'a.npz'} does not fit {model!r}"
    assert sorted(lines[1:]) == [
        "extra: resnet/block1/unit02/a/group_norm/gamma",
        "misshapen: resnet/block3/unit01/b/group_norm/beta is (4,), the model's is (32,)",
        "missing: resnet/block1/unit01/c/standardized_conv2d/kernel",
        "missing: resnet/group_norm/beta",
        "not floating point: resnet/group_norm/gamma is torch.int64",
    ]
    assert same(model.state_dict(), before)


def test_another_network_is_named(tmp_path):
    checkpoint.save(small(name="R26x0.125"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="the file says it is .*R26x0.125"):
        checkpoint.load(small(), tmp_path / "a.safetensors")


def test_create_from(tmp_path):
    path = tmp_path / "a.safetensors"
    source = small(dtype=torch.float64)
    checkpoint.save(source, path)
    model = checkpoint.create_from(path, dtype=torch.float64)
    assert model.config == source.config and same(model.state_dict(), source.state_dict())
    fresh = checkpoint.create_from(path, 9)
    assert fresh.head.weight.shape == (9, 256) and not fresh.head.weight.any()
    assert fresh.norm.weight.dtype == torch.float32
    assert torch.equal(fresh.norm.weight, source.norm.weight.float())
    checkpoint.save(source.float(), tmp_path / "a.npz")
    checkpoint.write_safetensors(path, source.state_dict())
    for silent in (path, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match="does not say which network it holds"):
            checkpoint.create_from(silent)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_damaged_files(tmp_path, suffix):
    model, path = small(), tmp_path / f"a.{suffix}"
    checkpoint.save(model, path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2 if suffix == "npz" else 3] ^= 0xFF  # safetensors has no checksum
    damaged = [whole[:n] for n in (0, 4, 100, 5_000, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[100:], b"not weights at all" * 100, bytes(flipped)]
    before = snapshot(model)
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.{suffix} is not a whole .{suffix} file"):
            checkpoint.load(model, path)
    assert same(model.state_dict(), before)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(model, tmp_path / f"none.{suffix}")


def test_refuses_objects_and_keys_given_twice(tmp_path):
    arrays = released_arrays()
    arrays["resnet/group_norm/beta"] = np.array([{}], object)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        checkpoint.load(small(), tmp_path / "a.npz")
    arrays = released_arrays()
    kernel = "resnet/block1/unit01/a/standardized_conv2d/kernel"
    arrays[kernel.replace("2d/", "2d_7/")] = arrays[kernel]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"it has {kernel} twice"):
        checkpoint.load(small(), tmp_path / "a.npz")


@pytest.mark.parametrize("file", ["a.pt", "a.PTH", "a.bin", "a.ckpt", "a.pkl"])
def test_refuses_pickles(tmp_path, file):
    torch.save(small().state_dict(), tmp_path / file)
    before = (tmp_path / file).read_bytes()
    for call in (checkpoint.load, checkpoint.save):
        with pytest.raises(ValueError, match="is a pickle by its name.*convert it once"):
            call(small(), tmp_path / file)
    assert (tmp_path / file).read_bytes() == before


def test_refuses_arguments(tmp_path):
    model = small()
    for path in ("a.h5", "a"):
        with pytest.raises(ValueError, match="it may end in .npz or .safetensors"):
            checkpoint.save(model, tmp_path / path)
    with pytest.raises(ValueError, match=".npz can't keep metadata"):
        checkpoint.save(model, tmp_path / "a.npz", {"step": 1})
    with pytest.raises(ValueError, match=".npz can't keep timm's names"):
        checkpoint.save(model, tmp_path / "a.npz", naming="timm")
    with pytest.raises(ValueError, match="naming is 'hf'; it may be 'bit' or 'timm'"):
        checkpoint.save(model, tmp_path / "a.safetensors", naming="hf")
    with pytest.raises(ValueError, match="naming is 'hf'; it may be one of bit, timm, npz"):
        checkpoint.views(model, "hf")
    for call in (checkpoint.save, checkpoint.load):
        with pytest.raises(ValueError, match="model is on the meta device"):
            call(models.create("R14x0.125", device="meta"), tmp_path / "a.npz")
        with pytest.raises(ValueError, match="model is a Sequential; .*without a wrapper"):
            call(torch.nn.Sequential(model), tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_old_file_survives_a_file_that_cannot_grow(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(small(), path)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        with pytest.raises(OSError) as raised:
            checkpoint.save(small(num_classes=7), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_old_file_survives_a_full_disk(tmp_path, monkeypatch, suffix, step):
    path = tmp_path / f"a.{suffix}"
    checkpoint.save(small(), path)
    old = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small(num_classes=7), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"

    def half(file):
        file.write(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, half)
    assert not list(tmp_path.iterdir())

    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_mode), fsync(fd)))
    checkpoint.write_atomically(path, lambda file: file.write(b"whole"))
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "ordinary").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    link = tmp_path / "latest.json"
    link.symlink_to(path)
    checkpoint.write_atomically(link, lambda file: file.write(b"newer"))
    assert link.is_symlink() and path.read_bytes() == b"newer"
    with pytest.raises(FileNotFoundError):
        checkpoint.write_atomically(tmp_path / "no folder" / "a", lambda file: None)


def test_header_is_aligned(tmp_path):
    checkpoint.write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"x": "y"})
    (length,) = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
    assert length % 8 == 0
