"""WebDataset shards: .tar files that hold images and their classes in pairs, `name.jpg` and `name.cls`."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import ClassLabel, DatasetDict, IterableDatasetDict, Value, load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..splits import SPLIT_OF


CLASS_NAMES_FILE = "classnames.txt"
CLASS_COLUMN = "cls"
SHARDS_ON_THE_HUB = {"train": "train/*.tar", "test": "test/*.tar"}


def has_shards(folder: Path) -> bool:
    """Whether a folder, or one of its subfolders, holds .tar files."""
    return any(folder.glob("*.tar")) or any(folder.glob("*/*.tar"))


def find_shards(folder: Path) -> dict[str, list[str]]:
    """Return the .tar files of each split, which a word of their own name or of their folder's name tells.

    `train-000.tar`, `images-train-000.tar`, `train/000.tar` and `train_images/000.tar` are training data, and so is
    what names no split.

    Raises:
        ValueError: A name tells of two splits.
    """
    shards: dict[str, list[str]] = {}
    for file in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        words = re.split("[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower())
        splits = sorted({SPLIT_OF[word] for word in words if word in SPLIT_OF})
        if len(splits) > 1:
            raise ValueError(
                f"'{file}' names the splits {' and '.join(splits)}. The images of a shard belong to one split: rename "
                "the file or its folder."
            )
        shards.setdefault(splits[0] if splits else "train", []).append(str(file))
    return shards


def load_shards(
    folder: Path, cache_dir: str | None, streaming: bool = False, num_classes: int | None = None
) -> DatasetDict | IterableDatasetDict:
    """Load .tar files of a folder; the names of classes stand in `classnames.txt`, one a line, if it is there.

    Args:
        folder: With .tar files in it or in its subfolders.
        cache_dir: Folder for what is converted. Default: the one of `datasets`.
        streaming: Read images when they are needed, which needs `classnames.txt`.
        num_classes: Number of classes, where it is known and there is no such file.
    """
    raw = load_dataset("webdataset", data_files=find_shards(folder), cache_dir=cache_dir, streaming=streaming)
    file = folder / CLASS_NAMES_FILE
    return _name_classes(raw, file if file.is_file() else None, num_classes, str(folder))


def load_shards_from_hub(repo: str, revision: str | None, cache_dir: str | None, num_classes: int) -> DatasetDict:
    """Load the train and test shards of a repository on the Hub; see `load_shards`."""
    raw = load_dataset(repo, data_files=SHARDS_ON_THE_HUB, revision=revision, cache_dir=cache_dir)
    try:
        file = hf_hub_download(repo, CLASS_NAMES_FILE, repo_type="dataset", revision=revision, cache_dir=cache_dir)
    except LocalEntryNotFoundError:
        raise  # nobody could ask whether the repository has one
    except EntryNotFoundError:
        file = None
    return _name_classes(raw, file and Path(file), num_classes, repo)


def _name_classes(
    raw: DatasetDict | IterableDatasetDict, file: Path | None, num_classes: int | None, where: str
) -> DatasetDict | IterableDatasetDict:
    column = next(iter(raw.values())).features.get(CLASS_COLUMN)
    if not (isinstance(column, Value) and "int" in column.dtype):
        return raw
    names = file.read_text(encoding="utf-8").splitlines() if file else []
    names = [name.strip() for name in names if name.strip()]
    if len(set(names)) < len(names) or (num_classes is not None and len(names) != num_classes):
        names = []  # two classes of one name, or other classes than the benchmark has: numbers are safer
    if not names and num_classes is not None:
        names = [str(number) for number in range(num_classes)]
    if not names:
        return raw
    if isinstance(raw, DatasetDict):
        for split, data in raw.items():
            numbers = [number for number in data.unique(CLASS_COLUMN) if number is not None]
            if wrong := [number for number in numbers if not -1 <= number < len(names)]:
                raise ValueError(
                    f"'{where}' has images of class {wrong[0]} in its {split} split, and {len(names)} classes. "
                    f"Classes from 0 to {len(names) - 1} are needed: correct {CLASS_NAMES_FILE} or the shards."
                )
    return raw.cast_column(CLASS_COLUMN, ClassLabel(names=names))
