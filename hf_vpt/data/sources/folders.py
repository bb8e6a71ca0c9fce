"""Folders of images: which of their subfolders are splits, and which are classes."""

from __future__ import annotations

from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from ..splits import SPLIT_OF


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"


def find_splits(folder: Path) -> dict[str, str] | None:
    """Return patterns for the files of each split of an image folder; None for a folder that is anything else.

    Splits are folders directly in it, with one folder a class in them; without any, all is the train split. `datasets`
    alone looks for the words train, test and so on in the whole path of a file: the images of a class "test strip"
    would be in the test split too, and of the classes "bus" and "train" one would be left out.

    Args:
        folder: Where the splits or classes are.

    Raises:
        ValueError: The folder of a class has nothing in it.
    """
    described = [*ImageFolder.METADATA_FILENAMES, CARD_FILE]
    if any((folder / name).is_file() and not _is_plain_text(folder / name) for name in described):
        return None  # the file says which image is in which split, or in which class
    inner = _subfolders(folder)
    # Train first: a split with one class gets no labels from `datasets` unless others were seen before it.
    named = [child for word in SPLIT_OF for child in inner if child.name.lower() == word]
    splits = [child for child in named if _class_folders(child)]
    for child in splits:
        if SPLIT_OF[child.name.lower()] == "train":
            _check_filled(child)
    if splits:
        return {child.name.lower(): f"{child.name}/**" for child in splits} if splits == named else None
    # Images in folders called train and test, and in no other ones, have no classes.
    if len(named) == len(inner) or len(_class_folders(folder)) < 2:
        return None
    _check_filled(folder)
    if named:
        logger.warning(
            f"'{folder}' holds the images of classes, one of which is called '{named[0].name}'. If that is a split, "
            "put the others in a folder train."
        )
    return {"train": "**"}


def _is_plain_text(file: Path) -> bool:
    """Whether a file is a README without a header for machines."""
    return file.name == CARD_FILE and not file.read_bytes().startswith(b"---")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))


def _class_folders(folder: Path) -> list[Path]:
    """Subfolders with images directly in them."""
    return [
        child
        for child in _subfolders(folder)
        if any(file.suffix.lower() in ImageFolder.EXTENSIONS for file in child.iterdir())
    ]


def _check_filled(folder: Path) -> None:
    if empty := [child for child in _subfolders(folder) if not any(child.iterdir())]:
        raise ValueError(
            f"'{empty[0]}' has nothing in it, and other folders beside it hold the images of a class each. Each class "
            "needs some: add images, or remove the folder."
        )
