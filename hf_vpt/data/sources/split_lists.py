"""The split lists that VPT publishes for FGVC: `train.json`, `val.json` and `test.json` beside the images."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import DatasetDict

from .listed import listed_images


LISTS = {"train": "train.json", "validation": "val.json", "test": "test.json"}
# Where paths of a list begin: each set has a folder of its own for its images.
IMAGE_FOLDERS = ("", "images", "Images", "jpg", "car_ims")


def load_split_lists(folder: Path, name: str) -> DatasetDict:
    """Load an FGVC set with the division into train, validation and test of published scores.

    Each list is one JSON object from paths of images to numbers of classes, which may have gaps.

    Args:
        folder: With the three lists, and images in the layout of their authors.
        name: Name of the set, for error messages.

    Raises:
        FileNotFoundError: A list or an image is missing.
        ValueError: A file is no such list.
    """
    if missing := [file for file in LISTS.values() if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"'{folder}' has no {', '.join(missing)}. The variant lists of fgvc/{name} needs VPT's three lists beside "
            "the images (json.zip of XiN0919/FGVC on the Hub has them): put them there, or choose variant official."
        )
    lists = {split: _read(folder / file) for split, file in LISTS.items()}
    numbers = sorted({number for entries in lists.values() for number in entries.values()})
    labels = {number: position for position, number in enumerate(numbers)}
    names = [str(number) for number in numbers]
    return DatasetDict(
        {
            split: listed_images(
                _find_images(folder, list(entries)),
                [labels[number] for number in entries.values()],
                names,
                f"'{folder / LISTS[split]}'",
            )
            for split, entries in lists.items()
        }
    )


def _read(file: Path) -> dict[str, int]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{file}' cannot be read as JSON ({error}). Get the list anew.") from error
    try:
        return {str(path): int(number) for path, number in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{file}' is no object from paths to numbers ({error}). It must look like "
            '{"001.Auk/1.jpg": 1}: get the list anew.'
        ) from error


def _find_images(folder: Path, paths: list[str]) -> list[Path]:
    bases = [folder / name for name in IMAGE_FOLDERS]
    base = next((base for base in bases if paths and (base / paths[0]).is_file()), folder)
    return [base / path for path in paths]
