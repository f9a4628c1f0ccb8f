"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 70,000 grey images of 28 x 28 px, 10 classes."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from bit.data.dataset import Dataset, Options, Split, register

DEFAULT_ROOT = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@register("fashion-mnist")
def load_fashion_mnist(options: Options) -> Dataset:
    """Read the four IDX files, gzipped or plain, from `root` or where Debian puts them."""
    root = options.root or DEFAULT_ROOT
    return Dataset("fashion-mnist", _split(root, "train"), _split(root, "t10k"))


def _split(root: Path, prefix: str) -> Split:
    images = _read_idx(root, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    try:
        return Split(images, labels, CLASSES)
    except ValueError as error:
        raise ValueError(f"the {prefix} files in {root} do not fit together: {error}") from None


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """The array in an IDX file: two zero bytes, type 8 (uint8), rank, big-endian sizes, values."""
    path = next((p for p in (root / f"{name}.gz", root / name) if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"{root} has no {name}.gz or {name}: `apt-get install dataset-fashion-mnist` puts "
            f"Fashion-MNIST into {DEFAULT_ROOT}, or give the folder that has it as root"
        )
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    magic = bytes((0, 0, 8, dimensions))
    start = 4 + 4 * dimensions
    if data[:4] != magic or len(data) < start:
        raise ValueError(
            f"{path} begins with the bytes {data[:4].hex(' ')}; an IDX file of uint8 with "
            f"{dimensions} dimensions begins with {magic.hex(' ')} and its sizes"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dimensions, offset=4))
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise ValueError(
            f"{path} holds {len(data)} bytes; for its shape {shape} it must hold {expected}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
