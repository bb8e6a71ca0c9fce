"""Data sets of image files whose paths and classes are known before an image is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image


def listed_images(paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], where: str) -> Dataset:
    """Return image files and their classes as a data set that opens a file when it is asked for.

    Args:
        paths: Image files.
        labels: Class of each, from 0 on.
        names: Name of each class.
        where: What told the paths and classes, for error messages.

    Raises:
        ValueError: A class is outside the range of names, or there is no image.
        FileNotFoundError: An image file does not exist.
    """
    if not paths:
        raise ValueError(f"{where} names no images. A split needs some: look whether the file is whole.")
    check_files(paths, where)
    for path, label in zip(paths, labels):
        if not 0 <= label < len(names):
            raise ValueError(
                f"{where} gives '{path.name}' the class {label}. Classes from 0 to {len(names) - 1} are needed: "
                "correct the file, or get it anew from where it was published."
            )
    rows = {"image": [{"path": str(path), "bytes": None} for path in paths], "label": list(labels)}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=list(names))}))


def check_files(paths: Sequence[Path], where: str) -> None:
    """Look whether image files exist, all of them, so that training does not stop at one later.

    Raises:
        FileNotFoundError: One does not, with its path and how many others are missing.
    """
    if missing := [path for path in paths if not path.is_file()]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(
            f"{where} names {len(paths)} images, of which '{missing[0]}'{others} cannot be found. All of them are "
            "needed: unpack the data set again, or correct the list."
        )
