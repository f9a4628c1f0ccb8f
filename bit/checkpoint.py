"""Weights in and out of files. The suffix of a path chooses the format.

    .npz          the layout of the released BiT weights: arrays "resnet/block1/unit01/a/..."
    .safetensors  this project's own: the state_dict, and JSON in the metadata (config, classes,
                  step, ...); or timm's names for its resnetv2_*_bit, recognised when read

`save` writes a network, `load` fills one that exists, `create_from` builds and fills one.
`write_safetensors` and `read_safetensors` take any tensors, an optimizer's for instance.

A file is replaced whole or not at all, and equal weights give equal bytes. A model is filled whole
or not at all: what is missing, extra or misshapen is one error that lists everything. Nothing here
reads a pickle, which can run any code while it is read.
"""

import contextlib
import json
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bit import models
from bit_kernels.modules import FrozenConv2d

NAMINGS = ("bit", "timm", "npz")
HEADS = ("head.", "resnet/head/")  # how the head's keys begin, in all three
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

# our layer: its place in a released file, below "resnet/" and the unit
NPZ_LAYERS = {
    "root.conv": "root_block/standardized_conv2d",
    "norm1": "a/group_norm",
    "proj": "a/proj/standardized_conv2d",
    "conv1": "a/standardized_conv2d",
    "norm2": "b/group_norm",
    "conv2": "b/standardized_conv2d",
    "norm3": "c/group_norm",
    "conv3": "c/standardized_conv2d",
    "norm": "group_norm",
    "head": "head/conv2d",
}
# our layer: timm's, where it has another name
TIMM_LAYERS = {"root.conv": "stem.conv", "proj": "downsample.conv", "head": "head.fc"}

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(
    model: models.ResNetV2,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    *,
    naming: str = "bit",
) -> None:
    """Write the weights of `model` to `path`; on any failure an old file there stays as it was.

    .safetensors keeps the dtype of the weights and takes `metadata`, JSON values by name. To them
    it adds "config", the arguments that rebuild the model. naming="timm" writes timm's names.

    .npz holds float32 arrays and nothing else. Half types are widened, which is exact; float64 is
    refused. The keys are the plain ones, without numbers, in sorted order as in the released files:
    what was read from one of those is written as the same bits under the same keys.

    Raises ValueError for what the format can't hold, OSError if the file can't be written.
    """
    _check_model(model)
    if naming not in ("bit", "timm"):
        raise ValueError(f"naming is {naming!r}; it may be 'bit' or 'timm'")
    if _suffix(path) == ".safetensors":
        metadata = {"config": model.config} | dict(metadata or {})
        if metadata["config"] != model.config:
            raise ValueError(
                f"metadata['config'] is {metadata['config']!r}; that name is kept for the model's "
                f"own, {model.config!r}"
            )
        write_safetensors(path, views(model, naming), metadata)
        return

    if metadata:
        raise ValueError(f"{path}: .npz can't keep metadata; save as .safetensors, or without it")
    if naming == "timm":
        raise ValueError(f"{path}: .npz can't keep timm's names; save as .safetensors")
    arrays = views(model, "npz")
    if any(array.dtype == torch.float64 for array in arrays.values()):
        raise ValueError(
            f"{path}: .npz is float32 and would round float64 weights; save as .safetensors, or "
            f"model.float() first"
        )
    write_atomically(path, lambda file: _write_npz(file, arrays))


def load(model: models.ResNetV2, path: str | os.PathLike, head: str = "keep") -> dict[str, Any]:
    """Copy the weights in `path` into `model` and return the file's metadata, {} for .npz.

    Values are converted to the model's dtype and device. head="drop" ignores the head in the file
    and leaves the model's as it is, which after `models.create` is zero: for other classes.

    Raises ValueError, with the model untouched, for a damaged file and for entries that are
    missing, extra, misshapen or not floating point, all listed; OSError if it can't be read.
    """
    _check_model(model)
    if head not in ("keep", "drop"):
        raise ValueError(f"head is {head!r}; it may be 'keep' or 'drop'")
    if _suffix(path) == ".npz":
        tensors, metadata, naming = _read_npz(path), {}, "npz"
    else:
        tensors, metadata = read_safetensors(path)
        naming = "timm" if any(key.startswith(("stem.", "stages.")) for key in tensors) else "bit"
    slots = views(model, naming)
    if head == "drop":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(HEADS)}
        slots = {key: slot for key, slot in slots.items() if not key.startswith(HEADS)}

    problems = {key: f"missing: {key}" for key in slots if key not in tensors}
    for key, tensor in tensors.items():
        if key not in slots:
            problems[key] = f"extra: {key}"
        elif tensor.shape != slots[key].shape:
            got, wanted = tuple(tensor.shape), tuple(slots[key].shape)
            problems[key] = f"misshapen: {key} is {got}, the model's is {wanted}"
        elif not tensor.is_floating_point():
            problems[key] = f"not floating point: {key} is {tensor.dtype}"
    if problems:
        lines = [f"{path} does not fit {model!r}", *problems.values()]
        if "config" in metadata:
            lines.append(f"the file says it is {metadata['config']!r}")
        if any(key.startswith(HEADS) for key in problems):
            lines.append("head='drop' would leave the head out")
        raise ValueError("\n  ".join(lines))

    for key, slot in slots.items():
        slot.copy_(tensors[key])
    return metadata


def create_from(
    path: str | os.PathLike,
    num_classes: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> models.ResNetV2:
    """Build the network that `path`, a .safetensors file of `save`, describes, and load it.

    num_classes: None keeps the head in the file. A number gives a fresh head of zeros instead.
    device, dtype: as for `models.create`.

    Raises what `load` raises, and ValueError for a file that doesn't say which network it holds.
    """
    config = read_metadata(path).get("config")
    if not isinstance(config, dict) or set(config) != {"name", "num_classes", "stem"}:
        raise ValueError(
            f"{path} does not say which network it holds; build that with models.create, then load"
        )
    if num_classes is not None:
        config["num_classes"] = num_classes
    # Never initialized: `load` fills all but a fresh head, and R152x4 takes half a minute to draw.
    model = models.create(**config, device="meta", dtype=dtype)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    load(model, path, head="keep" if num_classes is None else "drop")
    return model


def views(model: models.ResNetV2, naming: str) -> dict[str, Tensor]:
    """Return the weights under the names and in the axes of "bit", "timm" or "npz", without a copy.

    Every value is a view of a parameter, so it may be read and, with `copy_`, written:
    `timm_model.load_state_dict(views(model, "timm"))` in one direction, and in the other
    `for key, view in views(model, "timm").items(): view.copy_(timm_state[key])`.

        npz   kernels (kh, kw, in, out), head (1, 1, features, classes)
        timm  kernels (out, in, kh, kw), head (classes, features, 1, 1)
        bit   kernels (out, in, kh, kw), head (classes, features)
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; it may be one of {', '.join(NAMINGS)}")
    state = model.state_dict()
    if naming == "bit":
        return state
    rename = _npz_view if naming == "npz" else _timm_view
    return dict(rename(name, tensor) for name, tensor in state.items())


def _npz_view(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    unit, layer, kind = _split(name)
    if tensor.dim() == 1:
        kind = "bias" if layer == "head" else {"weight": "gamma", "bias": "beta"}[kind]
    else:
        kind = "kernel"
        tensor = tensor.t()[None, None] if layer == "head" else tensor.permute(2, 3, 1, 0)
    return "/".join(("resnet", *unit, NPZ_LAYERS[layer], kind)), tensor


def _timm_view(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    unit, layer, kind = _split(name)
    if unit:
        block, number = int(unit[0].removeprefix("block")), int(unit[1].removeprefix("unit"))
        unit = (f"stages.{block - 1}.blocks.{number - 1}",)
    if layer == "head" and kind == "weight":
        tensor = tensor[:, :, None, None]
    return ".".join((*unit, TIMM_LAYERS.get(layer, layer), kind)), tensor


def _split(name: str) -> tuple[tuple[str, ...], str, str]:
    """Split "block1.unit02.conv1.weight" into (("block1", "unit02"), "conv1", "weight")."""
    place, kind = name.rsplit(".", 1)
    if place.startswith("block"):
        block, unit, layer = place.split(".")
        return (block, unit), layer, kind
    return (), place, kind


def _read_npz(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the arrays of a released file, numbered keys under their plain names.

    Some have standardized_conv2d_<N> where the others have standardized_conv2d.
    """
    tensors = {}
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            for entry in archive.infolist():
                key = entry.filename.removesuffix(".npy")
                key = re.sub(r"/standardized_conv2d_\d+/", "/standardized_conv2d/", key)
                if key in tensors:
                    raise ValueError(f"it has {key} twice")
                with archive.open(entry) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                tensors[key] = torch.from_numpy(native)
        # The file is open; whatever now fails (the two readers have a dozen errors) is its content.
        except Exception as error:
            raise ValueError(f"{path} is not a whole .npz file of numbers: {error}") from error
    return tensors


def _write_npz(file: BinaryIO, arrays: Mapping[str, Tensor]) -> None:
    """Write what np.savez would, one array in memory at a time.

    Sorted, uncompressed and without times, it has the size of the released files to the byte.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for key in sorted(arrays):
            # Contiguous, because write_array marks a transposed kernel as Fortran-ordered.
            array = np.ascontiguousarray(arrays[key].float().cpu().numpy())
            entry = zipfile.ZipInfo(f"{key}.npy")
            entry.file_size = array.nbytes
            with archive.open(entry, "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, of any layout and device, and metadata: a dict of JSON values.

    Equal tensors and metadata give equal bytes, and one tensor is in memory at a time, neither of
    which the safetensors library's own save_file promises: it orders metadata by chance.

    Raises ValueError for a dtype or metadata that the format can't hold, OSError if the file can't
    be written; on any failure an old file stays as it was.
    """
    texts = {}
    for key, value in (metadata or {}).items():
        try:
            texts[key] = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata[{key!r}] is not JSON: {error}") from error
    header = {"__metadata__": texts}
    end = 0
    # Wide types first, so that every tensor is aligned in a mapped file.
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"tensors[{key!r}] is {tensor.dtype}; it may be one of "
                f"{', '.join(map(str, SAFETENSORS_DTYPES))}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())

    write_atomically(path, write)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, on the CPU, and its metadata as `read_metadata` has it.

    The tensors are a private map of the file: they take memory as they are touched, and writing
    to them doesn't change the file. Raises ValueError for a damaged file.
    """
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, _decode(file.metadata())


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a .safetensors file without reading its tensors; {} for .npz.

    What isn't JSON, as in files of other programs, is returned as the text it is.
    """
    if _suffix(path) == ".npz":
        return {}
    with _open_safetensors(path) as file:
        return _decode(file.metadata())


@contextlib.contextmanager
def _open_safetensors(path: str | os.PathLike):
    try:
        # Opening checks that the file has every byte its header speaks of.
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error


def _decode(texts: Mapping[str, str] | None) -> dict[str, Any]:
    values = {}
    for key, text in (texts or {}).items():
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Give `path` the content that `write` writes to the binary file it is handed, or none of it.

    The content goes to a hidden file in the same folder, reaches the disk, and then takes the name.
    If anything fails before that (a full disk, Ctrl-C), the hidden file is removed, an old file
    at `path` is as it was, and the error goes on. A symbolic link keeps pointing where it did.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    # The new name is on the disk only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_model(model: models.ResNetV2) -> None:
    if not isinstance(model, models.ResNetV2):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be the ResNetV2 itself, without a wrapper "
            f"such as torch.compile or DistributedDataParallel"
        )
    if any(isinstance(module, FrozenConv2d) for module in model.modules()):
        raise ValueError(
            "model is frozen, its weights are standardized for good; save and load the network "
            "that it is frozen from"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device, where it has no values; create it elsewhere")


def _suffix(path: str | os.PathLike) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle by its name, which can run any code while it is read; if you "
            f"trust it, convert it once: safetensors.torch.save_file("
            f"torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} ends in {suffix!r}; it may end in .npz or .safetensors")
    return suffix
