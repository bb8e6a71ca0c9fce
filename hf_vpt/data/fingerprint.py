"""A short name for the images of a split, by which two results can be told to be on the same data or not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torchvision
import transformers
from datasets import Dataset


def fingerprint_splits(splits: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the fingerprint of every split; None for those that are streamed, which nobody has read to their end."""
    return {split: fingerprint(data) if isinstance(data, Dataset) else None for split, data in splits.items()}


def fingerprint(data: Dataset) -> str:
    """Return 16 hexadecimal digits that depend on the images and classes of a split, but not on their order.

    An image counts by the name of its file and folder, the size of the file in bytes, and the name of its class; one
    without a file name by its contents. Folders that all images of the split lie in do not count. So no image is
    decoded, files are not opened, and where a data set lies on the disk makes no difference. The names of all classes
    count as well, in any order. Copies whose files were encoded anew differ.

    Args:
        data: With the columns `image` and `label` of `load_image_dataset`.
    """
    names = data.features["label"].names
    # Hashes are summed up, which no order changes. Sixteen bytes each: equal sums by chance are out of question.
    total = 0
    for words in _describe_rows(data, names):
        total += int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "big")
    classes = "\0".join(sorted(names))
    return hashlib.blake2b(f"{len(data)} {total} {classes}".encode(), digest_size=8).hexdigest()


def _describe_rows(data: Dataset, names: list[str]) -> Iterator[bytes]:
    table = data.data
    images, labels = table.column("image"), table.column("label")
    paths = _as_array(pc.struct_field(images, "path"))
    contents = pc.struct_field(images, "bytes")
    sizes = _as_array(pc.binary_length(contents)).to_pylist()
    labels = _as_array(labels).to_pylist()
    above = _num_common_folders(paths[row].as_py() for row in _rows(data))
    for row in _rows(data):
        path, size, label = paths[row].as_py(), sizes[row], labels[row]
        if path:
            size = _file_size(path) if size is None else size
            words = f"{'/'.join(_split(path)[above:][-2:])}\0{size}".encode()
        else:
            words = contents[row].as_py() or b""
        yield words + b"\0" + (names[label] if label is not None and label >= 0 else "").encode()


def _split(path: str) -> list[str]:
    return path.replace("\\", "/").split("/")  # Windows' paths have other slashes


def _num_common_folders(paths: Iterable[str | None]) -> int:
    folders = {tuple(_split(path)[:-1]) for path in paths if path}
    return len(os.path.commonprefix(list(folders)))


def identify_images(data: Dataset, column: str = "image") -> list[Any]:
    """Return what tells the images of a split, in their order, and what they are decoded to from all others.

    It is the part of a cache's key that is about images. Files that are named and not embedded count by size and time
    of their last change, because one may be replaced under its name.

    Args:
        data: The split.
        column: Of the images.
    """
    images = data.data.column(column)
    paths = _as_array(pc.struct_field(images, "path"))
    embedded = _as_array(pc.is_valid(pc.struct_field(images, "bytes"))).to_pylist()
    digest = hashlib.blake2b(digest_size=16)
    for row in _rows(data):
        state = None if embedded[row] else _file_state(paths[row].as_py())
        digest.update(f"{state};".encode())
    versions = [module.__version__ for module in (PIL, torchvision, transformers)]
    return [data._fingerprint, len(data), digest.hexdigest(), versions]


def _rows(data: Dataset) -> Iterator[int]:
    # The table has all rows, of which a data set that was selected from or shuffled shows some.
    rows = np.arange(data.data.num_rows) if data._indices is None else data._indices.column(0).to_numpy()
    return map(int, rows)


def _as_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _file_size(path: str) -> int | None:
    state = _file_state(path)
    return None if state is None else state[0]


def _file_state(path: str | None) -> tuple[int, int] | None:
    """Size in bytes and time of the last change."""
    try:
        found = os.stat(path or "")
    except OSError:  # on the Hub, or gone
        return None
    return found.st_size, found.st_mtime_ns
