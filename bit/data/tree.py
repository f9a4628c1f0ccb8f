"""A folder or archive as a tree of folders and image files, before anything is decoded.

Nothing is extracted: an archive is read once from front to back, and its image files stay in
memory as they are stored. (One larger than memory has to be unpacked and given as a folder.)
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bit.data.images import SUFFIXES

Source = Path | bytes

# (path, content) of an archive's entry: None for a folder, empty for what is no image
_Entry = tuple[tuple[str, ...], bytes | None]
_SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass
class Tree:
    """One folder: what it holds, and its path below the root for messages."""

    path: str = ""
    folders: dict[str, "Tree"] = field(default_factory=dict)
    images: dict[str, Source] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # files that are no images by their suffix

    def at(self, parts: tuple[str, ...]) -> "Tree":
        """The folder below this one at `parts`, made if it is not there."""
        tree = self
        for part in parts:
            path = f"{tree.path}/{part}".lstrip("/")
            tree = tree.folders.setdefault(part, Tree(path))
        return tree

    def all_images(self) -> list[tuple[str, Source]]:
        """(path, source) of the images in this folder and those below it, in a fixed order."""
        found = [(f"{self.path}/{name}", self.images[name]) for name in sorted(self.images)]
        for name in sorted(self.folders):
            found += self.folders[name].all_images()
        return found

    def all_others(self) -> list[str]:
        """Paths of the files in this folder and those below it that are no images."""
        found = [f"{self.path}/{name}" for name in sorted(self.others)]
        for name in sorted(self.folders):
            found += self.folders[name].all_others()
        return found


def read_tree(path: Path) -> Tree:
    """Read a folder, a .zip file, or a .tar file with any compression.

    Links in a folder are followed, links in an archive are not. Hidden files and folders (those
    with a leading dot, and what macOS and Windows scatter) are left out.

    Raises:
        ValueError: the path does not exist, or is no archive that can be read to its end.
        OSError: a folder can't be read.
    """
    tree = Tree()
    if path.is_dir():
        _read_folder(path, tree, inside=frozenset())
        return tree
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    entries = _zip_entries(path) if path.suffix.lower() == ".zip" else _tar_entries(path)
    try:
        for parts, data in entries:
            if any(_is_hidden(part) for part in parts):
                continue
            if data is None:
                tree.at(parts)
            elif _is_image(parts[-1]):
                tree.at(parts[:-1]).images[parts[-1]] = data
            else:
                tree.at(parts[:-1]).others.append(parts[-1])
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,  # an encrypted zip
    ) as error:
        raise ValueError(
            f"{path} must be a folder, or a tar or zip archive that is whole: {error}"
        ) from error
    return tree


def _read_folder(folder: Path, tree: Tree, inside: frozenset[Path]) -> None:
    real = folder.resolve()
    if real in inside:  # a link back to a folder it lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                _read_folder(Path(entry.path), tree.at((entry.name,)), inside | {real})
            elif entry.is_file() and _is_image(entry.name):
                tree.images[entry.name] = Path(entry.path)
            else:
                tree.others.append(entry.name)


def _tar_entries(path: Path) -> Iterator[_Entry]:
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isdir():
                yield parts, None
            elif member.isfile():
                yield parts, archive.extractfile(member).read() if _is_image(member.name) else b""


def _zip_entries(path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = PurePosixPath(member.filename).parts
            if member.is_dir():
                yield parts, None
            else:
                yield parts, archive.read(member) if _is_image(member.filename) else b""


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FILES
